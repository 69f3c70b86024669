"""Products with the matrices of edges as PyTorch operators on the CPU.

``mlip::operator_gather``, ``mlip::operator_scatter`` and ``mlip::operator_slopes`` are the
derivatives of the four-linear form of ``mlip.ops.shared_operator``, ``mlip::operator_apply`` the
product alone. Gathering and slopes are
divided over threads by edges, scattering by channels: results do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.backend import CHANNEL_BLOCK
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array, atoms_exist
from mlip.ops.cpu.memory import empty_for
from mlip.ops.cpu.runner import SERIAL
from mlip.ops.shared_operator import OperatorSignature

CACHE = 4 * 2**20  # bytes; larger results are written past the caches, which would not keep them


@lru_cache(maxsize=64)
def _module(
    signature: OperatorSignature, transposed: bool, dtype: str, partial: bool
) -> ModuleType:
    """Generate, or read from the cache, the code of a signature."""
    from mlip.ops.cpu.shared_operator_text import source_text

    size = f"{signature.rows}x{signature.columns}"
    name = f"operator_{size}_{signature.n_ends}{'t' * transposed}_{dtype}"
    return cache.load(name, source_text(signature, transposed, dtype, partial))


class _Call:
    """Arguments that the three loops share, checked. A transposed view of K is not copied."""

    def __init__(
        self, x: Tensor, y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor
    ) -> None:
        signature = OperatorSignature(operator.shape[1], operator.shape[2], len(ends))
        self.transposed = operator.mT.is_contiguous() and not operator.is_contiguous()
        dtype = str(operator.dtype).removeprefix("torch.")
        self.n_edges, self.channels = weights.shape
        self.whole = self.channels % CHANNEL_BLOCK[weights.dtype] == 0
        self.module = _module(signature, self.transposed, dtype, not self.whole)
        matrix = operator.mT if self.transposed else operator
        arrays = [as_array(tensor).reshape(-1) for tensor in (x, matrix, weights, y)]
        self.arguments = (*arrays, as_array(ends), self.channels)
        self.serial = self.n_edges * self.channels < SERIAL // 8

    def run(self, loop: Any, end: int, unit: int, *more: Any) -> None:
        """Call a loop for all of 0 … end − 1, cut at multiples of ``unit``."""
        call = partial(loop, *self.arguments, *more)
        threads.run_range(call, end, serial=self.serial, unit=unit)


def check(
    nodes: Tensor,
    operator: Tensor,
    weights: Tensor,
    ends: Tensor,
    given: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    on_cpu: bool = True,
) -> None:
    """Raise an error for what would make the compiled code read outside of its arrays.

    On other devices atoms are not looked at, which would make the processor wait.

    Args:
        nodes: [N, d, C].
        operator, weights, ends: of the operators.
        given: further names with a tensor and the shape that it must have.
    """
    n_edges = len(weights)
    facts = {
        "operator": operator.dim() == 3 and len(operator) == n_edges,
        "ends": ends.dim() == 2
        and len(ends) > 0
        and ends.shape[1] == n_edges
        and (not on_cpu or atoms_exist(ends, len(nodes))),
        "precision": {t.dtype for t in (nodes, operator, weights)} == {operator.dtype},
        "index type": ends.dtype == torch.int64,
    }
    for name, (tensor, shape) in given.items():
        facts[name] = tuple(tensor.shape) == shape and tensor.dtype == operator.dtype
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise InputError(
            f"shared operator, {n_edges} edges, {len(nodes)} atoms: {', '.join(wrong)} do not fit; "
            "expected the shapes of mlip.ops.operator_gather, one precision, int64 atoms that exist"
        )


def each(x: Tensor) -> Tensor:
    """Ends of edges whose features are the rows of x themselves, [1, E]."""
    return torch.arange(len(x), device=x.device)[None]


def scatter_add(x: Tensor, y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor) -> None:
    """Add ``operator_scatter`` to contiguous x [N, d3, C]."""
    n_edges, channels = weights.shape
    shapes = {
        "x": (x, (len(x), operator.shape[1], channels)),
        "y": (y, (n_edges, operator.shape[2], channels)),
    }
    check(x, operator, weights, ends, shapes)
    call = _Call(x, y, operator, weights, ends)
    call.run(call.module.scatter, call.channels, CHANNEL_BLOCK[x.dtype])


def gather(x: Tensor, operator: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Compute ``operator_gather`` without derivatives."""
    shape = (len(x), operator.shape[2], weights.shape[1])
    check(x, operator, weights, ends, {"x": (x, shape)})
    out = empty_for(x, (len(weights), operator.shape[1], weights.shape[1]))
    call = _Call(x, out, operator, weights, ends)
    streams = call.whole and out.nbytes > CACHE and out.data_ptr() % 64 == 0
    call.run(call.module.gather, call.n_edges, 1, streams)
    return out


