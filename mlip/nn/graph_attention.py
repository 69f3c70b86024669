"""Equivariant graph attention of EquiformerV3 (arXiv 2604.09130) and what its layers share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlip.nn.edge_frames import EdgeFrames
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import SO3Linear
from mlip.nn.sphere_product import SphereBasis, gate_by_degree, swiglu_s2
from mlip.ops import envelope_softmax, segment_sum


class AttentionEdges(NamedTuple):
    """What all layers know of the edges, sorted by target.

    source, target: [E] atoms. source_element, target_element: [E] rows of element tables.
    frames: rotations. basis: [E, R] radial functions. envelope: [E], 0 at the cutoff.
    """

    source: Tensor
    target: Tensor
    source_element: Tensor
    target_element: Tensor
    frames: EdgeFrames
    basis: Tensor
    envelope: Tensor


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
        self.linear_2 = SO2Linear(lmax, mmax, shape.hidden, shape.heads * shape.value_channels)
        if not self.gated:  # two scalar paths meet in l = 0
            with torch.no_grad():
                self.linear_2.axial.weight[:, : shape.hidden] /= math.sqrt(2)
        self.projection = SO3Linear(lmax, shape.heads * shape.value_channels, channels_out)

    def forward(self, x: Tensor, edges: AttentionEdges) -> Tensor:
        """Map features of atoms [N, K, channels] to [N, K, channels_out]."""
        message, logits = self._messages(x, edges)
        n_atoms = x.shape[0]
        weights = envelope_softmax(
            logits, edges.envelope, edges.target, n_atoms, self.shape.epsilon
        )
        weights = weights * edges.envelope[:, None]
        weights = nn.functional.dropout(weights, self.shape.dropout, self.training)
        heads = message.unflatten(2, (self.shape.heads, -1))  # [E, n, H, V]
        message = (heads * weights[:, None, :, None]).flatten(2)
        summed = segment_sum(edges.frames.rotate_back(message), edges.target, n_atoms)
        return self.projection(summed)

    def _messages(self, x: Tensor, edges: AttentionEdges) -> tuple[Tensor, Tensor]:
        """Compute values [E, n, H·V] in the frames of edges and logits [E, H]."""
        shape, frames = self.shape, edges.frames
        radial = self.radial(edges.basis, edges.source_element, edges.target_element)
        radial = radial.view(-1, shape.sphere.lmax + 1, 2 * shape.channels)
        pair = torch.cat([x.index_select(0, edges.source), x.index_select(0, edges.target)], dim=2)
        message = frames.rotate(pair) * radial.index_select(1, frames.degrees)  # [E, n, 2C]
        message, invariants = self.linear_1(message)
        alpha, scalars = invariants[:, : self.n_alpha], invariants[:, self.n_alpha :]
        if self.gated:
            message = gate_by_degree(message, scalars, frames.degrees)
        else:
            message = swiglu_s2(shape.sphere, message, scalars)
        values, _ = self.linear_2(message)
        return values, self._logits(alpha)

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
        radial = self.radial(edges.basis, edges.source_element, edges.target_element)
        radial = (radial * edges.envelope[:, None]).view(-1, self.lmax + 1, self.channels)
        message = edges.frames.rotate_back_axial(radial)
        return segment_sum(message, edges.target, n_atoms) / self.average_degree
