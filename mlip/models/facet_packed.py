"""Features of Facet in one array, degree after degree, and its matrices ready for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mlip.nn.equivariant import EquivariantLinear

Matrices = tuple[Tensor, ...]


def scaled(linear: EquivariantLinear) -> Matrices:
    """Matrices of a linear map; an absent degree has no rows."""
    return tuple(w.detach() / math.sqrt(max(len(w), 1)) for w in linear.weights)


def split(flat: Tensor, n_atoms: int, channels: Sequence[int]) -> list[Tensor]:
    """View packed features as one matrix [N·(2l+1), C_l] for each degree."""
    parts, first = [], flat.storage_offset()
    for degree, width in enumerate(channels):
        rows = n_atoms * (2 * degree + 1)
        parts.append(flat.as_strided((rows, width), (width, 1), first))
        first += rows * width
    return parts


def empty(like: Tensor, n_atoms: int, channels: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Make packed features, and their views."""
    size = n_atoms * sum((2 * degree + 1) * n for degree, n in enumerate(channels))
    flat = like.new_empty(size)
    return flat, split(flat, n_atoms, channels)


def widths(matrices: Matrices, dim: int) -> list[int]:
    """Rows (dim 0) or columns (1) of the matrix of each degree."""
    return [matrix.shape[dim] for matrix in matrices]


def add_shared(
    x: Tensor, out: Tensor, n: int, channels: Sequence[int], target: Sequence[int]
) -> None:
    """Add the channels that two packed features share to ``out``."""
    pairs = zip(split(x, n, channels), split(out, n, target), strict=False)
    for rows, own in pairs:
        shared = min(rows.shape[1], own.shape[1])
        if shared:
            own[:, :shared] += rows[:, :shared]
