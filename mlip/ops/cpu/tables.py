"""Rows of piecewise cubic polynomials, by compiled loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array
from mlip.ops.cpu.runner import SERIAL


def table_values(table: Tensor, rows: Tensor, interval: Tensor, t: Tensor) -> Tensor:
    """Evaluate Σ_k table[rows, interval, k]·t^k: [E, n].

    Args:
        table: [P, intervals, 4, n] coefficients.
        rows: [E] first index, int64.
        interval: [E] second index.
        t: [E] place within the interval.
    """
    out = torch.empty(len(t), table.shape[3], dtype=table.dtype)
    _run(cache.loops().table_values, table, rows, interval, t, out.numpy())
    return out


def table_slopes(
    table: Tensor, rows: Tensor, interval: Tensor, t: Tensor, gradient: Tensor
) -> Tensor:
    """Compute the derivative of Σ gradient·`table_values` with respect to t: [E]."""
    out = torch.empty_like(t)
    _run(cache.loops().table_slopes, table, rows, interval, t, as_array(gradient), out.numpy())
    return out


def _run(loop: Any, table: Tensor, rows: Tensor, interval: Tensor, t: Tensor, *more: Any) -> None:
    call = partial(loop, *(as_array(x) for x in (table, rows, interval, t)), *more)
    threads.run_range(call, len(t), serial=len(t) * table.shape[3] < SERIAL)
