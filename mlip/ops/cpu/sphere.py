"""Gated products of functions on the sphere by compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array
from mlip.ops.cpu.runner import SERIAL

Grid = Callable[[], tuple[Tensor, Tensor]]


@lru_cache(maxsize=64)
def _module(lmax: int, mmax: int, in_frame: bool, grid: Grid, dtype: str) -> ModuleType:
    """Generate, or read from the cache, the code of a grid."""
    from mlip.ops.cpu.sphere_text import factorise, source_text

    text = source_text(factorise(*grid(), lmax, mmax), lmax, mmax, in_frame, dtype)
    return cache.load(f"sphere_l{lmax}m{mmax}_{dtype}", text)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, extra: int, gate: Tensor, *hidden: Tensor
    ) -> tuple[Tensor, ...]:
        sizes, width = module.ROWS, gate.shape[1]
        out = tuple(gate.new_empty(len(gate), n, width) for n in sizes)
        ctx.module, ctx.extra = module, extra
        ctx.save_for_backward(gate, *hidden)
        _run(module.product, module.ROWS, extra, gate, hidden, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gate, *hidden = ctx.saved_tensors
        found = [torch.empty_like(gate), *(torch.empty_like(tensor) for tensor in hidden)]
        found[1][:, : ctx.extra] = 0
        more = [tensor.numpy().reshape(-1) for tensor in (*found[1:], found[0])]
        _run(ctx.module.gradient, ctx.module.ROWS, ctx.extra, gate, hidden, gradients, *more)
        return None, None, *found


def _run(
    loop: Any,
    sizes: tuple[int, ...],
    extra: int,
    gate: Tensor,
    hidden: Sequence[Tensor],
    products: Sequence[Tensor],
    *more: np.ndarray,
) -> None:
    n_edges, width = gate.shape
    first = np.array([extra, *(0 for _ in sizes[1:])], dtype=np.int64)
    step = first + 2 * width * np.array(sizes, dtype=np.int64)
    arrays = [[as_array(tensor).reshape(-1) for tensor in part] for part in (hidden, products)]
    call = partial(loop, *arrays[0], first, step, as_array(gate).reshape(-1), *arrays[1], width)
    threads.run_range(partial(call, *more), n_edges, serial=n_edges * width < SERIAL // 16)


def sphere_product(
    lmax: int,
    mmax: int,
    in_frame: bool,
    grid: Grid,
    extra: int,
    gate: Tensor,
    hidden: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Multiply the halves of the channels of functions on the sphere; first derivatives only.

    Args:
        lmax, mmax: degrees and orders.
        in_frame: coefficients are order-major, an array for each order; else degree-major in one.
        grid: makes the matrices to the smallest exact grid and back, order-major; hashable.
        extra: numbers in front of the first tensor that are something else.
        gate: [N, h], factors of the product; h a multiple of 16 (float64: 8).
        hidden: contiguous [N, rows·2h], the first with ``extra``.

    Returns:
        For each array [N, rows, h].
    """
    dtype = str(gate.dtype).removeprefix("torch.")
    return _Product.apply(_module(lmax, mmax, in_frame, grid, dtype), extra, gate, *hidden)
