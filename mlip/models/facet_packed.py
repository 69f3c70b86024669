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


def message_gradients(
    signature: str,
    kernel: Tensor,
    edges: EdgeList,
    harmonics: Tensor,
    basis: Tensor,
    sources: Tensor,
    gradient: Tensor,
    onto: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of packed sums of messages by harmonics and radial functions.

    Args:
        signature: of the convolution, as text.
        kernel: [R, n_weights] of the radial functions.
        edges: all, or pairs of opposite edges.
        harmonics, basis: [E, K] and [E, R] of these.
        sources: packed features that messages are made of.
        gradient: by the sums.
        onto: what the gradient by sources is added to; None: not wanted.

    Returns:
        [E, K] and [E, R].
    """
    from mlip.ops.cpu import library, pairs

    arguments = (sources, harmonics, basis, kernel, gradient)
    if isinstance(edges, pairs.PairList):
        return pairs.pair_gradients(*arguments, edges, signature, onto)
    wanted = [onto is not None, True, True, False]
    return library.convolve_backward(*arguments, edges, signature, wanted, onto)[1:3]


def widths(matrices: Sequence[Matrix], dim: int) -> list[int]:
    """Rows (dim 0) or columns (1) of the matrix of each degree."""
    return [matrix.shape[dim] for matrix in matrices]
