"""Forces and virial from the derivatives of the energy with respect to edge vectors."""

from __future__ import annotations

from torch import Tensor

from mlip.ops.backend import CHECK_EDGES, Backend, compare, default_backend, tracing, use_kernel
from mlip.ops.segment import segment_sum


def forces_and_virial(
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    n_nodes: int,
    n_graphs: int,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn ∂E/∂(edge vector) into forces and the symmetric virial.

    With edge vector d = r_source + shift·cell − r_target, a homogeneous strain ε maps d to
    (1 + ε)·d, so ∂E/∂ε = Σ_e (∂E/∂d_e) ⊗ d_e: the virial needs no derivative of the cell.

    Args:
        edge_gradient: [E, 3] eV/Å.
        edge_vector: [E, 3] Å.
        edge_index: [2, E]; row 0 source, row 1 target.
        batch: [N] structure of each atom.
        n_nodes: N.
        n_graphs: B.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        forces [N, 3] eV/Å and ∂E/∂ε [B, 3, 3] eV.
    """
    backend = backend or default_backend()
    structure = (edge_index, batch, n_nodes, n_graphs)

    def check() -> tuple[float, float]:
        few = (edge_index[:, :CHECK_EDGES], *structure[1:])
        inputs = [edge_gradient[:CHECK_EDGES], edge_vector[:CHECK_EDGES]]
        return compare(
            lambda g, d: _definition(g, d, *few), lambda g, d: _kernel(g, d, *few), inputs
        )

    use = edge_index.shape[1] > 0 and use_kernel(
        backend, "forces and virial of edges", [edge_gradient, edge_vector], check
    )
    return (_kernel if use else _definition)(edge_gradient, edge_vector, *structure)


def _definition(
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    n_nodes: int,
    n_graphs: int,
) -> tuple[Tensor, Tensor]:
    source, target = edge_index[0], edge_index[1]
    forces = segment_sum(edge_gradient, target, n_nodes) - segment_sum(
        edge_gradient, source, n_nodes
    )
    outer = edge_gradient[:, :, None] * edge_vector[:, None, :]  # [E, 3, 3]
    per_node = segment_sum(outer.flatten(1), target, n_nodes)
    virial = segment_sum(per_node, batch, n_graphs).view(n_graphs, 3, 3)
    return forces, 0.5 * (virial + virial.transpose(1, 2))


def _kernel(
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    n_nodes: int,
    n_graphs: int,
) -> tuple[Tensor, Tensor]:
    arguments = (edge_gradient, edge_vector, edge_index, batch, n_nodes, n_graphs)
    if edge_gradient.device.type == "cuda":
        from mlip.ops.cuda.edge_gradient import sums_op as for_cuda

        return for_cuda(*arguments)
    from mlip.ops.cpu.edge_gradient import sums, sums_op

    if edge_gradient.requires_grad or edge_vector.requires_grad or tracing():
        return sums_op(*arguments)
    return sums(*arguments)
