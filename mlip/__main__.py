"""``python -m mlip`` is the ``mlip`` command, also where its script is not on the path."""

from mlip.cli.app import main

if __name__ == "__main__":
    main()
