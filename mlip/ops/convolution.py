"""Tensor-product convolution over neighbours: the hot path of Facet, SevenNet, NequIP and MACE.

Features are a tuple with one tensor [N, 2l+1, C_l] for each degree l = 0, 1, 2, ….
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mlip.ops.neighborhood import Neighborhood, gather_nodes
from mlip.ops.segment import segment_sum
from mlip.ops.tables import table_like
from mlip.so3 import clebsch_gordan

Features = tuple[Tensor, ...]
Path = tuple[int, int, int]

# Of the kernels, on any device:
HIGHEST_WRITTEN_OUT = 4  # degree; above, generated code grows beyond what compiles in due time
FEW_RADIAL = 16  # functions of an edge that fit in registers: weights are made anew in each pass


@dataclass(frozen=True)
class ConvolutionSignature:
    """Shapes of one convolution.

    channels: channels C_l of the input features for l = 0, 1, ….
    lmax_edge: highest degree of the edge harmonics.
    out_degrees: degrees that the output keeps.
    natural_parity: keep only products with even l1 + l2 + l3, which conserve the parity (−1)^l.
    """

    channels: tuple[int, ...]
    lmax_edge: int
    out_degrees: tuple[int, ...]
    natural_parity: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Products (l1, l2, l3) in lexicographic order, which is the order of the weights."""
        return _paths(self)

    @property
    def n_weights(self) -> int:
        """Path weights of one edge: one for each path and input channel."""
        return sum(self.channels[l1] for l1, _, _ in self.paths)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output degree 0 … max: input channels concatenated over paths."""
        return _out_channels(self)

    def __str__(self) -> str:
        return f"convolution of channels {self.channels}, {len(self.paths)} paths"


@cache
def _paths(signature: ConvolutionSignature) -> tuple[Path, ...]:
    return tuple(
        (l1, l2, l3)
        for l1, channels in enumerate(signature.channels)
        if channels
        for l2 in range(signature.lmax_edge + 1)
        for l3 in range(abs(l1 - l2), l1 + l2 + 1)
        if l3 in signature.out_degrees and not (signature.natural_parity and (l1 + l2 + l3) % 2)
    )


@cache
def _out_channels(signature: ConvolutionSignature) -> tuple[int, ...]:
    return tuple(
        sum(signature.channels[l1] for l1, _, l3 in signature.paths if l3 == degree)
        for degree in range(max(signature.out_degrees) + 1)
    )


def convolution(
    signature: ConvolutionSignature,
    features: Features,
    harmonics: Tensor,
    weights: Tensor,
    neighbors: Neighborhood,
) -> Features:
    """Sum weighted tensor products of neighbour features and edge harmonics (the definition).

    out_i[(path, u), m3] = Σ_{e→i} w_e[path, u] √(2 l3+1) Σ_{m1 m2} C^{l1 l2 l3}_{m1 m2 m3}
    x_{source(e)}[u, m1] Y_e[m2], paths of one l3 concatenated in the order of the signature.

    Args:
        signature: shapes and paths.
        features: x, [N, 2l+1, C_l] for each degree.
        harmonics: Y, [E, (lmax_edge+1)²].
        weights: w, [E, n_weights].
        neighbors: edges sorted by target.

    Returns:
        [N, 2l+1, out_channels[l]] for each degree.
    """
    n_nodes = features[0].shape[0]
    gathered = [x[neighbors.source] for x in features]
    out: list[list[Tensor]] = [[] for _ in signature.out_channels]
    cursor = 0
    for l1, l2, l3 in signature.paths:
        n_channels = signature.channels[l1]
        weight = weights[:, cursor : cursor + n_channels]
        cursor += n_channels
        table = table_like(harmonics, clebsch_gordan, l1, l2, l3) * math.sqrt(2 * l3 + 1)
        edge_matrix = torch.einsum("ej,ijk->eki", harmonics[:, l2**2 : (l2 + 1) ** 2], table)
        message = (edge_matrix @ gathered[l1]) * weight[:, None, :]  # [E, 2l3+1, C]
        out[l3].append(segment_sum(message, neighbors.target, n_nodes))
    return _concatenate(out, n_nodes, harmonics)


def radial_convolution(
    signature: ConvolutionSignature,
    features: Features,
    harmonics: Tensor,
    basis: Tensor,
    kernel: Tensor,
    neighbors: Neighborhood,
    *,
    use_definition: bool = False,
) -> Features:
    """Convolve with weights that are linear in a few radial functions, w_e = basis_e · kernel.

    Equal to ``convolution(…, basis @ kernel, …)`` but never forms a tensor over edges, paths and
    channels: the neighbours of an atom are first contracted to the moments
    A[n, m2, m1, u] = Σ_e basis_e[n] Y_e[m2] x_source[m1, u], one small matrix product an atom;
    Clebsch–Gordan tables and kernel then act on atoms, of which there are 20 to 100 times fewer.

    Args:
        signature: shapes and paths.
        features: [N, 2l+1, C_l] for each degree.
        harmonics: [E, (lmax_edge+1)²].
        basis: [E, R] radial functions.
        kernel: [R, n_weights].
        neighbors: edges sorted by target.
        use_definition: evaluate the definition instead.

    Returns:
        [N, 2l+1, out_channels[l]] for each degree.
    """
    if use_definition:
        return convolution(signature, features, harmonics, basis @ kernel, neighbors)
    n_nodes = features[0].shape[0]
    filters = basis[:, :, None] * harmonics[:, None, :]  # [E, R, m2]
    padded = torch.cat([filters, filters.new_zeros((1, *filters.shape[1:]))])
    slots = [  # [n, D, R, m2]
        padded.index_select(0, bucket.edges.flatten()).view(*bucket.edges.shape, *padded.shape[1:])
        for bucket in neighbors.padded.buckets
    ]
    out: list[list[Tensor]] = [[] for _ in signature.out_channels]
    blocks = kernel.split([signature.channels[l1] for l1, _, _ in signature.paths], dim=1)
    for l1 in range(len(signature.channels)):
        members = [i for i, path in enumerate(signature.paths) if path[0] == l1]
        if not members:
            continue
        l2_used = tuple(sorted({signature.paths[i][1] for i in members}))
        products = tuple(signature.paths[i] for i in members)
        per_bucket = [
            _moments(features[l1], filters_, bucket.sources, l2_used, products)
            for filters_, bucket in zip(slots, neighbors.padded.buckets, strict=True)
        ]
        width = sum(2 * l3 + 1 for _, _, l3 in products)
        if not per_bucket:
            coupled = filters.new_zeros(n_nodes, basis.shape[1], width, signature.channels[l1])
        else:
            coupled = gather_nodes(neighbors, per_bucket, filters)  # [N, R, Σ(2l3+1), C]
        expanded = torch.cat(
            [blocks[i][:, None, :].expand(-1, 2 * signature.paths[i][2] + 1, -1) for i in members],
            dim=1,
        )
        weighted = (coupled * expanded).sum(1)  # [N, Σ(2l3+1), C]
        parts = weighted.split([2 * l3 + 1 for _, _, l3 in products], dim=1)
        for (_, _, l3), part in zip(products, parts, strict=True):
            out[l3].append(part)
    return _concatenate(out, n_nodes, harmonics)


def _moments(
    x: Tensor,
    filters: Tensor,
    sources: Tensor,
    l2_used: tuple[int, ...],
    products: tuple[tuple[int, int, int], ...],
) -> Tensor:
    """Contract the neighbours of each atom, then couple to all l3: [n, R, Σ(2l3+1), C]."""
    n, slots = sources.shape
    n_radial = filters.shape[2]
    n_m1, channels = x.shape[1], x.shape[2]
    neighbor = x.flatten(1).index_select(0, sources.flatten()).view(n, slots, n_m1, channels)
    if all(l3 == 0 for _, _, l3 in products):
        l2 = products[0][1]  # l3 = 0 needs l2 = l1: contract m together with the neighbours
        rows = filters[..., l2**2 : (l2 + 1) ** 2].transpose(2, 3)  # [n, D, m, R]
        rows = rows.reshape(n, slots * n_m1, n_radial)
        trace = rows.transpose(1, 2) @ neighbor.reshape(n, slots * n_m1, channels)
        sign_and_norm = clebsch_gordan(l2, l2, 0)[0, 0, 0].item()
        return trace[:, :, None, :] * sign_and_norm
    if l2_used != tuple(range(l2_used[-1] + 1)) or (l2_used[-1] + 1) ** 2 != filters.shape[3]:
        filters = torch.cat([filters[..., l2**2 : (l2 + 1) ** 2] for l2 in l2_used], dim=-1)
    n_m2 = filters.shape[3]
    rows = filters.reshape(n, slots, n_radial * n_m2)
    moments = rows.transpose(1, 2) @ neighbor.view(n, slots, n_m1 * channels)
    table = table_like(x, _coupling_table, products, l2_used)  # [Σ(2l3+1), m2·m1]
    coupled = table @ moments.view(n * n_radial, n_m2 * n_m1, channels)
    return coupled.view(n, n_radial, -1, channels)


def _coupling_table(products: tuple[tuple[int, int, int], ...], l2_used: tuple[int, ...]) -> Tensor:
    """√(2 l3+1) Clebsch–Gordan tables of paths with one l1 as a matrix [Σ(2l3+1), m2·m1]."""
    l1 = products[0][0]
    offset, total = {}, 0
    for l2 in l2_used:
        offset[l2], total = total, total + 2 * l2 + 1
    rows = []
    for _, l2, l3 in products:
        block = torch.zeros(2 * l3 + 1, total, 2 * l1 + 1, dtype=torch.float64)
        table = clebsch_gordan(l1, l2, l3) * math.sqrt(2 * l3 + 1)  # [m1, m2, m3]
        block[:, offset[l2] : offset[l2] + 2 * l2 + 1] = table.permute(2, 1, 0)
        rows.append(block.flatten(1))
    return torch.cat(rows)


def _concatenate(out: list[list[Tensor]], n_nodes: int, like: Tensor) -> Features:
    return tuple(
        torch.cat(parts, dim=2) if parts else like.new_zeros(n_nodes, 2 * degree + 1, 0)
        for degree, parts in enumerate(out)
    )
