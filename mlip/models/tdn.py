"""Tensor Decomposition Network: attention with path-shared tensor products (arXiv 2507.01131).

exact (default)  the product is the exact Clebsch–Gordan sum with one weight for all paths, one
                 matrix for each edge that all layers share; messages and attention end smoothly
                 at the cutoff; forces and stress are derivatives of the energy; lone atoms keep
                 theirs.
published        the network of the official code: low-rank factors in place of the exact tensor,
                 no envelope (the energy jumps when a neighbour enters), forces of a head or
                 derivatives, lone atoms without energy.

Rotations, not mirror images, leave the energy unchanged: products that change parity, the cross
product of vectors first, count like all others.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mlip.models.direct import DirectPrediction
from mlip.nn.attention_edges import group_edges
from mlip.nn.radial import polynomial_envelope
from mlip.nn.so3_layers import MergedLayerNorm
from mlip.nn.species import rows_of_elements
from mlip.nn.tensor_attention import (
    DegreeEmbedding,
    DegreeNorm,
    GatedLinear,
    LearnedGaussians,
    OperatorEdges,
    RadialMLP,
    SharedLinear,
    TensorAttention,
)
from mlip.ops.pairs import opposite_edges
from mlip.ops.tensor_products import Degrees, Factors, SharedProduct, find_factors, published_rank
from mlip.so3 import spherical_harmonics

ENVELOPE_ORDER = 5
EDGES_PER_GROUP = 1024  # and thread: an edge needs less memory than in other models


class TDNConfig(BaseModel):
    """Everything that defines a TDN but its weights; sizes as published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: tuple[int, ...] = Field(min_length=1, description="atomic numbers it knows")
    cutoff: float = Field(4.5, gt=0, description="neighbour cutoff, Å")
    layers: int = Field(4, gt=0)
    lmax: int = Field(2, gt=0, description="highest degree")
    channels: int = Field(128, gt=0, description="of each degree")
    heads: int = Field(4, gt=0)
    n_radial: int = Field(128, gt=0, description="Gaussians")
    radial_hidden: tuple[int, ...] = Field((64, 64), description="hidden layers of radial MLPs")
    average_degree: float = Field(18.6, gt=0, description="edges of an atom; scales their sum")
    average_atoms: float = Field(1.0, gt=0, description="node energies are divided by its root")
    product: Literal["exact", "low_rank"] = "exact"
    rank: int | None = Field(None, gt=0, description="of low_rank products; default 7 lmax²")
    norm: Literal["merged", "degree"] = Field(
        "merged", description="one root mean square for all degrees, or as published one for each"
    )
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="in training, of weights")
    prediction: Literal["gradient", "direct"] = "gradient"
    published: bool = Field(False, description="no envelope; atoms without neighbours count 0")

    @model_validator(mode="after")
    def _check(self) -> TDNConfig:
        if len(set(self.elements)) != len(self.elements):
            raise ValueError("elements holds an atomic number twice")
        if any(not 1 <= z <= 118 for z in self.elements):
            raise ValueError("elements are atomic numbers from 1 to 118")
        if self.channels % self.heads:
            raise ValueError("channels must be a multiple of heads")
        if not self.radial_hidden or min(self.radial_hidden) < 1:
            raise ValueError("radial_hidden needs one width or more")
        if self.rank is not None and self.product != "low_rank":
            raise ValueError("rank needs product: low_rank")
        return self

    @property
    def direct_stress(self) -> bool:
        """No head predicts stress."""
        return False


class TDNBlock(nn.Module):
    """Attention and feed-forward network, each on normalised features with a residual."""

    def __init__(self, config: TDNConfig, factors: Factors | None) -> None:
        super().__init__()
        self.norm_1 = _norm(config)
        self.attention = _attention(config, factors)
        self.norm_2 = _norm(config)
        self.expand = GatedLinear(config.channels)
        self.contract = SharedLinear(config.channels, config.channels)

    def forward(self, x: Tensor, edges: OperatorEdges) -> Tensor:
        """Map [N, K, C] to the same shape."""
        x = x + self.attention(self.norm_1(x), edges)
        return x + self.contract(self.expand(self.norm_2(x)))


