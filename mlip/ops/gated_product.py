"""Gated products of functions on the sphere by compiled code, with first derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlip.ops.sphere_tables import SphereTables

Tables = Callable[[], SphereTables]


class Kernels(Protocol):
    """Compiled code of one grid for the device of the tensors."""

    def product(self, extra: int, gate: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Compute `gated_product`."""

    def slopes(
        self, extra: int, gate: Tensor, hidden: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Compute the gradients by gate and hidden tensors from those by the results."""


def gated_product(
    lmax: int,
    mmax: int,
    in_frame: bool,
    tables: Tables,
    extra: int,
    gate: Tensor,
    hidden: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Multiply the halves of the channels of functions on the sphere; first derivatives only.

    Args:
        lmax, mmax: degrees and orders.
        in_frame: coefficients are order-major, an array for each order; else degree-major in one.
        tables: makes the factors of the matrices to a grid and back; hashable.
        extra: numbers in front of the first tensor that are something else.
        gate: [N, h], factors of the product.
        hidden: contiguous [N, rows·2h], the first with ``extra``.

    Returns:
        For each array [N, rows, h].
    """
    return _Product.apply(_kernels(gate)(lmax, mmax, in_frame, tables, gate), extra, gate, *hidden)


def _kernels(gate: Tensor) -> Callable[..., Kernels]:
    """What makes the compiled code for the device of a tensor."""
    if gate.device.type == "cuda":
        from mlip.ops.cuda.gated_product import GridKernels as ForCuda

        return ForCuda
    from mlip.ops.cpu.sphere import GridKernels

    return GridKernels


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, extra: int, gate: Tensor, *hidden: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.kernels, ctx.extra = kernels, extra
        ctx.save_for_backward(gate, *hidden)
        return tuple(kernels.product(extra, gate, hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gate, *hidden = ctx.saved_tensors
        return None, None, *ctx.kernels.slopes(ctx.extra, gate, hidden, gradients)
