"""Attention of inference: group by group of atoms, so that all but one intermediate stays in cache.

Only the output of the first SO(2) linear map, the dearest step, is kept for the backward pass; the
rest is computed again there. Weights are constants and there is no second derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlip.nn.attention_edges import AttentionEdges
from mlip.ops.rotation import add_slopes, add_to_ends, rotate_gather

if TYPE_CHECKING:
    from mlip.nn.graph_attention import EquivariantGraphAttention
    from mlip.nn.so2_linear import Matrices


def grouped_attention(layer: EquivariantGraphAttention, x: Tensor, edges: AttentionEdges) -> Tensor:
    """Sum messages as ``layer`` does before its projection: [N, K, heads·V]."""
    inputs = (x, edges.basis, edges.frames.matrix, edges.envelope)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _GroupedAttention.apply(layer, edges, keep, *inputs)


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: EquivariantGraphAttention,
        edges: AttentionEdges,
        keep: bool,
        x: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        edges = _replaced(edges, *(tensor.detach() for tensor in inputs))
        kept: list[Tensor] = []
        constants = layer.linear_1.constants(), layer.linear_2.constants()
        out = x.new_zeros(len(x), x.shape[1], layer.channels_summed)
        for group in edges.groups or ():
            part, ends = edges.part(group), edges.ends(group)
            matrix = part.frames.matrix
            pair = rotate_gather(layer.rotation, x, matrix, layer.radial_weights(part), ends)
            hidden = layer.linear_1.infer(pair, constants[0])
            alpha, scalars = layer.invariants(hidden[0])
            message = layer.messages(hidden, scalars, part.frames.degrees, inference=True)
            weights = layer.weights(alpha, part, group.n_atoms)
            values = layer.rows(layer.linear_2.infer(message, constants[1]))
            add_to_ends(layer.rotation, out, values, matrix, weights, ends[1:])
            if keep:
                kept.extend(hidden)
        ctx.layer, ctx.edges, ctx.constants = layer, edges, constants
        ctx.save_for_backward(x, *kept)
        return out.mul_(edges.frames.rescale[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        layer, edges, (first, second) = ctx.layer, ctx.edges, ctx.constants
        x, *kept = ctx.saved_tensors
        slopes = Slopes(
            torch.zeros_like(x),
            torch.empty_like(edges.basis),
            torch.zeros_like(edges.frames.matrix),
            torch.empty_like(edges.envelope),
        )
        gradient = gradient * edges.frames.rescale[:, None]
        n = len(kept) // max(len(edges.groups), 1)
        for i, group in enumerate(edges.groups):
            part, ends = edges.part(group), edges.ends(group)
            own = Slopes(slopes.x, *(tensor[group.edges] for tensor in slopes[1:]))
            hidden = kept[i * n : i * n + n]
            of_hidden = _late(layer, second, part, group.n_atoms, ends[1:], hidden, gradient, own)
            of_pair = layer.linear_1.pull_back(of_hidden, first)
            _early(layer, part, ends, x, of_pair, own)
        return None, None, None, *slopes


class Slopes(NamedTuple):
    """Gradients of features [N, K, C], radial functions, Wigner matrices and envelope."""

    x: Tensor
    basis: Tensor
    matrix: Tensor
    envelope: Tensor


def _late(
    layer: EquivariantGraphAttention,
    constants: list[Matrices],
    part: AttentionEdges,
    n_atoms: int,
    target: Tensor,
    hidden: list[Tensor],
    gradient: Tensor,
    slopes: Slopes,
) -> tuple[Tensor, ...]:
    """Go back from the sums over edges to the kept tensors, whose gradients are returned."""
    alpha, scalars, envelope, *hidden = leaves = [
        tensor.detach().requires_grad_()
        for tensor in (*layer.invariants(hidden[0]), part.envelope, *hidden)
    ]
    with torch.enable_grad():
        message = layer.messages(hidden, scalars, part.frames.degrees, inference=True)
        weights = layer.weights(alpha, part._replace(envelope=envelope), n_atoms)
    matrix, constant = part.frames.matrix, weights.detach()
    detached = [tensor.detach() for tensor in message]
    values = layer.rows(layer.linear_2.infer(detached, constants))
    of_weights = torch.zeros_like(constant)
    add_slopes(
        layer.rotation, gradient, values, matrix, constant, target, slopes.matrix, of_weights
    )
    of_values = rotate_gather(layer.rotation, gradient, matrix, constant, target)
    of_message = layer.linear_2.pull_back([tensor.flatten(1) for tensor in of_values], constants)
    of_alpha, of_scalars, of_envelope, *of_hidden = torch.autograd.grad(
        [*message, weights], leaves, [*of_message, of_weights]
    )
    slopes.envelope.copy_(of_envelope)
    for slope, own in zip(layer.invariants(of_hidden[0]), (of_alpha, of_scalars), strict=True):
        slope += own
    return tuple(of_hidden)


def _early(
    layer: EquivariantGraphAttention,
    part: AttentionEdges,
    ends: Tensor,
    x: Tensor,
    of_pair: list[Tensor],
    slopes: Slopes,
) -> None:
    """Go back from weighted pairs in the frames to features and radial functions."""
    basis, matrix = part.basis.detach().requires_grad_(), part.frames.matrix
    with torch.enable_grad():
        weights = layer.radial_weights(part._replace(basis=basis))
    constant = weights.detach()
    of_weights = torch.zeros_like(constant)
    add_slopes(layer.rotation, x, of_pair, matrix, constant, ends, slopes.matrix, of_weights)
    add_to_ends(layer.rotation, slopes.x, of_pair, matrix, constant, ends)
    slopes.basis.copy_(torch.autograd.grad(weights, basis, of_weights)[0])


def _replaced(
    edges: AttentionEdges, basis: Tensor, matrix: Tensor, envelope: Tensor
) -> AttentionEdges:
    """Take other tensors for what depends on positions; detached ones keep no graph alive."""
    frames = edges.frames._replace(matrix=matrix)
    return edges._replace(basis=basis, frames=frames, envelope=envelope)
