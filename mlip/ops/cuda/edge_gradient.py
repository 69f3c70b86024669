"""Forces and virial from edge gradients on CUDA: launches of ``kernels/edge_gradient.cu``.

Kernels of the operators ``mlip::forces_and_virial`` and ``mlip::edge_slopes``, which are declared
and differentiated in ``mlip.ops.cpu.edge_gradient``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.ops.cpu.edge_gradient import check_edges, slopes_op, sums_op
from mlip.ops.cuda.program import Program
from mlip.ops.cuda.slots import slots

BLOCK = 128  # as in the source
PROGRAM = Program("edge_gradient.cu", {})


@sums_op.register_kernel("cuda")
def cuda_sums(
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    n_nodes: int,
    n_graphs: int,
) -> tuple[Tensor, Tensor]:
    """Kernel of ``mlip::forces_and_virial``."""
    check_edges(edge_gradient, edge_vector, edge_index, batch, n_nodes)
    forces = edge_gradient.new_empty(n_nodes, 3)
    virial = edge_gradient.new_empty(n_graphs, 3, 3)
    by_atom = edge_gradient.new_empty(n_nodes, 6, dtype=torch.float64)
    dtype = edge_gradient.dtype
    PROGRAM.launch(
        "atom_sums", dtype, (-(-32 * n_nodes // BLOCK),), BLOCK, 0,
        (
            edge_gradient.contiguous(), edge_vector.contiguous(), *slots(edge_index, n_nodes),
            forces, by_atom, edge_index.shape[1], n_nodes,
        ),
    )  # fmt: skip
    PROGRAM.launch(
        "structure_sums", dtype, (n_graphs,), BLOCK, 6 * 8 * BLOCK,
        (by_atom, *slots(batch, n_graphs), virial),
    )  # fmt: skip
    return forces, virial


@slopes_op.register_kernel("cuda")
def cuda_slopes(
    force: Tensor,
    strain: Tensor,
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Kernel of ``mlip::edge_slopes``."""
    check_edges(edge_gradient, edge_vector, edge_index, batch, len(force), force, strain)
    found = force.new_empty(edge_gradient.shape), force.new_empty(edge_vector.shape)
    n_edges = edge_index.shape[1]
    PROGRAM.launch(
        "edge_slopes", force.dtype, (-(-n_edges // BLOCK),), BLOCK, 0,
        (
            force.contiguous(), strain.contiguous(), edge_gradient.contiguous(),
            edge_vector.contiguous(), edge_index.contiguous(), batch.contiguous(), *found, n_edges,
        ),
    )  # fmt: skip
    return found
