"""What all comparisons with numbers of official codes share: files, deviations, tolerances."""

from __future__ import annotations

from collections.abc import Mapping
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