def slopes(
    x: Tensor, y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ∂φ/∂K and ∂φ/∂w without derivatives; the first lies in memory as K does."""
    n_edges, channels = weights.shape
    shapes = {
        "x": (x, (len(x), operator.shape[2], channels)),
        "y": (y, (n_edges, operator.shape[1], channels)),
    }
    check(x, operator, weights, ends, shapes)
    call = _Call(x, y, operator, weights, ends)
    matrix = empty_for(operator, (operator.mT if call.transposed else operator).shape)
    of_weights = empty_for(weights, weights.shape)
    found = [tensor.numpy().reshape(-1) for tensor in (matrix, of_weights)]
    call.run(call.module.slopes, call.n_edges, 1, *found)
    return matrix.mT if call.transposed else matrix, of_weights


@torch.library.custom_op("mlip::operator_gather", mutates_args=(), device_types="cpu")
def gather_op(x: Tensor, operator: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Operator of ``operator_gather``."""
    return gather(x, operator, weights, ends)


@torch.library.custom_op("mlip::operator_apply", mutates_args=(), device_types="cpu")
def apply_op(x: Tensor, operator: Tensor, weights: Tensor) -> Tensor:
    """Operator of ``operator_apply``: nothing is added up, there or back."""
    return gather(x, operator, weights, each(x))


@torch.library.custom_op("mlip::operator_scatter", mutates_args=(), device_types="cpu")
def scatter_op(y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor, n_atoms: int) -> Tensor:
    """Operator of ``operator_scatter``."""
    out = y.new_zeros(n_atoms, operator.shape[1], weights.shape[1])
    scatter_add(out, y, operator, weights, ends)
    return out


@torch.library.custom_op("mlip::operator_slopes", mutates_args=(), device_types="cpu")
def slopes_op(
    x: Tensor, y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Operator of the gradients of matrices and weights."""
    return slopes(x, y, operator, weights, ends)


@apply_op.register_fake
def _(x: Tensor, operator: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(weights.shape[0], operator.shape[1], weights.shape[1])


@gather_op.register_fake
def _(x: Tensor, operator: Tensor, weights: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(weights.shape[0], operator.shape[1], weights.shape[1])


@scatter_op.register_fake
def _(
    y: Tensor,
    operator: Tensor,
    weights: Tensor,
    ends: Tensor,  # noqa: ARG001
    n_atoms: int,
) -> Tensor:
    return y.new_empty(n_atoms, operator.shape[1], weights.shape[1])


@slopes_op.register_fake
def _(
    x: Tensor,  # noqa: ARG001
    y: Tensor,  # noqa: ARG001
    operator: Tensor,
    weights: Tensor,
    ends: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(operator), weights.new_empty(weights.shape)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward_apply(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, operator, weights = ctx.saved_tensors
    of_x = of_operator = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = apply_op(gradient, operator.mT, weights)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        of_operator, of_weights = slopes_op(x, gradient, operator, weights, each(x))
    return of_x, of_operator, of_weights


def _backward_gather(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, operator, weights, ends = ctx.saved_tensors
    of_x = of_operator = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = scatter_op(gradient, operator.mT, weights, ends, len(x))
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        of_operator, of_weights = slopes_op(x, gradient, operator, weights, ends)
    return of_x, of_operator, of_weights, None


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:-1])


def _backward_scatter(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    y, operator, weights, ends = ctx.saved_tensors
    of_y = of_operator = of_weights = None
    if ctx.needs_input_grad[0]:
        of_y = gather_op(gradient, operator.mT, weights, ends)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        transposed, of_weights = slopes_op(gradient, y, operator.mT, weights, ends)
        of_operator = transposed.mT
    return of_y, of_operator, of_weights, None, None


def _setup_slopes(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward_slopes(ctx: Any, of_operator: Tensor, of_weights: Tensor) -> tuple[Any, ...]:
    """Differentiate φ(x, y, K', w) + φ(x, y, K, w') for the cotangents K' and w'."""
    x, y, operator, weights, ends = ctx.saved_tensors
    sides = ((of_operator, weights), (operator, of_weights))
    of_x = sum(scatter_op(y, k.mT, w, ends, len(x)) for k, w in sides)
    of_y = sum(gather_op(x, k, w, ends) for k, w in sides)
    k, _ = slopes_op(x, y, operator, of_weights, ends)
    _, w = slopes_op(x, y, of_operator, weights, ends)
    return of_x, of_y, k, w, None


apply_op.register_autograd(_backward_apply, setup_context=_setup_gather)
gather_op.register_autograd(_backward_gather, setup_context=_setup_gather)
scatter_op.register_autograd(_backward_scatter, setup_context=_setup_scatter)
slopes_op.register_autograd(_backward_slopes, setup_context=_setup_slopes)
