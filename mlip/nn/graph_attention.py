"""Equivariant graph attention of EquiformerV3 (arXiv 2604.09130) and what its layers share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlip.nn.attention_edges import AttentionEdges
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.grouped_attention import grouped_attention
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import SO3Linear
from mlip.nn.sphere_product import SphereBasis, gate_by_degree, swiglu_s2
from mlip.ops import by_groups, envelope_softmax, segment_sum


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention layer.

    sphere: degrees, orders and grid in the frame of an edge. channels: of the input. hidden: of
    the messages between their two linear maps. alpha_channels, value_channels: of one head.
    """

    sphere: SphereBasis
    channels: int
    hidden: int
    heads: int
    alpha_channels: int
    value_channels: int
    n_elements: int
    n_radial: int
    edge_channels: int
    epsilon: float = 1e-16
    dropout: float = 0.0


class EquivariantGraphAttention(nn.Module):
    """Sum messages of neighbours with attention weights that vanish at the cutoff.

    A message is made in the frame of its edge: features of source and target, weighted by the
    radial MLP, SO(2) linear, activation, SO(2) linear; invariants of the first linear map give the
    logits of the heads.

    Args:
        shape: sizes.
        channels_out: of the output.
        activation: "swiglu_s2", or "gate" as the force head has it.
    """

    def __init__(
        self, shape: AttentionShape, channels_out: int, activation: str = "swiglu_s2"
    ) -> None:
        super().__init__()
        lmax, mmax = shape.sphere.lmax, shape.sphere.mmax
        self.shape, self.gated = shape, activation == "gate"
        bound = 1 / math.sqrt(shape.alpha_channels)
        self.alpha_dot = nn.Parameter(
            torch.empty(shape.heads, shape.alpha_channels).uniform_(-bound, bound)
        )
        self.radial = EdgeRadialMLP(
            shape.n_elements, shape.n_radial, shape.edge_channels, 2 * shape.channels * (lmax + 1)
        )
        self.n_alpha = shape.heads * shape.alpha_channels
        n_scalars = lmax * shape.hidden if self.gated else 3 * shape.hidden
        width = shape.hidden if self.gated else 2 * shape.hidden
        extra = self.n_alpha + n_scalars
        self.linear_1 = SO2Linear(lmax, mmax, 2 * shape.channels, width, extra)
        self.alpha_norm = nn.LayerNorm(shape.alpha_channels)
        self.channels_summed = shape.heads * shape.value_channels
        self.linear_2 = SO2Linear(lmax, mmax, shape.hidden, self.channels_summed)
        if not self.gated:  # two scalar paths meet in l = 0
            with torch.no_grad():
                self.linear_2.axial.weight[:, : shape.hidden] /= math.sqrt(2)
        self.projection = SO3Linear(lmax, self.channels_summed, channels_out)

    def forward(self, x: Tensor, edges: AttentionEdges) -> Tensor:
        """Map features of atoms [N, K, channels] to [N, K, channels_out]."""
        if edges.groups is not None:
            return self.projection(grouped_attention(self, x, edges))
        weighed = edges.frames.rotate(self.pair(x, x, edges)) * self.radial_weights(edges)
        message, invariants = self.linear_1(weighed)
        values = self.values(message, invariants, edges, x.shape[0])
        summed = segment_sum(edges.frames.rotate_back(values), edges.target, x.shape[0])
        return self.projection(summed)

    def pair(self, x: Tensor, own: Tensor, edges: AttentionEdges) -> Tensor:
        """Put features of sources, rows of x, beside those of targets, rows of own: [E, K, 2C]."""
        of_source, of_target = x.index_select(0, edges.source), own.index_select(0, edges.target)
        return torch.cat([of_source, of_target], dim=2)

    def radial_weights(self, edges: AttentionEdges) -> Tensor:
        """Compute the weights of pairs in the frames, equal for all orders: [E, n, 2C]."""
        lmax, mmax = self.shape.sphere.lmax, self.shape.sphere.mmax
        radial = self.radial(edges.basis, edges.source_element, edges.target_element)
        radial = radial.view(-1, lmax + 1, 2 * self.shape.channels)
        orders = [radial[:, order:] for order in range(1, mmax + 1)]
        return torch.cat([radial, *(part for order in orders for part in (order, order))], dim=1)

    def values(
        self, message: Tensor, invariants: Tensor, edges: AttentionEdges, n_atoms: int
    ) -> Tensor:
        """Activate messages and weight them by attention: [E, n, heads·V], in the frames."""
        shape = self.shape
        alpha, scalars = invariants[:, : self.n_alpha], invariants[:, self.n_alpha :]
        if self.gated:
            message = gate_by_degree(message, scalars, edges.frames.degrees)
        else:
            message = swiglu_s2(shape.sphere, message, scalars)
        values, _ = self.linear_2(message)
        weights = envelope_softmax(
            self._logits(alpha), edges.envelope, edges.target, n_atoms, shape.epsilon
        )
        weights = weights * edges.envelope[:, None]
        weights = nn.functional.dropout(weights, shape.dropout, self.training)
        heads = values.unflatten(2, (shape.heads, -1))  # [E, n, H, V]
        return (heads * weights[:, None, :, None]).flatten(2)

    def _logits(self, alpha: Tensor) -> Tensor:
        """Normalise, activate and contract invariants [E, H·A] to logits [E, H]."""
        heads = alpha.reshape(-1, self.shape.heads, self.shape.alpha_channels)
        return (smooth_leaky_relu(self.alpha_norm(heads)) * self.alpha_dot).sum(2)


def smooth_leaky_relu(x: Tensor, slope: float = 0.2) -> Tensor:
    """Evaluate (1+a)/2 · x + (1−a)/2 · x · (2σ(x) − 1), a smooth leaky ReLU of slope a."""
    return (1 + slope) / 2 * x + (1 - slope) / 2 * x * (2 * torch.sigmoid(x) - 1)


class EdgeDegreeEmbedding(nn.Module):
    """Begin with what each atom sees of its neighbours' elements and distances."""

    def __init__(self, shape: AttentionShape, average_degree: float) -> None:
        super().__init__()
        self.lmax, self.channels = shape.sphere.lmax, shape.channels
        self.average_degree = average_degree
        self.radial = EdgeRadialMLP(
            shape.n_elements,
            shape.n_radial,
            shape.edge_channels,
            shape.channels * (self.lmax + 1),
        )

    def forward(self, edges: AttentionEdges, n_atoms: int) -> Tensor:
        """Sum axial functions of the edges of each atom: [N, K, channels]."""
        inputs = (edges.basis, edges.frames.matrix, edges.envelope)
        if edges.groups is None:
            return self._sum(edges, n_atoms, *inputs)
        groups = edges.groups

        def group(i: int, *parts: Tensor) -> Tensor:
            return self._sum(edges.part(groups[i]), groups[i].n_atoms, *parts)

        rows = [(each.atoms, each.edges) for each in groups]
        return by_groups(group, rows, n_atoms, *inputs)

    def _sum(
        self, edges: AttentionEdges, n_atoms: int, basis: Tensor, matrix: Tensor, envelope: Tensor
    ) -> Tensor:
        radial = self.radial(basis, edges.source_element, edges.target_element)
        radial = (radial * envelope[:, None]).view(-1, self.lmax + 1, self.channels)
        message = edges.frames._replace(matrix=matrix).rotate_back_axial(radial)
        return segment_sum(message, edges.target, n_atoms) / self.average_degree
