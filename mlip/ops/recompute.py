"""Functions evaluated group by group of rows, whose intermediates are computed again when needed.

What a group touches stays in the cache of a core, and nothing but the inputs is kept for the
backward pass. For inference: there is no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rows = tuple[slice, slice]


def by_groups(
    function: Callable[..., Tensor], groups: Sequence[Rows], n_rows: int, *inputs: Tensor
) -> Tensor:
    """Evaluate ``function`` on slices of its inputs and put the results together.

    Args:
        function: called with the number of the group and the slices; returns the rows of the group.
            Only ``inputs`` may carry gradients: everything else is a constant.
        groups: rows of the result, which they cover without gaps, and rows of the inputs.
        n_rows: rows of the result.
        inputs: [E, ...] tensors, cut alike.

    Returns:
        [n_rows, ...].
    """
    if not groups:
        return function(0, *inputs)
    return _ByGroups.apply(function, groups, n_rows, *inputs)


class _ByGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        groups: Sequence[Rows],
        n_rows: int,
        *inputs: Tensor,
    ) -> Tensor:
        out = torch.empty(0)
        for i, (to, of) in enumerate(groups):
            rows = function(i, *(tensor[of] for tensor in inputs))
            if i == 0:
                out = rows.new_empty(n_rows, *rows.shape[1:])
            out[to] = rows
        ctx.function, ctx.groups = function, groups
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        found: list[Tensor | None] = [None] * len(inputs)
        for i in wanted:
            found[i] = torch.empty_like(inputs[i])
        for i, (to, of) in enumerate(ctx.groups):
            parts = [tensor[of].detach() for tensor in inputs]
            leaves = [parts[j].requires_grad_() for j in wanted]
            with torch.enable_grad():
                rows = ctx.function(i, *parts)
            for j, own in zip(wanted, torch.autograd.grad(rows, leaves, gradient[to]), strict=True):
                found[j][of] = own  # type: ignore[index]
        return None, None, None, *found
