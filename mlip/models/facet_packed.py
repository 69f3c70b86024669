"""Features of Facet in one array, degree after degree, and its matrices ready for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlip.nn.equivariant import EquivariantLinear
from mlip.ops import Features, Neighborhood

if TYPE_CHECKING:
    from mlip.ops.cpu.node_program import Matrix
    from mlip.ops.cpu.runner import EdgeList


def scaled(linear: EquivariantLinear) -> list[Tensor]:
    """Matrices of a linear map; an absent degree has no rows."""
    return [w.detach() / math.sqrt(max(len(w), 1)) for w in linear.weights]


def by_degree(flat: Tensor, n_atoms: int, channels: Sequence[int]) -> Features:
    """View packed features as [N, 2l+1, C_l] for each degree."""
    sizes = [n_atoms * (2 * degree + 1) * width for degree, width in enumerate(channels)]
    return tuple(
        part.view(n_atoms, 2 * degree + 1, channels[degree])
        for degree, part in enumerate(flat.split(sizes))
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Give degrees as one packed array, not copied where they lie one after another already."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == end):
            return torch.cat([part.reshape(-1) for part in parts])
        end += part.numel()
    start = first.storage_offset()
    return first.detach().as_strided((end - start,), (1,), start)


def edge_list(neighbors: Neighborhood) -> EdgeList:
    """Give edges as the kernels take them, checked once for all blocks."""
    from mlip.ops.cpu import library

    if neighbors.as_list is None:
        neighbors.as_list = library.edge_list(neighbors.rowptr, neighbors.source)
    return neighbors.as_list


def widths(matrices: Sequence[Matrix], dim: int) -> list[int]:
    """Rows (dim 0) or columns (1) of the matrix of each degree."""
    return [matrix.shape[dim] for matrix in matrices]
