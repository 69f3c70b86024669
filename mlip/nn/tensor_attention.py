"""Layers of the Tensor Decomposition Network (arXiv 2507.01131) on features [N, (L+1)², C].

Every linear map has one matrix for all degrees; every product with the harmonics of an edge has one
radial weight for each channel, so that it is one matrix K(edge) on the coefficients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlip.nn.attention_edges import Group
from mlip.nn.gated_values import gated_values
from mlip.nn.graph_attention import smooth_leaky_relu
from mlip.nn.grouped_tensor_attention import grouped_tensor_attention
from mlip.nn.so3_layers import split_by_degree
from mlip.ops import by_groups, edge_sum, envelope_softmax, operator_gather, operator_scatter
from mlip.ops.pairs import Pairs, of_all_edges
from mlip.ops.tensor_products import Factors
from mlip.ops.tensor_products.coupling import operator_table, tensor_operator
from mlip.ops.tensor_products.factors import NAMES
from mlip.ops.tensor_products.solver import reconstruct

ROWS_AT_A_TIME = 1024  # of radial networks in inference: hidden layers then stay in cache


class OperatorEdges(NamedTuple):
    """What all layers know of the edges, sorted by target.

    source, target: [E] atoms. basis: [E, R] radial functions, or [P, R] of pairs of opposite edges.
    envelope: [E], 0 at the cutoff, or 1. harmonics: [E, K]. operator: K of the exact product,
    [E, K, K], or None. pairs: None if the basis is that of edges.
    groups: if layers shall go through the edges group by group and recompute in the backward pass.
        Weights are then constants and second derivatives are not defined.
    """

    source: Tensor
    target: Tensor
    basis: Tensor
    envelope: Tensor
    harmonics: Tensor
    operator: Tensor | None
    groups: tuple[Group, ...] | None = None
    pairs: Pairs | None = None


class SharedLinear(nn.Module):
    """Mix channels with one matrix for all degrees; the bias is added to l = 0."""

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels_in)
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in).uniform_(-bound, bound))
        values = torch.empty(channels_out).uniform_(-bound, bound)
        self.bias = nn.Parameter(values) if bias else None

    def forward(self, x: Tensor, amount: Tensor | None = None) -> Tensor:
        """Map [N, K, C_in] to [N, K, C_out]; ``amount`` [N] multiplies the bias."""
        mixed = x @ self.weight.T
        if self.bias is None:
            return mixed
        bias = self.bias if amount is None else amount[:, None, None] * self.bias
        scalars, rest = first_and_rest(mixed)
        return torch.cat([scalars + bias, rest], dim=1)

    def scalars(self, x: Tensor) -> Tensor:
        """Map l = 0 alone, [N, C_in] to [N, C_out]."""
        return nn.functional.linear(x, self.weight, self.bias)


class DegreeNorm(nn.Module):
    """Divide each degree by its own root mean square, l = 0 centred over channels first.

    Where features of a degree vanish by symmetry, the least displacement brings them to full size:
    as published, but nothing for vibrations.
    """

    def __init__(self, lmax: int, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.lmax, self.epsilon = lmax, epsilon
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, K, C] to the same shape."""
        scalars, *rest = split_by_degree(x, self.lmax)
        parts = [scalars - scalars.mean(dim=2, keepdim=True), *rest]
        normal = []
        for part, weight in zip(parts, self.weight, strict=True):
            square = part.square().mean(dim=(1, 2), keepdim=True)
            normal.append(part * (square + self.epsilon).rsqrt() * weight)
        normal[0] = normal[0] + self.bias
        return torch.cat(normal, dim=1)


class LearnedGaussians(nn.Module):
    """Normalised Gaussians of a linear function of distance / cutoff, all of it learnable."""

    def __init__(self, n: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.mean = nn.Parameter(torch.empty(n).uniform_(0.0, 1.0))
        self.std = nn.Parameter(torch.empty(n).uniform_(1.0 / n, 1.0))
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, distance: Tensor) -> Tensor:
        """Map [E] distances (Å) to [E, n]."""
        position = self.weight * (distance[:, None] / self.cutoff) + self.bias
        width = self.std.abs() + 1e-5
        height = 1 / (math.sqrt(2 * math.pi) * width)
        return height * torch.exp(-0.5 * ((position - self.mean) / width).square())


