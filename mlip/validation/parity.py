"""What all comparisons with numbers of official codes share: files, deviations, tolerances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mlip.errors import DataError

Arrays = Mapping[str, np.ndarray]
TOLERANCE = {"float64": 1e-10, "float32": 5e-5}


class Deviation(NamedTuple):
    """Worst absolute difference of one quantity in one precision, and what is allowed."""

    quantity: str
    dtype: str
    worst: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.worst <= self.tolerance


class Omission(NamedTuple):
    """A part of a file that is not compared, and why; it does not fail the comparison."""

    quantity: str
    reason: str

    @property
    def passed(self) -> bool:
        """Always: there is no number to judge."""
        return True


Row = Deviation | Omission


class Reading(Mapping[str, np.ndarray]):
    """Arrays of a file that remember which of them were asked for."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays, self._unread = arrays, set(arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        self._unread.discard(name)
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def unread(self) -> list[str]:
        """Names that nobody asked for, in alphabetical order."""
        return sorted(self._unread)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read an .npz file without unpickling anything.

    Raises:
        DataError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from error


def worst(ours: Tensor | None, truth: np.ndarray) -> float:
    """Return the largest absolute difference, infinity where shapes differ."""
    if ours is None or tuple(ours.shape) != truth.shape:
        return float("inf")
    return float(np.abs(ours.detach().double().numpy() - truth).max(initial=0.0))
