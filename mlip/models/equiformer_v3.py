"""EquiformerV3: graph attention on spherical features in the frames of edges (arXiv 2604.09130).

Two ways to forces and stress:

gradient (default)  the model gives node energies; forces and stress are derivatives of their sum.
direct              attention heads read forces and stress off the features: faster, and not the
                    derivatives of any energy.

Exact by default: derivatives hold in every direction, edges along ±y included, and no edge is
dropped. ``published`` copies the official code where it differs. Rotations, not mirror images,
leave the energy unchanged: SO(2) linear maps mix +m with −m.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from ase.data import chemical_symbols
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mlip.graph import batch_index, number_of_graphs
from mlip.models.direct import DirectPrediction
from mlip.nn.attention_edges import AttentionEdges, group_edges
from mlip.nn.edge_frames import EdgeFrameBuilder
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.equiformer_heads import EnergyHead, StressHead
from mlip.nn.force_encoding import encode_forces
from mlip.nn.graph_attention import (
    AttentionShape,
    EdgeDegreeEmbedding,
    EquivariantGraphAttention,
)
from mlip.nn.radial import polynomial_envelope, uniform_gaussians
from mlip.nn.so3_layers import MergedLayerNorm, SO3Linear, add_to_scalars
from mlip.nn.species import rows_of_elements
from mlip.nn.sphere_feed_forward import SphereFeedForward
from mlip.nn.sphere_product import SphereBasis, is_exact
from mlip.ops import nearest_edges

logger = logging.getLogger("mlip")

ENVELOPE_ORDER = 5
AVERAGE_DEGREE = 23.395238876342773  # of all published models


class EquiformerV3Config(BaseModel):
    """Everything that defines an EquiformerV3 but its weights; defaults as published for MPtrj."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: tuple[int, ...] = Field(min_length=1, description="atomic numbers it knows")
    cutoff: float = Field(6.0, gt=0, description="neighbour cutoff, Å")
    max_neighbors: int | None = Field(
        None, gt=0, description="nearest neighbours kept; the energy is then not smooth"
    )
    layers: int = Field(7, gt=0)
    lmax: int = Field(4, gt=0, description="highest degree")
    mmax: int = Field(2, ge=0, description="highest order in the frames of edges")
    channels: int = Field(128, gt=0, description="of each degree")
    attention_hidden: int = Field(32, gt=0)
    heads: int = Field(8, gt=0)
    alpha_channels: int = Field(64, gt=0, description="of the logits of one head")
    value_channels: int = Field(16, gt=0, description="of the message of one head")
    feed_forward_hidden: int = Field(512, gt=0)
    edge_channels: int = Field(128, gt=0, description="width of the radial MLPs")
    n_radial: int = Field(10, gt=1)
    attention_grid: tuple[int, int] | None = Field(
        None, description="latitudes and longitudes of an inexact published grid; default: exact"
    )
    feed_forward_grid: tuple[int, int] | None = Field(None, description="likewise, on atoms")
    average_degree: float = Field(AVERAGE_DEGREE, gt=0)
    average_atoms: float = Field(1.0, gt=0, description="node energies are divided by it")
    attention_epsilon: float = Field(1e-16, gt=0)
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="in training, of weights")
    drop_path: float = Field(0.0, ge=0, lt=1, description="in training, of branches per structure")
    prediction: Literal["gradient", "direct"] = "gradient"
    direct_stress: bool = Field(True, description="direct prediction has a stress head")
    denoising: bool = Field(False, description="direct prediction has the layers of DeNS")
    published: bool = Field(
        False, description="freeze directions within 1.4 mrad of ±y; allow inexact grids"
    )

    @model_validator(mode="after")
    def _check(self) -> EquiformerV3Config:
        if len(set(self.elements)) != len(self.elements):
            raise ValueError("elements holds an atomic number twice")
        if any(not 1 <= z <= 118 for z in self.elements):
            raise ValueError("elements are atomic numbers from 1 to 118")
        if self.mmax > self.lmax:
            raise ValueError("mmax must not exceed lmax")
        if self.denoising and self.prediction != "direct":
            raise ValueError("denoising needs prediction: direct")
        if self.prediction == "direct" and self.direct_stress and self.lmax < 2:
            raise ValueError("direct_stress needs lmax of 2 or more")
        for name, mmax in (("attention_grid", self.mmax), ("feed_forward_grid", self.lmax)):
            points = getattr(self, name)
            if points and not self.published and not is_exact(self.lmax, mmax, points):
                raise ValueError(
                    f"{name} {points[0]} x {points[1]} breaks rotational symmetry: leave it out, "
                    f"or set published for parity (exact: more than {3 * self.lmax} x {3 * mmax})"
                )
        return self


