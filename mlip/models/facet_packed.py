"""Features of Facet in one array, degree after degree, and its matrices ready for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mlip.nn.equivariant import EquivariantLinear
from mlip.ops import Features

Matrices = tuple[Tensor, ...]


def scaled(linear: EquivariantLinear) -> Matrices:
    """Matrices of a linear map; an absent degree has no rows."""
    return tuple(w.detach() / math.sqrt(max(len(w), 1)) for w in linear.weights)


def by_degree(flat: Tensor, n_atoms: int, channels: Sequence[int]) -> Features:
    """View packed features as [N, 2l+1, C_l] for each degree."""
    sizes = [n_atoms * (2 * degree + 1) * width for degree, width in enumerate(channels)]
    return tuple(
        part.view(n_atoms, 2 * degree + 1, channels[degree])
        for degree, part in enumerate(flat.split(sizes))
    )


def widths(matrices: Matrices, dim: int) -> list[int]:
    """Rows (dim 0) or columns (1) of the matrix of each degree."""
    return [matrix.shape[dim] for matrix in matrices]