class RadialMLP(nn.Module):
    """Layers of linear map, layer norm and SiLU, then a linear map, from [E, R] to [E, C]."""

    def __init__(self, n_radial: int, hidden: tuple[int, ...], channels: int) -> None:
        super().__init__()
        widths = [n_radial, *hidden]
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in hidden)
        self.last = nn.Linear(widths[-1], channels)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the weights of the channels."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nn.functional.silu(norm(layer(x)))
        return self.last(x)

    def of_edges(self, edges: OperatorEdges) -> Tensor:
        """Evaluate the weights of all edges [E, C]: of opposite ones, once for both."""
        n, basis = len(edges.basis), edges.basis
        if edges.groups:
            firsts = range(0, n, ROWS_AT_A_TIME)
            rows = [slice(first, min(first + ROWS_AT_A_TIME, n)) for first in firsts]
            found = by_groups(lambda _, part: self(part), [(r, r) for r in rows], n, basis)
        else:
            found = self(basis)
        return found if edges.pairs is None else of_all_edges(found, edges.pairs)


class FactorOperator(nn.Module):
    """The operator of low-rank factors, kept with the weights: a model needs its own ones."""

    cp_a: Tensor
    cp_b: Tensor
    cp_c: Tensor

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        super().__init__()
        for name, factor in zip(NAMES, factors, strict=True):
            self.register_buffer(name, factor.to(dtype, copy=True))  # each product its own

    def forward(self, harmonics: Tensor) -> Tensor:
        """Build C diag(Bᵀ y) Aᵀ: [E, K] → [E, K, K]."""
        tensor = reconstruct((self.cp_a, self.cp_b, self.cp_c))  # first: no edge then sees a rank
        return tensor_operator(operator_table(tensor), harmonics)