class TDN(nn.Module):
    """Map a graph to one energy for each atom, or to a `DirectPrediction`.

    Args:
        config: sizes and settings.
        factors: of low-rank products; by default those of `find_factors`.
    """

    species_of: Tensor

    def __init__(self, config: TDNConfig, factors: Factors | None = None) -> None:
        super().__init__()
        self.config = config
        n_elements, channels = len(config.elements), config.channels
        self.register_buffer("species_of", rows_of_elements(config.elements), persistent=False)
        self.embedding = nn.Parameter(torch.empty(n_elements, channels).uniform_(-1.0, 1.0))
        self.radial_basis = LearnedGaussians(config.n_radial, config.cutoff)
        if config.product == "low_rank" and factors is None:
            factors = find_factors(config.lmax, config.rank or published_rank(config.lmax))
        factors = factors if config.product == "low_rank" else None
        self.edge_degree = DegreeEmbedding(
            _radial(config), channels, factors, config.average_degree**-0.5
        )
        self.blocks = nn.ModuleList(TDNBlock(config, factors) for _ in range(config.layers))
        self.norm = _norm(config)
        self.head_hidden = SharedLinear(channels, channels)
        self.head = SharedLinear(channels, 1)
        if config.prediction == "direct":
            self.force_head = _attention(config, factors)
            self.force_projection = SharedLinear(channels, 1)

    @property
    def cutoff(self) -> float:
        """Neighbour cutoff, Å."""
        return self.config.cutoff

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the model knows."""
        return self.config.elements

    @property
    def conservative(self) -> bool:
        """Whether forces and stress are derivatives of the energy."""
        return self.config.prediction == "gradient"

    def forward(self, graph: Any) -> Tensor | DirectPrediction:
        """Compute node energies, and forces if the model has a head for them.

        Args:
            graph: AtomicGraph or batch with ``edge_vector`` [E, 3] (Å, model dtype), ``edge_index``
                sorted by target and ``atomic_numbers`` [N] among ``elements``.

        Returns:
            Node energies [N] in gradient mode, a `DirectPrediction` in direct mode.
        """
        species = self.species_of[graph.atomic_numbers]
        edges = self.edges(graph.edge_vector, graph.edge_index, graph.edge_shift, len(species))
        if getattr(graph, "inference", False) and not self.training:
            groups = group_edges(edges.target, len(species), EDGES_PER_GROUP)
            edges = edges._replace(groups=groups)
        x = self.embed(species, edges)
        for block in self.blocks:
            x = block(x, edges)
        x = self.norm(x)
        hidden = nn.functional.silu(self.head_hidden.scalars(x[:, 0]))
        energies = self.head.scalars(hidden)[:, 0] / math.sqrt(self.config.average_atoms)
        if self.config.published:
            energies = energies * (torch.bincount(edges.target, minlength=len(species)) > 0)
        if self.config.prediction == "gradient":
            return energies
        forces = self.force_projection(self.force_head(x, edges))[:, 1:4, 0]
        return DirectPrediction(energies, forces, None)

    def edges(
        self, vectors: Tensor, edge_index: Tensor, shift: Tensor, n_atoms: int
    ) -> OperatorEdges:
        """Evaluate everything that depends on edge vectors alone."""
        config, pairs = self.config, opposite_edges(edge_index, shift, n_atoms)
        distance = torch.linalg.vector_norm(vectors, dim=1)
        harmonics = spherical_harmonics(config.lmax, vectors)
        envelope = torch.ones_like(distance)
        if not config.published:
            envelope = polynomial_envelope(distance / config.cutoff, ENVELOPE_ORDER)
        operator = None
        if config.product == "exact":
            operator = SharedProduct(Degrees(*(config.lmax,) * 3)).operator(harmonics)
        one_of_two = distance if pairs is None else distance.index_select(0, pairs.edge)
        basis, (source, target) = self.radial_basis(one_of_two), edge_index
        return OperatorEdges(source, target, basis, envelope, harmonics, operator, pairs=pairs)

    def embed(self, species: Tensor, edges: OperatorEdges) -> Tensor:
        """Make the first features [N, K, C] of elements and neighbours."""
        x = self.edge_degree(edges, len(species))
        return torch.cat([x[:, :1] + self.embedding[species][:, None], x[:, 1:]], dim=1)


def _norm(config: TDNConfig) -> nn.Module:
    kind = MergedLayerNorm if config.norm == "merged" else DegreeNorm
    return kind(config.lmax, config.channels)


def _radial(config: TDNConfig) -> RadialMLP:
    return RadialMLP(config.n_radial, config.radial_hidden, config.channels)


def _attention(config: TDNConfig, factors: Factors | None) -> TensorAttention:
    return TensorAttention(
        _radial(config),
        config.channels,
        config.heads,
        factors,
        dropout=config.attention_dropout,
    )
