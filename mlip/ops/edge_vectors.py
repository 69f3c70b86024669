"""Vectors of edges from positions, cells and images."""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.ops.backend import CHECK_EDGES, Backend, default_backend, tracing, use_kernel


def edge_vectors(
    positions: Tensor,
    cell: Tensor,
    edge_index: Tensor,
    edge_shift: Tensor,
    batch: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """Compute ``r_source + shift @ cell - r_target``, differentiable in positions and cell.

    The vector of the reversed edge is its negative to the last bit.

    Args:
        positions: [N, 3] Å.
        cell: [B, 3, 3] Å, rows are lattice vectors.
        edge_index: [2, E]; row 0 source, row 1 target.
        edge_shift: [E, 3] integers, image of the source.
        batch: [N] structure of each atom; not read where there is one.
        backend: ``"torch"`` for the definition; None for what the environment says. Else the
            kernel for the CPU runs where nobody asks for derivatives, once it has been compared.

    Returns:
        [E, 3] Å.
    """
    arguments = (positions, cell, edge_index, edge_shift, batch)
    if (backend or default_backend()) == "torch" or not _covered(*arguments):
        return _definition(*arguments)

    def check() -> float:
        return _difference(*arguments)

    tensors, reason = [positions, cell], "it is written for processors"
    use = use_kernel("auto", "vectors of edges", tensors, check, cuda=reason)
    return (_kernel if use else _definition)(*arguments)


def _covered(
    positions: Tensor, cell: Tensor, edge_index: Tensor, edge_shift: Tensor, batch: Tensor
) -> bool:
    differentiated = torch.is_grad_enabled() and (positions.requires_grad or cell.requires_grad)
    return (
        len(edge_shift) > 0
        and positions.dtype == cell.dtype == torch.float64
        and edge_index.dtype == edge_shift.dtype == batch.dtype == torch.int64
        and not differentiated
        and not tracing()
    )


def _definition(
    positions: Tensor, cell: Tensor, edge_index: Tensor, edge_shift: Tensor, batch: Tensor
) -> Tensor:
    source, target = edge_index
    shift = edge_shift.to(cell.dtype)
    if cell.shape[0] == 1:
        images = shift @ cell[0]
    else:
        cell = cell.index_select(0, batch.index_select(0, target))
        images = (shift.unsqueeze(1) @ cell).squeeze(1)
    return images + (positions.index_select(0, source) - positions.index_select(0, target))


def _kernel(
    positions: Tensor, cell: Tensor, edge_index: Tensor, edge_shift: Tensor, batch: Tensor
) -> Tensor:
    from mlip.ops.cpu.edge_vectors import vectors

    return vectors(positions, cell, edge_index, edge_shift, batch)


def _difference(
    positions: Tensor, cell: Tensor, edge_index: Tensor, edge_shift: Tensor, batch: Tensor
) -> float:
    """Relative difference of the two on the first edges."""
    few = (positions, cell, edge_index[:, :CHECK_EDGES], edge_shift[:CHECK_EDGES], batch)
    truth = _definition(*few)
    size = float(torch.linalg.vector_norm(truth)) or 1.0
    return float(torch.linalg.vector_norm(_kernel(*few) - truth)) / size
