"""Constant float64 tables, converted once for each precision and device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def table_like(like: Tensor, build: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return ``build(*arguments)`` in the dtype and on the device of ``like``, cached.

    Tables are kept out of modules, so that converting a model to float32 and back cannot round
    them.

    Args:
        like: gives dtype and device.
        build: makes the float64 table on the CPU.
        arguments: hashable arguments of ``build``.
    """
    return _constant(build, arguments, like.dtype, like.device)


@torch.compiler.assume_constant_result
def _constant(
    build: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Keep compilers, which trace a model, out of what builds a table."""
    return _converted(build, arguments, dtype, device)


@lru_cache(maxsize=1024)
def _converted(
    build: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return build(*arguments).to(device=device, dtype=dtype)