class DegreeEmbedding(nn.Module):
    """Begin with what each atom sees of the distances and directions of its neighbours."""

    def __init__(
        self, radial: RadialMLP, channels: int, factors: Factors | None, scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.expand = SharedLinear(channels, channels)
        self.radial = radial
        dtype = self.expand.weight.dtype
        self.operator = None if factors is None else FactorOperator(factors, dtype)
        self.projection = SharedLinear(channels, channels)

    def forward(self, edges: OperatorEdges, n_atoms: int) -> Tensor:
        """Sum products of one learnt scalar feature with the harmonics: [N, K, C]."""
        operator = edges.operator if self.operator is None else self.operator(edges.harmonics)
        assert operator is not None
        column = operator[:, :, :1]  # of an input with l = 0 alone
        inputs = self.radial.of_edges(edges), edges.envelope, column
        if edges.groups:
            summed = self.sum_groups(inputs, edges.target, edges.groups, n_atoms)
        else:
            summed = self.sum_messages(*inputs, edges.target, n_atoms)
        degree = edge_sum(edges.envelope, edges.target, n_atoms)
        return self.projection(summed, degree) * self.scale

    def sum_groups(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        target: Tensor,
        groups: tuple[Group, ...],
        n_atoms: int,
    ) -> Tensor:
        """Call `sum_messages` group by group, again in the backward pass."""

        def group(i: int, radial: Tensor, envelope: Tensor, column: Tensor) -> Tensor:
            own = target[groups[i].edges] - groups[i].first_atom
            return self.sum_messages(radial, envelope, column, own, groups[i].n_atoms)

        rows = [(each.atoms, each.edges) for each in groups]
        return by_groups(group, rows, n_atoms, *inputs)

    def sum_messages(
        self, radial: Tensor, envelope: Tensor, column: Tensor, target: Tensor, n_atoms: int
    ) -> Tensor:
        """Sum messages of some edges over the atoms that they end at, [N, K, C]."""
        query = self.expand.scalars(torch.ones_like(self.expand.weight[:1]))  # [1, C]
        weights = radial * envelope[:, None]
        y = query.expand(len(weights), 1, -1)
        return operator_scatter(y, column, weights, target[None], n_atoms)


class TensorAttention(nn.Module):
    """Attention over neighbours; messages and values are products with the edge's harmonics."""

    def __init__(
        self,
        radial: RadialMLP,
        channels: int,
        heads: int,
        factors: Factors | None,
        *,
        dropout: float = 0.0,
        epsilon: float = 1e-16,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.epsilon = heads, dropout, epsilon
        width = channels // heads
        bound = math.sqrt(6 / (heads + width))
        self.alpha_dot = nn.Parameter(torch.empty(heads, width).uniform_(-bound, bound))
        self.merge_source = SharedLinear(channels, channels)
        self.merge_target = SharedLinear(channels, channels, bias=False)
        dtype = self.alpha_dot.dtype
        self.product_1 = None if factors is None else FactorOperator(factors, dtype)
        self.radial = radial
        self.alpha = SharedLinear(channels, channels)
        self.value = GatedLinear(channels)
        self.product_2 = None if factors is None else FactorOperator(factors, dtype)
        self.projection = SharedLinear(channels, channels)

    def forward(self, x: Tensor, edges: OperatorEdges) -> Tensor:
        """Map features of atoms [N, K, C] to the same shape."""
        n_atoms = len(x)
        both = torch.cat([self.merge_source(x), self.merge_target(x)])
        if edges.groups:
            return self.projection(grouped_tensor_attention(self, both, edges))
        ends = torch.stack([edges.source, edges.target + n_atoms])
        weights = self.radial.of_edges(edges) * edges.envelope[:, None]
        operators = self.operators(edges)
        message = operator_gather(both, operators[0], weights, ends)
        summed = self.sum_values(
            message, operators[-1], weights, edges.envelope, edges.target, n_atoms
        )
        return self.projection(summed)

    def operators(self, edges: OperatorEdges) -> tuple[Tensor, ...]:
        """Give the operator of both products, or one for each, [E, K, K]."""
        if edges.operator is not None:
            return (edges.operator,)
        assert self.product_1 is not None
        assert self.product_2 is not None
        return self.product_1(edges.harmonics), self.product_2(edges.harmonics)

    def sum_values(
        self,
        message: Tensor,
        operator: Tensor,
        weights: Tensor,
        envelope: Tensor,
        target: Tensor,
        n_atoms: int,
        *,
        inference: bool = False,
    ) -> Tensor:
        """Gate messages [E, K, C], multiply again and sum by attention: [N, K, C].

        ``inference``: derivatives by weights, and second ones, are not needed.
        """
        if inference:
            assert self.value.bias is not None
            scalars, value = gated_values(message, self.value.weight, self.value.bias)
        else:
            first, rest = first_and_rest(message)
            scalars, value = first.squeeze(1), self.value.gated(first, rest)
        logits = self.alpha.scalars(scalars).unflatten(1, (self.heads, -1))
        logits = (smooth_leaky_relu(logits) * self.alpha_dot).sum(2)
        attention = envelope_softmax(logits, envelope, target, n_atoms, self.epsilon)
        attention = nn.functional.dropout(attention, self.dropout, self.training)
        share = attention.repeat_interleave(self.alpha_dot.shape[1], dim=1)  # [E, C]
        return operator_scatter(value, operator, weights * share, target[None], n_atoms)


class GatedLinear(SharedLinear):
    """Map C to 2C channels and gate: SiLU on l = 0 of the first C, σ(l = 0 of the others) on l > 0.

    The others have no use for l > 0 and are not computed there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels)

    def forward(self, x: Tensor, amount: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Map [N, K, C] to the same shape."""
        return self.gated(*first_and_rest(x))

    def gated(self, scalars: Tensor, rest: Tensor) -> Tensor:
        """Map [N, 1, C] of l = 0 and [N, K − 1, C] of l > 0 to [N, K, C]."""
        first, gates = self.scalars(scalars.squeeze(1)).chunk(2, dim=1)
        values = rest @ self.weight[: len(self.weight) // 2].T
        parts = [nn.functional.silu(first)[:, None], values * torch.sigmoid(gates)[:, None]]
        return torch.cat(parts, dim=1)


def first_and_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cut [N, K, C] into l = 0 and l > 0; the derivative of both is then one copy."""
    first, rest = x.split([1, x.shape[1] - 1], dim=1)
    return first, rest
