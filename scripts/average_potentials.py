"""Average the weights of potentials that come from one training, such as a potential and what it
became when it was trained on.

    python scripts/average_potentials.py FIRST SECOND ... --out averaged.safetensors

Where the way from one to the other leads through no worse weights, the average is as good as the
better of them or better (Izmailov et al., arXiv 1803.05407); else it is much worse. Evaluate it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from mlip.errors import InputError
from mlip.potential import Potential, load_potential

OF_ONE_RUN = ("metrics", "best_epoch")


def average(potentials: Sequence[Potential]) -> Potential:
    """Give a potential with the mean weights, and what is known of the last one, in float64.

    Raises:
        InputError: models, elements, reference energies or units differ.
    """
    *others, last = [potential.to_dtype(torch.float64) for potential in potentials]
    headers = [{**each.to_header(), "metadata": None} for each in (*others, last)]
    for key in headers[0]:
        if any(header[key] != headers[-1][key] for header in headers):
            raise InputError(f"the potentials differ in {key}: average those of one training")
    states = [potential.state_dict() for potential in (*others, last)]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    last.load_state_dict(mean)
    for name in OF_ONE_RUN:
        last.metadata.pop(name, None)
    return last


def main() -> None:
    """Parse the command line and write the average."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("potentials", nargs="+")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    found = average([load_potential(name, dtype="float64") for name in arguments.potentials])
    found.to_dtype(torch.float32).save(arguments.out)


if __name__ == "__main__":
    main()
