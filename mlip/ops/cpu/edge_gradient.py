"""Forces and virial from edge gradients as PyTorch operators, on the CPU.

``mlip::forces_and_virial`` is linear in the edge gradients g and in the edge vectors d;
``mlip::edge_slopes`` are its derivatives. For cotangents a of the forces and B of the virial, with
S the symmetric part of B of an edge's structure,

    ∂/∂g = a_target − a_source + S·d,   ∂/∂d = S·g,

so that derivatives of any order are these two operators again. Sums are float64; edges are cut in
chunks by their number alone: results do not depend on threads.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array

CHUNK_EDGES = 1 << 15  # one thread goes through them in about 0.2 ms
MOST_CHUNKS = 8  # each has forces of its own, which are added up


def sums(
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    n_nodes: int,
    n_graphs: int,
) -> tuple[Tensor, Tensor]:
    """Evaluate ``mlip.ops.forces_and_virial``, without derivatives; fastest sorted by target."""
    check_edges(edge_gradient, edge_vector, edge_index, batch, n_nodes)
    arrays = _arrays(edge_gradient, edge_vector, edge_index, batch)
    n_edges = edge_index.shape[1]
    n_chunks = threads.even_parts(n_edges, CHUNK_EDGES, MOST_CHUNKS)
    forces = np.zeros((n_chunks, n_nodes, 3))
    virial = np.zeros((n_chunks, n_graphs, 3, 3))
    bounds = [n_edges * i // n_chunks for i in range(n_chunks + 1)]
    loop = cache.loops().edge_sums
    tasks = [
        partial(loop, *arrays, forces[i], virial[i], *pair)
        for i, pair in enumerate(pairwise(bounds))
    ]
    try:
        threads.run(tasks)
    except IndexError as error:
        raise _missing(n_nodes, n_graphs) from error
    dtype = edge_gradient.dtype
    of_forces, of_virial = (_added(parts) for parts in (forces, virial))
    return torch.from_numpy(of_forces).to(dtype), torch.from_numpy(of_virial).to(dtype)


sums_op = torch.library.custom_op(
    "mlip::forces_and_virial", sums, mutates_args=(), device_types="cpu"
)


@torch.library.custom_op("mlip::edge_slopes", mutates_args=(), device_types="cpu")
def slopes_op(
    force: Tensor,
    strain: Tensor,
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Operator of the derivatives by edge gradients and by edge vectors, [E, 3] each.

    Args:
        force: a, [N, 3]. strain: B, [B, 3, 3].
        edge_gradient, edge_vector, edge_index, batch: as for ``mlip.ops.forces_and_virial``.
    """
    check_edges(edge_gradient, edge_vector, edge_index, batch, len(force), force, strain)
    found = (
        torch.empty(edge_gradient.shape, dtype=force.dtype),
        torch.empty(edge_vector.shape, dtype=force.dtype),
    )
    loop = partial(
        cache.loops().edge_slopes, as_array(force), as_array(strain),
        *_arrays(edge_gradient, edge_vector, edge_index, batch), *(t.numpy() for t in found),
    )  # fmt: skip
    n_edges = edge_index.shape[1]
    try:
        threads.run_range(loop, n_edges, serial=n_edges < 2 * CHUNK_EDGES)
    except IndexError as error:
        raise _missing(len(force), len(strain)) from error
    return found


def check_edges(
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    n_nodes: int,
    force: Tensor | None = None,
    strain: Tensor | None = None,
) -> None:
    """Raise an error for shapes and types that compiled code must not see."""
    n_edges = edge_index.shape[-1]
    numbers = [t for t in (edge_gradient, edge_vector, force, strain) if t is not None]
    facts = {
        "edge_gradient": edge_gradient.shape == (n_edges, 3),
        "edge_vector": edge_vector.shape == (n_edges, 3),
        "edge_index": edge_index.shape == (2, n_edges),
        "batch": batch.shape == (n_nodes,),
        "forces": force is None or force.shape == (n_nodes, 3),
        "virial": strain is None or strain.shape == (len(strain), 3, 3),
        "precision": {t.dtype for t in numbers} in ({torch.float32}, {torch.float64}),
        "index type": edge_index.dtype == batch.dtype == torch.int64,
    }
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise InputError(
            f"forces and virial of {n_nodes} atoms and {n_edges} edges: {', '.join(wrong)} do not "
            "fit; expected the shapes of mlip.ops.forces_and_virial, one precision, int64 indices"
        )


def _missing(n_nodes: int, n_graphs: int) -> InputError:
    return InputError(
        f"forces and virial of {n_nodes} atoms in {n_graphs} structures: edge_index or batch "
        "points to one that does not exist"
    )


def _arrays(
    edge_gradient: Tensor, edge_vector: Tensor, edge_index: Tensor, batch: Tensor
) -> tuple[Any, ...]:
    return tuple(as_array(t) for t in (edge_gradient, edge_vector, edge_index, batch))


def _added(parts: Any) -> Any:
    return parts[0] if len(parts) == 1 else parts.sum(0)


@sums_op.register_fake
def _(
    edge_gradient: Tensor,
    edge_vector: Tensor,  # noqa: ARG001
    edge_index: Tensor,  # noqa: ARG001
    batch: Tensor,  # noqa: ARG001
    n_nodes: int,
    n_graphs: int,
) -> tuple[Tensor, Tensor]:
    return edge_gradient.new_empty(n_nodes, 3), edge_gradient.new_empty(n_graphs, 3, 3)


@slopes_op.register_fake
def _(
    force: Tensor,
    strain: Tensor,  # noqa: ARG001
    edge_gradient: Tensor,
    edge_vector: Tensor,
    edge_index: Tensor,  # noqa: ARG001
    batch: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return force.new_empty(edge_gradient.shape), force.new_empty(edge_vector.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _backward_sums(ctx: Any, of_forces: Tensor, of_virial: Tensor) -> tuple[Any, ...]:
    of_gradient, of_vector = slopes_op(of_forces, of_virial, *ctx.saved_tensors)
    return of_gradient, of_vector, None, None, None, None


def _backward_slopes(ctx: Any, u: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Differentiate Σ u·(a_target − a_source + S·d) + Σ v·S·g for the cotangents u and v."""
    force, strain, gradient, vector, index, batch = ctx.saved_tensors
    sizes = (len(force), len(strain))
    of_force, of_strain = sums_op(u, vector, index, batch, *sizes)
    of_strain = of_strain + sums_op(v, gradient, index, batch, *sizes)[1]
    no_force = torch.zeros_like(force)
    of_gradient, of_vector = slopes_op(no_force, strain, u, v, index, batch)
    return of_force, of_strain, of_gradient, of_vector, None, None


sums_op.register_autograd(_backward_sums, setup_context=_setup)
slopes_op.register_autograd(_backward_slopes, setup_context=_setup)
