"""Sums and softmax over the edges of each atom, by CPU kernels; edges are sorted by atom.

Each atom is summed by one thread in the order of its edges: bit for bit the same every time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array
from mlip.ops.cpu.runner import SERIAL, node_bounds, over_nodes


def _run(call: Any, rowptr: Any, size: int) -> None:
    parts = 1 if size < SERIAL else 4 * threads.available_threads()
    threads.run(over_nodes(call, node_bounds(rowptr, parts)))


@torch.library.custom_op("mlip::segment_sum", mutates_args=(), device_types="cpu")
def csr_segment_sum(values: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:
    """Sum consecutive rows.

    Args:
        values: [E, ...], float32 or float64.
        index: [E] segment of each row, ascending, int64.
        rowptr: [N + 1] first row of each segment, and E.

    Returns:
        [N, ...].
    """
    n_segments = len(rowptr) - 1
    out = values.new_empty((n_segments, *values.shape[1:]))
    if not values.numel():
        return out.zero_()
    rows, pointers = as_array(values).reshape(len(index), -1), as_array(rowptr)
    sums = out.numpy().reshape(n_segments, -1)
    _run(partial(cache.loops().segment_sum, rows, pointers, sums), pointers, rows.size)
    return out


@csr_segment_sum.register_fake
def _(values: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:  # noqa: ARG001
    return values.new_empty((rowptr.shape[0] - 1, *values.shape[1:]))


def _setup_sum(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    index, rowptr = ctx.saved_tensors
    return segment_rows(gradient, index, rowptr), None, None


csr_segment_sum.register_autograd(_backward_sum, setup_context=_setup_sum)


@torch.library.custom_op("mlip::segment_rows", mutates_args=(), device_types="cpu")
def segment_rows(values: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:  # noqa: ARG001
    """Repeat the row of each segment: the transpose of ``csr_segment_sum``.

    Args:
        values: [N, ...].
        index: [E] segment of each row of the result, ascending, int64.
        rowptr: [N + 1] first row of each segment, and E.

    Returns:
        [E, ...].
    """
    return values.index_select(0, index)


@segment_rows.register_fake
def _(values: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:  # noqa: ARG001
    return values.new_empty((index.shape[0], *values.shape[1:]))


def _backward_rows(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    index, rowptr = ctx.saved_tensors
    return csr_segment_sum(gradient, index, rowptr), None, None


segment_rows.register_autograd(_backward_rows, setup_context=_setup_sum)


@torch.library.custom_op("mlip::segment_shares", mutates_args=(), device_types="cpu")
def segment_shares(
    logits: Tensor,
    weights: Tensor,
    index: Tensor,  # noqa: ARG001
    rowptr: Tensor,
    epsilon: float,
) -> Tensor:
    """s = exp(z − z_max) / (Σ w·exp(z − z_max) + ε); see ``csr_segment_softmax``."""
    out = torch.empty(logits.shape, dtype=logits.dtype)
    pointers, z = as_array(rowptr), as_array(logits)
    call = partial(
        cache.loops().segment_shares, z, as_array(weights), pointers, z.dtype.type(epsilon),
        out.numpy(),
    )  # fmt: skip
    if z.size:
        _run(call, pointers, z.size)
    return out


@segment_shares.register_fake
def _(
    logits: Tensor,
    weights: Tensor,  # noqa: ARG001
    index: Tensor,  # noqa: ARG001
    rowptr: Tensor,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_shares(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4], output)


def _backward_shares(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    """With T = Σ G·s of the segment: ∂/∂z = s·(G − w·T), ∂/∂w = −s·T."""
    weights, index, rowptr, share = ctx.saved_tensors
    total = segment_rows(csr_segment_sum(gradient * share, index, rowptr), index, rowptr)
    by_logit = share * (gradient - weights[:, None] * total)
    return by_logit, -(share * total).sum(1), None, None, None


segment_shares.register_autograd(_backward_shares, setup_context=_setup_shares)


def csr_segment_softmax(
    logits: Tensor, weights: Tensor, index: Tensor, rowptr: Tensor, epsilon: float
) -> Tensor:
    """Normalise w·exp(z) over consecutive rows, as ``mlip.ops.envelope_softmax`` does.

    a = w·exp(z − z_max) / (Σ w·exp(z − z_max) + ε), z_max the largest z of the segment and a
    constant for derivatives.

    Args:
        logits: z, [E, H], float32 or float64.
        weights: w, [E].
        index: [E] segment of each row, ascending, int64.
        rowptr: [N + 1] first row of each segment, and E.
        epsilon: ε ≥ 0.

    Returns:
        [E, H].
    """
    return weights[:, None] * segment_shares(logits, weights, index, rowptr, epsilon)
