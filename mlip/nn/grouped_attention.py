"""Attention of inference: group by group of atoms, so that all but one intermediate stays in cache.

Only the output of the first SO(2) linear map, the dearest step, is kept for the backward pass; the
rest is computed again there. Weights are constants and there is no second derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlip.nn.attention_edges import AttentionEdges
from mlip.ops import segment_sum

if TYPE_CHECKING:
    from mlip.nn.graph_attention import EquivariantGraphAttention


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
        matrices = layer.linear_1.matrices()
        kept: list[Tensor] = []
        out = x.new_empty(len(x), x.shape[1], layer.channels_summed)
        for group in edges.groups or ():
            part = edges.part(group)
            pair = layer.pair(x, x[group.atoms], part)
            weighed = part.frames.rotate(pair).mul_(layer.radial_weights(part))
            hidden = layer.linear_1.mix(weighed, matrices)
            back = part.frames.rotate_back(layer.values(*hidden, part, group.n_atoms))
            out[group.atoms] = segment_sum(back, part.target, group.n_atoms)
            if keep:
                kept.extend(tensor.contiguous() for tensor in hidden)
        ctx.layer, ctx.edges, ctx.matrices = layer, edges, matrices
        ctx.save_for_backward(x, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        layer, edges = ctx.layer, ctx.edges
        x, *kept = ctx.saved_tensors
        of_x = torch.zeros_like(x)
        of_inputs = [torch.empty_like(tensor) for tensor in _inputs(edges)]
        gradient = gradient * edges.frames.rescale[:, None]
        for i, group in enumerate(edges.groups):
            part = edges.part(group)
            late = _values_backward(layer, part, kept[2 * i : 2 * i + 2], gradient[group.atoms])
            of_hidden, of_matrix, of_envelope = late
            of_weighed = layer.linear_1.pull_back(*of_hidden, ctx.matrices)
            pair = layer.pair(x, x[group.atoms], part)
            of_pair, of_basis = _weighed_backward(layer, part, pair, of_weighed, of_matrix)
            for total, own in zip(of_inputs, (of_basis, of_matrix, of_envelope), strict=True):
                total[group.edges] = own
            of_x.index_add_(0, part.source, of_pair[0])
            of_x[group.atoms].index_add_(0, part.target, of_pair[1])
        return None, None, None, of_x, *of_inputs


def _values_backward(
    layer: EquivariantGraphAttention, part: AttentionEdges, hidden: list[Tensor], gradient: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Go back from sums over edges (scaled, in the frame of the crystal) to the kept tensors.

    Returns:
        Gradients of the outputs of the first linear map, of the Wigner matrices and the envelope.
    """
    message, invariants, envelope = leaves = [
        tensor.detach().requires_grad_() for tensor in (*hidden, part.envelope)
    ]
    with torch.enable_grad():
        values = layer.values(message, invariants, part._replace(envelope=envelope), len(gradient))
    of_back = gradient.index_select(0, part.target)
    of_values = part.frames.rotate(of_back)
    of_message, of_invariants, of_envelope = torch.autograd.grad(values, leaves, of_values)
    return (of_message, of_invariants), values.detach() @ of_back.mT, of_envelope


def _weighed_backward(
    layer: EquivariantGraphAttention,
    part: AttentionEdges,
    pair: Tensor,
    gradient: Tensor,
    of_matrix: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Go back from weighted pairs in the frames to sources, targets and radial basis functions.

    Adds the gradient of the Wigner matrices to ``of_matrix``.
    """
    basis = part.basis.detach().requires_grad_()
    with torch.enable_grad():
        weights = layer.radial_weights(part._replace(basis=basis))
    of_weights = gradient * part.frames.rotate(pair)
    (of_basis,) = torch.autograd.grad(weights, basis, of_weights)
    of_local = gradient.mul_(weights.detach())
    of_matrix.baddbmm_(of_local, pair.mT)
    back = part.frames.matrix.mT
    return [back @ end for end in of_local.chunk(2, dim=2)], of_basis  # contiguous: fast to sum


def _inputs(edges: AttentionEdges) -> tuple[Tensor, Tensor, Tensor]:
    """List what depends on the positions of atoms."""
    return edges.basis, edges.frames.matrix, edges.envelope


def _replaced(
    edges: AttentionEdges, basis: Tensor, matrix: Tensor, envelope: Tensor
) -> AttentionEdges:
    """Take other tensors for what depends on positions; detached ones keep no graph alive."""
    frames = edges.frames._replace(matrix=matrix)
    return edges._replace(basis=basis, frames=frames, envelope=envelope)
