"""Gated products of functions on the sphere by compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.ops.backend import CHANNEL_BLOCK
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array
from mlip.ops.cpu.runner import SERIAL
from mlip.ops.gated_product import Tables


@lru_cache(maxsize=64)
def _module(
    lmax: int, mmax: int, in_frame: bool, tables: Tables, dtype: str, partial: bool
) -> ModuleType:
    """Generate, or read from the cache, the code of a grid."""
    from mlip.ops.cpu.sphere_text import source_text

    text = source_text(tables(), lmax, mmax, in_frame, dtype, partial)
    return cache.load(f"sphere_l{lmax}m{mmax}_{dtype}", text)


class GridKernels:
    """Kernels of ``mlip.ops.gated_product`` for one grid and the precision of the gate."""

    def __init__(self, lmax: int, mmax: int, in_frame: bool, tables: Tables, gate: Tensor) -> None:
        dtype = str(gate.dtype).removeprefix("torch.")
        partial = gate.shape[1] % CHANNEL_BLOCK[gate.dtype] > 0
        self.module = _module(lmax, mmax, in_frame, tables, dtype, partial)

    def product(self, extra: int, gate: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Compute the products [N, rows, h]."""
        out = [gate.new_empty(len(gate), n, gate.shape[1]) for n in self.module.ROWS]
        _run(self.module.product, self.module.ROWS, extra, gate, hidden, out)
        return out

    def slopes(
        self, extra: int, gate: Tensor, hidden: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Compute the gradients by gate and hidden tensors."""
        found = [torch.empty_like(gate), *(torch.empty_like(tensor) for tensor in hidden)]
        found[1][:, :extra] = 0
        more = [tensor.numpy().reshape(-1) for tensor in (*found[1:], found[0])]
        _run(self.module.gradient, self.module.ROWS, extra, gate, hidden, gradients, *more)
        return found


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
