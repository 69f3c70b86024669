"""Rotation into the frames of edges as PyTorch operators on the CPU.

``mlip::rotate_gather``, ``mlip::rotate_scatter`` and ``mlip::rotate_slopes`` are the derivatives of
the four-linear form of ``mlip.ops.rotation`` with respect to y, x and (D, s). Gathering and slopes
are divided over threads by edges, scattering by channels: results do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.backend import CHANNEL_BLOCK
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array, atoms_exist
from mlip.ops.cpu.memory import empty_for
from mlip.ops.cpu.runner import SERIAL
from mlip.ops.rotation import RotationSignature


@lru_cache(maxsize=64)
def _module(signature: RotationSignature, dtype: str, partial: bool) -> ModuleType:
    """Generate, or read from the cache, the code of a signature."""
    from mlip.ops.cpu.rotation_text import source_text

    name = f"rotation_l{signature.lmax}m{signature.mmax}_{dtype}"
    return cache.load(name, source_text(signature, dtype, partial))


class _Call:
    """Arguments that the three loops share, checked."""

    def __init__(
        self,
        signature: RotationSignature,
        x: Tensor,
        orders: Sequence[Tensor],
        matrix: Tensor,
        scale: Tensor,
        ends: Tensor,
    ) -> None:
        n_edges, n_ends = len(matrix), len(ends)
        self.channels = scale.shape[2] // n_ends
        check(signature, x, orders, matrix, scale, ends)
        partial = self.channels % CHANNEL_BLOCK[matrix.dtype] > 0
        self.module = _module(signature, str(matrix.dtype).removeprefix("torch."), partial)
        self.tensors = [x.contiguous(), matrix.contiguous(), scale.contiguous()]
        self.orders = [part.contiguous() for part in orders]
        self.ends = as_array(ends)
        self.n_edges = n_edges
        self.by_degree = 0 if scale.shape[1] == 1 else scale.shape[2]
        self.step = np.array([n * scale.shape[2] for n in signature.sizes], dtype=np.int64)
        self.serial = n_edges * n_ends * self.channels < SERIAL // 8

    def run(self, loop: Any, end: int, unit: int, *more: np.ndarray) -> None:
        """Call a loop for all of 0 … end − 1, cut at multiples of ``unit``."""
        arrays = [as_array(tensor).reshape(-1) for tensor in (*self.tensors, *self.orders)]
        call = partial(loop, *arrays, self.step, self.ends, self.channels, self.by_degree, *more)
        threads.run_range(call, end, serial=self.serial, unit=unit)


def gather(
    signature: RotationSignature, x: Tensor, matrix: Tensor, scale: Tensor, ends: Tensor
) -> list[Tensor]:
    """Compute ``rotate_gather`` without derivatives."""
    wide = scale.shape[2]
    orders = [empty_for(x, (len(matrix), n, wide)) for n in signature.sizes]
    call = _Call(signature, x, orders, matrix, scale, ends)
    call.run(call.module.gather, call.n_edges, 1)
    return orders


def scatter_add(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
) -> None:
    """Add ``rotate_scatter`` to contiguous x [N, K, C]."""
    call = _Call(signature, x, orders, matrix, scale, ends)
    call.run(call.module.scatter, call.channels, CHANNEL_BLOCK[x.dtype])


def slopes_add(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    of_matrix: Tensor,
    of_scale: Tensor,
) -> None:
    """Add ∂φ/∂D and ∂φ/∂s to contiguous tensors."""
    call = _Call(signature, x, orders, matrix, scale, ends)
    slopes = [tensor.numpy().reshape(-1) for tensor in (of_matrix, of_scale)]
    call.run(call.module.slopes, call.n_edges, 1, *slopes)


def check(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    on_cpu: bool = True,
) -> None:
    """Raise an error for what would make the compiled code read outside of its arrays.

    On other devices atoms are not looked at, which would make the processor wait.
    """
    n_edges, wide, n_coefficients = len(matrix), scale.shape[2], signature.n_coefficients
    width = wide // max(len(ends), 1)
    facts = {
        "x": x.shape[1:] == (n_coefficients, width),
        "orders": [part.shape for part in orders] == [(n_edges, n, wide) for n in signature.sizes],
        "matrix": matrix.shape == (n_edges, len(signature.degrees), n_coefficients),
        "scale": scale.shape in ((n_edges, signature.lmax + 1, wide), (n_edges, 1, wide)),
        "ends": ends.shape == (len(ends), n_edges) and (not on_cpu or atoms_exist(ends, len(x))),
        "number of channels": wide == width * len(ends),
        "precision": {tensor.dtype for tensor in (x, *orders, matrix, scale)} == {matrix.dtype},
        "index type": ends.dtype == torch.int64,
    }
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise InputError(
            f"{signature}, {n_edges} edges, {len(x)} atoms: {', '.join(wrong)} do not fit; "
            "expected the shapes of mlip.ops.rotate_gather, one precision, int64 atoms that exist"
        )


@torch.library.custom_op("mlip::rotate_gather", mutates_args=(), device_types="cpu")
def gather_op(
    x: Tensor, matrix: Tensor, scale: Tensor, ends: Tensor, lmax: int, mmax: int
) -> list[Tensor]:
    """Operator of ``rotate_gather``."""
    return gather(RotationSignature(lmax, mmax), x, matrix, scale, ends)


@torch.library.custom_op("mlip::rotate_scatter", mutates_args=(), device_types="cpu")
def scatter_op(
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    n_atoms: int,
    lmax: int,
    mmax: int,
) -> Tensor:
    """Operator of ``rotate_scatter``."""
    width = scale.shape[2] // len(ends)
    out = matrix.new_zeros(n_atoms, (lmax + 1) ** 2, width)
    scatter_add(RotationSignature(lmax, mmax), out, orders, matrix, scale, ends)
    return out


@torch.library.custom_op("mlip::rotate_slopes", mutates_args=(), device_types="cpu")
def slopes_op(
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    lmax: int,
    mmax: int,
) -> tuple[Tensor, Tensor]:
    """Operator of the gradients of matrices and scales."""
    found = matrix.new_zeros(matrix.shape), scale.new_zeros(scale.shape)
    slopes_add(RotationSignature(lmax, mmax), x, orders, matrix, scale, ends, *found)
    return found


@gather_op.register_fake
def _(
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,  # noqa: ARG001
    lmax: int,
    mmax: int,
) -> list[Tensor]:
    sizes = RotationSignature(lmax, mmax).sizes
    return [x.new_empty(matrix.shape[0], n, scale.shape[2]) for n in sizes]


@scatter_op.register_fake
def _(
    orders: Sequence[Tensor],  # noqa: ARG001
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    n_atoms: int,
    lmax: int,
    mmax: int,  # noqa: ARG001
) -> Tensor:
    return matrix.new_empty(n_atoms, (lmax + 1) ** 2, scale.shape[2] // ends.shape[0])


@slopes_op.register_fake
def _(
    x: Tensor,  # noqa: ARG001
    orders: Sequence[Tensor],  # noqa: ARG001
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,  # noqa: ARG001
    lmax: int,  # noqa: ARG001
    mmax: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape), scale.new_empty(scale.shape)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.lmax, ctx.mmax = inputs
    ctx.save_for_backward(*tensors)


def _backward_gather(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, matrix, scale, ends = ctx.saved_tensors
    degrees = (ctx.lmax, ctx.mmax)
    of_x = of_matrix = of_scale = None
    if ctx.needs_input_grad[0]:
        of_x = scatter_op(gradients, matrix, scale, ends, len(x), *degrees)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        of_matrix, of_scale = slopes_op(x, gradients, matrix, scale, ends, *degrees)
    return of_x, of_matrix, of_scale, None, None, None


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    orders, *tensors, _, ctx.lmax, ctx.mmax = inputs
    ctx.save_for_backward(*tensors, *orders)


def _backward_scatter(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    matrix, scale, ends, *orders = ctx.saved_tensors
    degrees = (ctx.lmax, ctx.mmax)
    of_orders = gather_op(gradient, matrix, scale, ends, *degrees)
    of_matrix = of_scale = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        of_matrix, of_scale = slopes_op(gradient, orders, matrix, scale, ends, *degrees)
    return of_orders, of_matrix, of_scale, None, None, None, None


def _setup_slopes(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    x, orders, matrix, scale, ends, ctx.lmax, ctx.mmax = inputs
    ctx.save_for_backward(x, matrix, scale, ends, *orders)


def _backward_slopes(ctx: Any, of_matrix: Tensor, of_scale: Tensor) -> tuple[Any, ...]:
    """Differentiate φ(x, y, D', s) + φ(x, y, D, s') for the cotangents D' and s'."""
    x, matrix, scale, ends, *orders = ctx.saved_tensors
    degrees = (ctx.lmax, ctx.mmax)
    sides = ((of_matrix, scale), (matrix, of_scale))
    of_x = sum(scatter_op(orders, d, s, ends, len(x), *degrees) for d, s in sides)
    pairs = zip(*(gather_op(x, d, s, ends, *degrees) for d, s in sides), strict=True)
    of_orders = [first + second for first, second in pairs]
    d, _ = slopes_op(x, orders, matrix, of_scale, ends, *degrees)
    _, s = slopes_op(x, orders, of_matrix, scale, ends, *degrees)
    return of_x, of_orders, d, s, None, None, None


gather_op.register_autograd(_backward_gather, setup_context=_setup_gather)
scatter_op.register_autograd(_backward_scatter, setup_context=_setup_scatter)
slopes_op.register_autograd(_backward_slopes, setup_context=_setup_slopes)
