"""Gated linear map of TDN in inference: few passes over memory, and first derivatives only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu


def gated_values(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Map like ``GatedLinear``, and give l = 0 of the input as well.

    Args:
        x: [E, K, C], contiguous.
        weight: [2C, C], of values, then of gates; a constant.
        bias: [2C], a constant.

    Returns:
        l = 0 of ``x``, [E, C], and the values [E, K, C]. Derivatives are by ``x`` alone.
    """
    return _GatedValues.apply(x, weight, bias)


class _GatedValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        channels = x.shape[2]
        scalars = x[:, 0].contiguous()
        values = (x.flatten(0, 1) @ weight[:channels].T).view_as(x)
        first = values[:, 0] + bias[:channels]
        gates = linear(scalars, weight[channels:], bias[channels:]).sigmoid_()
        out = torch.empty_like(x)
        out[:, 0] = silu(first)
        torch.mul(values[:, 1:], gates[:, None], out=out[:, 1:])
        ctx.save_for_backward(values, first, gates, weight)
        return scalars, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scalars: Tensor, gradient: Tensor) -> tuple[Tensor, None, None]:
        values, first, gates, weight = ctx.saved_tensors
        channels = values.shape[2]
        slopes = torch.empty_like(values)
        slopes[:, 0] = torch.ops.aten.silu_backward(gradient[:, 0], first)
        torch.mul(gradient[:, 1:], gates[:, None], out=slopes[:, 1:])
        of_gates = (gradient[:, 1:] * values[:, 1:]).sum(1) * gates * (1 - gates)
        of_x = (slopes.flatten(0, 1) @ weight[:channels]).view_as(values)
        of_x[:, 0] += of_gates @ weight[channels:] + of_scalars
        return of_x, None, None