class EquiformerBlock(nn.Module):
    """Attention and feed-forward network, each on normalised features with a residual."""

    def __init__(self, config: EquiformerV3Config) -> None:
        super().__init__()
        self.drop_path = config.drop_path
        self.norm_1 = MergedLayerNorm(config.lmax, config.channels)
        self.attention = EquivariantGraphAttention(_attention_shape(config), config.channels)
        self.norm_2 = MergedLayerNorm(config.lmax, config.channels)
        self.feed_forward = SphereFeedForward(
            _sphere(config, on_edges=False), config.channels, config.feed_forward_hidden
        )

    def forward(self, x: Tensor, edges: AttentionEdges, batch: Tensor, n_graphs: int) -> Tensor:
        """Map [N, K, C] to the same shape."""
        x = x + self._drop(self.attention(self.norm_1(x), edges), batch, n_graphs)
        normal = self.norm_2(x)
        if edges.groups is not None:
            return x + self.feed_forward.infer(normal)
        return x + self._drop(self.feed_forward(normal), batch, n_graphs)

    def _drop(self, branch: Tensor, batch: Tensor, n_graphs: int) -> Tensor:
        """Leave the branch out for some structures in training (stochastic depth)."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        kept = torch.bernoulli(torch.full((n_graphs,), keep, device=branch.device))
        return branch * (kept / keep).to(branch)[batch][:, None, None]


class EquiformerV3(nn.Module):
    """Map a graph to one energy for each atom, or to a `DirectPrediction`."""

    species_of: Tensor

    def __init__(self, config: EquiformerV3Config) -> None:
        super().__init__()
        self.config = config
        self.tabulated: set[int] | None = None  # element rows, if splines are used
        self.table_report = ""
        self.register_buffer("species_of", rows_of_elements(config.elements), persistent=False)
        shape = _attention_shape(config)
        freeze = config.published and config.prediction == "gradient"
        self.frames = EdgeFrameBuilder(config.lmax, config.mmax, freeze)
        self.embedding = nn.Embedding(len(config.elements), config.channels)
        self.edge_degree = EdgeDegreeEmbedding(shape, config.average_degree)
        self.blocks = nn.ModuleList(EquiformerBlock(config) for _ in range(config.layers))
        self.norm = MergedLayerNorm(config.lmax, config.channels)
        self.energy_head = EnergyHead(config.channels, config.feed_forward_hidden)
        if config.prediction == "direct":
            self.force_head = EquivariantGraphAttention(shape, 1, "gate")
            if config.direct_stress:
                self.stress_head = StressHead(
                    config.lmax, config.channels, config.feed_forward_hidden
                )
        if config.denoising:
            self.force_embedding = SO3Linear(config.lmax, 1, config.channels)
            self.noise_head = EquivariantGraphAttention(shape, 1, "gate")

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
        """Compute node energies, and forces and stress if the model has heads for them.

        Args:
            graph: AtomicGraph or batch with ``edge_vector`` [E, 3] (Å, model dtype), ``edge_index``
                sorted by target and ``atomic_numbers`` [N] among ``elements``. In denoising also
                ``noise_mask`` [N] bool (corrupted atoms), ``clean_forces`` [N, 3] (eV/Å, of the
                structure before noise) and ``noisy`` [B] bool (structures with noise).

        Returns:
            Node energies [N] in gradient mode, a `DirectPrediction` in direct mode.
        """
        batch, n_graphs = batch_index(graph), number_of_graphs(graph)
        species = self.species_of[graph.atomic_numbers]
        edges = self.edges(graph.edge_vector, graph.edge_index, species)
        if getattr(graph, "inference", False) and not self.training:
            edges = edges._replace(groups=group_edges(edges.target, len(species)))
        x = self.embed(graph, species, edges)
        for block in self.blocks:
            x = block(x, edges, batch, n_graphs)
        x = self.norm(x)
        energies = self.energy_head(x[:, 0]) / self.config.average_atoms
        if self.config.prediction == "gradient":
            return energies
        return self._direct(graph, x, energies, edges)

    def edges(self, vectors: Tensor, edge_index: Tensor, species: Tensor) -> AttentionEdges:
        """Evaluate everything that depends on edge vectors and elements alone."""
        config = self.config
        distance = torch.linalg.vector_norm(vectors, dim=1)
        if config.max_neighbors is not None:
            keep = nearest_edges(edge_index[1], distance, len(species), config.max_neighbors)
            if keep is not None:
                vectors, distance, edge_index = vectors[keep], distance[keep], edge_index[:, keep]
        source, target = edge_index[0], edge_index[1]
        if self.tabulated is not None:
            self.add_tables(species.unique().tolist())
        return AttentionEdges(
            source,
            target,
            species[source],
            species[target],
            self.frames(vectors),
            self._basis(distance) if self.tabulated is None else distance[:, None],
            polynomial_envelope(distance / config.cutoff, ENVELOPE_ORDER),
        )

    def with_tables(self) -> EquiformerV3:
        """Return the model with splines in place of its radial networks, for inference.

        Weights are shared and must not change. Pairs of elements are tabulated when they first
        occur, or before by `add_tables`.
        """
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        model = copy.deepcopy(self, shared)
        for network in model._radial_networks():
            network.tabulate(self._basis, self.cutoff)
        model.tabulated = set()
        return model

    def add_tables(self, rows: Iterable[int]) -> None:
        """Tabulate the radial networks of all pairs of element rows.

        The largest error goes to ``table_report`` and to the logger "mlip".
        """
        known = self.tabulated or set()
        wanted = known.union(rows)
        pairs = [(a, b) for a in wanted for b in wanted if not {a, b} <= known]
        if not pairs:
            return
        self.tabulated = wanted
        tables = [network.table for network in self._radial_networks() if network.table]
        for table in tables:
            table.add(pairs)
        symbols = ", ".join(chemical_symbols[self.elements[row]] for row in sorted(wanted))
        report = (
            f"radial networks as splines, {symbols}: largest error "
            f"{max(table.error for table in tables):.1e} of the largest weight, "
            f"{sum(table.size for table in tables) / 1e6:.0f} MB"
        )
        logger.info("%s", report)
        self.table_report = report

    def _radial_networks(self) -> list[EdgeRadialMLP]:
        return [module for module in self.modules() if isinstance(module, EdgeRadialMLP)]

    def _basis(self, distance: Tensor) -> Tensor:
        return uniform_gaussians(distance, self.config.n_radial, self.config.cutoff)

    def embed(self, graph: Any, species: Tensor, edges: AttentionEdges) -> Tensor:
        """Make the first features [N, K, C] of elements, neighbours and known forces."""
        x = add_to_scalars(self.edge_degree(edges, len(species)), self.embedding(species))
        if not self.config.denoising or getattr(graph, "noise_mask", None) is None:
            return x
        encoded = encode_forces(graph.clean_forces.to(x), self.config.lmax)[:, :, None]
        return x + self.force_embedding(encoded) * graph.noise_mask.to(x)[:, None, None]

    def _direct(
        self, graph: Any, x: Tensor, energies: Tensor, edges: AttentionEdges
    ) -> DirectPrediction:
        """Read forces and stress off the normalised features."""
        batch, n_graphs = batch_index(graph), number_of_graphs(graph)
        noise_mask = getattr(graph, "noise_mask", None) if self.config.denoising else None
        forces = self.force_head(x, edges)[:, 1:4, 0]
        if noise_mask is not None:
            noise = self.noise_head(x, edges)[:, 1:4, 0]
            forces = torch.where(noise_mask[:, None], noise, forces)
        if not self.config.direct_stress:
            return DirectPrediction(energies, forces, None)
        stress = self.stress_head(x, batch, n_graphs)
        if noise_mask is not None:
            stress = stress * (~graph.noisy).to(stress)[:, None, None]
        return DirectPrediction(energies, forces, stress)


def _sphere(config: EquiformerV3Config, *, on_edges: bool) -> SphereBasis:
    """Coefficients and grid of messages or of atoms; exact grids are replaced by the smallest."""
    mmax = config.mmax if on_edges else config.lmax
    points = config.attention_grid if on_edges else config.feed_forward_grid
    if points is not None and is_exact(config.lmax, mmax, points):
        points = None
    return SphereBasis(config.lmax, mmax, in_frame=on_edges, points=points)


def _attention_shape(config: EquiformerV3Config) -> AttentionShape:
    return AttentionShape(
        sphere=_sphere(config, on_edges=True),
        channels=config.channels,
        hidden=config.attention_hidden,
        heads=config.heads,
        alpha_channels=config.alpha_channels,
        value_channels=config.value_channels,
        n_elements=len(config.elements),
        n_radial=config.n_radial,
        edge_channels=config.edge_channels,
        epsilon=config.attention_epsilon,
        dropout=config.attention_dropout,
    )
