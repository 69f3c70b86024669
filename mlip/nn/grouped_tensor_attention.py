"""Tensor attention of inference: group by group of atoms, so that intermediates stay in cache.

Nothing but the inputs is kept for the backward pass, which computes the rest again. Weights are
constants and there is no second derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlip.nn.attention_edges import Group
from mlip.ops.shared_operator import add_to_ends, operator_gather, operator_slopes

if TYPE_CHECKING:
    from mlip.nn.tensor_attention import OperatorEdges, TensorAttention


def grouped_tensor_attention(layer: TensorAttention, x: Tensor, edges: OperatorEdges) -> Tensor:
    """Sum messages as ``layer`` does before its projection.

    Args:
        layer: gives weights and products.
        x: [2·N, K, C], what messages take of sources, then what they take of targets.
        edges: with groups.

    Returns:
        [N, K, C].
    """
    radial, operators = layer.radial.of_edges(edges), layer.operators(edges)
    return _GroupedAttention.apply(layer, edges, x, radial, edges.envelope, *operators)


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: TensorAttention, edges: OperatorEdges, x: Tensor, *inputs: Tensor
    ) -> Tensor:
        n_atoms = len(x) // 2
        ends = torch.stack([edges.source, edges.target + n_atoms])
        out = torch.empty_like(x[:n_atoms])
        groups = edges.groups or ()
        for group in groups:
            radial, envelope, first, second = _parts(inputs, group)
            weights = radial * envelope[:, None]
            message = operator_gather(x, first, weights, ends[:, group.edges])
            target = edges.target[group.edges] - group.first_atom
            out[group.atoms] = layer.sum_values(
                message, second, weights, envelope, target, group.n_atoms, inference=True
            )
        ctx.layer, ctx.groups = layer, groups
        ctx.save_for_backward(ends, x, *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ends, x, *inputs = ctx.saved_tensors
        of_x = torch.zeros_like(x)
        slopes = [torch.empty_like(tensor) for tensor in inputs]
        for group in ctx.groups:
            *own, of_first, of_second = _pull_back(
                ctx.layer, group, ends, x, _parts(inputs, group), gradient, of_x
            )
            shared = len(inputs) == 3  # one operator for both products
            own += [of_first.add_(of_second)] if shared else [of_first, of_second]
            for slope, part in zip(slopes, own, strict=True):
                slope[group.edges] = part
        return None, None, of_x, *slopes


def _parts(tensors: Any, group: Group) -> tuple[Tensor, ...]:
    """Take the edges of a group: radial weights, envelope and the operators of both products."""
    radial, envelope, *operators = (tensor[group.edges] for tensor in tensors)
    return radial, envelope, operators[0], operators[-1]


def _pull_back(
    layer: TensorAttention,
    group: Group,
    all_ends: Tensor,
    x: Tensor,
    inputs: tuple[Tensor, ...],
    gradient: Tensor,
    of_x: Tensor,
) -> tuple[Tensor, ...]:
    """Give the gradients of the inputs of one group; add those of features to ``of_x``."""
    radial, envelope, first, second = inputs
    weights = radial * envelope[:, None]
    ends = all_ends[:, group.edges]
    target = ends[1] - len(x) // 2 - group.first_atom
    message = operator_gather(x, first, weights, ends)
    late = _leaf(message), _leaf(second), _leaf(weights), _leaf(envelope)
    with torch.enable_grad():
        values = layer.sum_values(*late, target, group.n_atoms, inference=True)
    of_message, of_second, of_weights, of_envelope = torch.autograd.grad(
        values, late, gradient[group.atoms]
    )
    of_first, more = operator_slopes(x, of_message, first, weights, ends)
    add_to_ends(of_x, of_message, first.mT, weights, ends)
    of_weights = of_weights + more
    of_envelope = of_envelope + (of_weights * radial).sum(1)
    return of_weights * envelope[:, None], of_envelope, of_first, of_second


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
