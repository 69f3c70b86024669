"""Errors that users see: each names the thing, what was expected and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


class MlipError(Exception):
    """Base of all errors raised on purpose by this package."""


class InputError(MlipError, ValueError):
    """A structure, setting or argument that cannot be used as given."""


class DataError(InputError):
    """A file or an entry of a data set that cannot be used as given."""


class DataWarning(UserWarning):
    """Something is wrong with a data set that leaves its entries readable."""


class NonConservativeWarning(UserWarning):
    """Forces of a potential are not derivatives of its energy."""


class UnknownElementError(InputError):
    """A structure holds elements that the potential does not know."""


class CheckpointError(MlipError):
    """A model file that is corrupt, truncated, foreign or of another version."""


class MissingExtraError(MlipError, ImportError):
    """An optional dependency is needed and not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: importable name, for instance ``"lightning"``.
        extra: extra of this package that installs it, for instance ``"train"``.

    Raises:
        MissingExtraError: the module is not installed; the text names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module!r} is needed for this and not installed: "
            f"run  pip install 'mlip[{extra}]'  (or  make setup  in a checkout)"
        ) from None
