"""Equivariant graph attention of EquiformerV3 (arXiv 2604.09130) and what its layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlip.nn.attention_edges import AttentionEdges
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.grouped_attention import grouped_attention
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import SO3Linear, add_to_scalars
from mlip.nn.sphere_product import (
    SphereBasis,
    gate_by_degree,
    gated_product,
    swiglu_s2,
    swiglu_scalars,
)
from mlip.ops import (
    RotationSignature,
    by_groups,
    edge_sum,
    envelope_softmax,
    rotate_gather,
    rotate_scatter,
)


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
        self.rotation = RotationSignature(lmax, mmax)
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
        matrix, ends = edges.frames.matrix, torch.stack([edges.source, edges.target])
        pair = rotate_gather(self.rotation, x, matrix, self.radial_weights(edges), ends)
        hidden = self.linear_1(pair)
        alpha, scalars = self.invariants(hidden[0])
        message = self.messages(hidden, scalars, edges.frames.degrees)
        weights = self.weights(alpha, edges, x.shape[0])
        values = self.rows(self.linear_2(message))
        summed = rotate_scatter(self.rotation, values, matrix, weights, ends[1:], x.shape[0])
        return self.projection(summed * edges.frames.rescale[:, None])

    def radial_weights(self, edges: AttentionEdges) -> Tensor:
        """Compute the weights of both ends of edges in the frames: [E, lmax+1, 2C]."""
        radial = self.radial(edges.basis, edges.source_element, edges.target_element)
        return radial.view(-1, self.shape.sphere.lmax + 1, 2 * self.shape.channels)

    def invariants(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the output for m = 0 [E, …]: of the logits [E, H·A], of the activation [E, S]."""
        return first[:, : self.n_alpha], first[:, self.n_alpha : self.linear_1.extra]

    def messages(
        self, hidden: Sequence[Tensor], scalars: Tensor, degrees: Tensor, *, inference: bool = False
    ) -> list[Tensor]:
        """Activate the outputs of the first linear map.

        Args:
            hidden: for the orders 0, +1, −1, … [E, degrees·width], the first behind invariants.
            scalars: [E, S] invariants of the activation: S = L·hidden with gates, else 3·hidden.
            degrees: [n] degree of each coefficient in the frames.
            inference: allow compiled code that has first derivatives only.

        Returns:
            Of each order [E, degrees, hidden].
        """
        if inference and not self.gated:
            scalars, gate = swiglu_scalars(scalars)
            first, *rest = gated_product(self.shape.sphere, hidden, self.linear_1.extra, gate)
            return [add_to_scalars(first, scalars), *rest]
        joined = self._joined(hidden)
        if self.gated:
            message = gate_by_degree(joined, scalars, degrees)
        else:
            message = swiglu_s2(self.shape.sphere, joined, scalars)
        return list(message.split(self.rotation.sizes, dim=1))

    def weights(self, alpha: Tensor, edges: AttentionEdges, n_atoms: int) -> Tensor:
        """Compute the attention of values [E, 1, H·V] from invariants ``alpha`` [E, H·A].

        Targets of ``edges`` count up to ``n_atoms``.
        """
        shape = self.shape
        heads = alpha.reshape(-1, shape.heads, shape.alpha_channels)
        logits = (smooth_leaky_relu(self.alpha_norm(heads)) * self.alpha_dot).sum(2)
        weights = envelope_softmax(logits, edges.envelope, edges.target, n_atoms, shape.epsilon)
        weights = weights * edges.envelope[:, None]
        weights = nn.functional.dropout(weights, shape.dropout, self.training)
        return weights.repeat_interleave(shape.value_channels, dim=1)[:, None]

    def rows(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Separate degrees and channels of the second linear map: [E, degrees, heads·V]."""
        return tuple(part.unflatten(1, (-1, self.channels_summed)) for part in values)

    def _joined(self, hidden: Sequence[Tensor]) -> Tensor:
        """Put the orders together without the invariants: [E, n, width]."""
        parts = [hidden[0][:, self.linear_1.extra :], *hidden[1:]]
        return torch.cat(parts, dim=1).unflatten(1, (-1, self.linear_1.channels_out))


def smooth_leaky_relu(x: Tensor, slope: float = 0.2) -> Tensor:
    """Evaluate (1+a)/2 · x + (1−a)/2 · x · (2σ(x) − 1), a smooth leaky ReLU of slope a.

    It is a·x + (1−a)·silu(x). In the attention of arXiv 2604.09130 and arXiv 2507.01131; any shape.
    """
    return torch.lerp(nn.functional.silu(x), x, slope)


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
        return edge_sum(message, edges.target, n_atoms) / self.average_degree
