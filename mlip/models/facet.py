"""Facet: message passing with linear radial weights and node updates on the sphere.

After "Facet" (arXiv 2509.08418). Two settings of one implementation:

exact (default)  conserves what physics conserves: energy is a sum over atoms, every neighbour
                 within the cutoff counts, the envelope is C2 or smoother, rotations and inversion
                 hold to rounding, normalisation never divides by features that vanish by symmetry.
published        the network of the official code, number for number (``mlip.models.facet_jax``).

A block:  y = linear(convolution(x)) / neighbours^p + linear(x);  z = node update(y);
          x = gain · z + x (zero-padded).   The last block keeps scalars only; a linear head reads
them. Features are a tuple of [N, 2l+1, C_l].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlip.models.facet_config import FacetConfig
from mlip.nn.equivariant import (
    ChannelGain,
    EquivariantLinear,
    add,
    equivariant_layer_norm,
    pad_or_truncate,
)
from mlip.nn.mlp import MLP
from mlip.nn.node_update import GateUpdate, ScalarUpdate, SphereGridUpdate, SphereProductUpdate
from mlip.nn.prepared import Prepared
from mlip.nn.radial import (
    GaussianBasis,
    SineBasis,
    exponential_envelope,
    polynomial_envelope,
    xplor_envelope,
)
from mlip.nn.species import rows_of_elements
from mlip.ops import (
    Backend,
    ConvolutionSignature,
    Features,
    Neighborhood,
    default_backend,
    neighborhood,
    structure_sum,
    sum_messages,
)
from mlip.so3 import spherical_harmonics

if TYPE_CHECKING:
    from mlip.models.facet_elements import ElementWeights
    from mlip.models.facet_inference import Passes
    from mlip.ops.cpu.pairs import PairList


class Edges(NamedTuple):
    """What all blocks share: harmonics [E, K], enveloped radial basis [E, R], neighbours.

    inference: nobody asks for derivatives by weights or for second ones.
    pairs: the harmonics and basis are those of pairs of opposite edges; None: of all edges.
    """

    harmonics: Tensor
    basis: Tensor
    neighbors: Neighborhood
    inference: bool = False
    pairs: PairList | None = None

    def detached(self) -> Edges:
        """The same without derivatives."""
        return self._replace(harmonics=self.harmonics.detach(), basis=self.basis.detach())

    def of_all(self) -> Edges:
        """The same with harmonics and basis of all edges."""
        if self.pairs is None:
            return self
        harmonics, basis = self.pairs.both(self.harmonics, self.basis)
        return Edges(harmonics, basis, self.neighbors, self.inference)


class FacetBlock(nn.Module):
    """One round of messages and one node update."""

    def __init__(self, config: FacetConfig, channels_in: tuple[int, ...], target: tuple[int, ...]):
        super().__init__()
        mixed = _message_channels(config, target)
        self.target = target
        self.backend: Backend = default_backend()
        self.residual = config.block_residual
        self.residual_normalization = config.residual_normalization
        self.message_scale = config.average_neighbors**-config.neighbor_power
        self.before = EquivariantLinear(channels_in, channels_in) if config.linear_before else None
        self.signature = ConvolutionSignature(
            channels_in,
            _lmax_edge(config),
            tuple(degree for degree, n in enumerate(mixed) if n),
            config.natural_parity,
        )
        widths = [config.n_radial, *config.radial_hidden, self.signature.n_weights]
        self.radial = MLP(widths, config.radial_activation)
        self.after = EquivariantLinear(self.signature.out_channels, mixed)
        self.skip = EquivariantLinear(channels_in, mixed)
        self.update = _node_update(config, mixed, target)
        initial = 0.0 if config.residual_normalization else 1.0
        self.residual_gain = ChannelGain(target, initial) if config.block_residual else None
        self.output_gain = ChannelGain(target, 1.0) if config.output_normalization else None

    def forward(self, x: Features, edges: Edges) -> Features:
        """Map features of all atoms to the target channels."""
        y = add(self.message(x, edges), self.skip(x))
        z = self.update(y)
        if self.residual_gain is not None:
            normal = equivariant_layer_norm(z) if self.residual_normalization else z
            z = add(self.residual_gain(normal), pad_or_truncate(x, self.target))
        if self.output_gain is not None:
            z = self.output_gain(equivariant_layer_norm(z))
        return z

    def use_backend(self, name: Backend) -> None:
        """Choose what sums messages and multiplies functions."""
        self.backend = name
        if isinstance(self.update, SphereProductUpdate):
            self.update.backend = name

    def message(self, x: Features, edges: Edges) -> Features:
        """Sum messages of neighbours and mix their channels."""
        h = self.before(x) if self.before is not None else x
        radial, kernel = self.radial.hidden(edges.basis), self.radial.kernels[-1]
        summed = sum_messages(
            self.signature, h, edges.harmonics, radial, kernel, edges.neighbors, self.backend
        )
        return self.after(tuple(part * self.message_scale for part in summed))


class Facet(nn.Module):
    """Map a graph to one energy for each atom."""

    species_of: Tensor
    radius: Tensor
    blocks: nn.ModuleList

    def __init__(self, config: FacetConfig) -> None:
        super().__init__()
        self.config = config
        n_elements = len(config.elements)
        self.register_buffer("species_of", rows_of_elements(config.elements), persistent=False)
        radius = torch.tensor([config.cutoff], dtype=torch.float32)
        if config.trainable_cutoff:
            self.radius = nn.Parameter(radius)
        else:
            self.register_buffer("radius", radius, persistent=False)
        self.embedding = nn.Parameter(torch.randn(n_elements, config.embedding))
        self.radial_basis = _radial_basis(config)
        targets = [*config.hidden, (config.outputs,)]
        inputs = [(config.embedding,), *config.hidden]
        self.blocks = nn.ModuleList(
            FacetBlock(config, channels, target)
            for channels, target in zip(inputs, targets, strict=True)
        )
        self.readouts = nn.ModuleList(
            EquivariantLinear(target, (config.outputs,)) if config.readout_linear else nn.Identity()
            for target in targets
        )
        self.head = MLP(
            [config.outputs, *config.head_hidden, 1],
            config.head_activation,
            normalize=config.head_normalization,
        )
        self.prepared: Prepared[list[Passes | None]] = Prepared()
        self.prepared_elements: Prepared[dict[tuple[int, ...], ElementWeights]] = Prepared()
        if config.rescale != "none":
            self.species_scale = nn.Parameter(torch.ones(n_elements))
            self.species_shift = nn.Parameter(torch.zeros(n_elements))
        if config.rescale == "species_sum":
            self.global_scale = nn.Parameter(torch.ones(1))
            self.global_shift = nn.Parameter(torch.zeros(1))

    @property
    def backend(self) -> Backend:
        """What sums messages and multiplies functions, ``auto`` or another; can be set anytime."""
        return cast(FacetBlock, self.blocks[0]).backend

    @backend.setter
    def backend(self, name: Backend) -> None:
        for block in self.blocks:
            cast(FacetBlock, block).use_backend(name)

    @property
    def cutoff(self) -> float:
        """Neighbour cutoff, Å; the learned one where it is trainable."""
        return float(self.radius.detach()) if self.config.trainable_cutoff else self.config.cutoff

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the model knows."""
        return self.config.elements

    def forward(self, graph: Any) -> Tensor:
        """Compute node energies.

        Args:
            graph: AtomicGraph or batch with ``edge_vector`` [E, 3] (Å, model dtype), ``edge_index``
                sorted by target and ``atomic_numbers`` [N] among ``elements``.

        Returns:
            [N], in the energy unit the surrounding potential scales by.
        """
        species = self.species_of[graph.atomic_numbers]
        inference = getattr(graph, "inference", False)
        edges = self.edges(
            graph.edge_vector, graph.edge_index, len(species), inference, graph.edge_shift
        )
        x: Features = (self.embedding[species][:, None, :],)  # [N, 1, C]
        energies = self.head(self._scalars(x, edges, species))[:, 0]
        if self.config.rescale == "none":
            return energies
        return self._rescale(energies, species, graph)

    def _scalars(self, x: Features, edges: Edges, species: Tensor) -> Tensor:
        """Run the blocks and read their scalars, [N, outputs]."""
        if edges.inference and not self.training and self.config.readout == "last":
            from mlip.models.facet_inference import blocks_in_inference

            found = blocks_in_inference(self, x, edges, species)
            if found is not None:
                return self._read(self.readouts[-1], found)
        self.prepared.clear()
        self.prepared_elements.clear()
        scalars = []
        for block, readout in zip(self.blocks, self.readouts, strict=True):
            x = block(x, edges)
            scalars.append(self._read(readout, x))
        return self._reduce(scalars)

    def _read(self, readout: nn.Module, x: Features) -> Tensor:
        return pad_or_truncate(readout(x), (self.config.outputs,))[0][:, 0]

    @property
    def lmax_edge(self) -> int:
        """Highest degree of the edge harmonics."""
        return _lmax_edge(self.config)

    def edges(
        self,
        vectors: Tensor,
        edge_index: Tensor,
        n_nodes: int,
        inference: bool = False,
        shift: Tensor | None = None,
    ) -> Edges:
        """Evaluate everything that depends on edge vectors alone.

        Args:
            vectors: [E, 3] Å.
            edge_index: [2, E].
            n_nodes: N.
            inference: see `Edges`; pairs are then looked for.
            shift: [E, 3] image of each source, if known.
        """
        neighbors = neighborhood(edge_index, n_nodes)
        if not inference or self.training:
            return Edges(*self.functions(vectors), neighbors, inference)
        from mlip.models.facet_edges import functions_in_inference
        from mlip.models.facet_inference import pairs_in_inference

        pairs = None if shift is None else pairs_in_inference(self, neighbors, shift, vectors)
        if pairs is not None:
            vectors = vectors.index_select(0, torch.from_numpy(pairs.edge))
        functions = functions_in_inference(self, vectors) or self.functions(vectors)
        return Edges(*functions, neighbors, inference, pairs)

    def functions(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate harmonics [E, K] and enveloped radial functions [E, R] of vectors [E, 3]."""
        if self.config.node_update != "sphere_product":
            vectors = -vectors[:, [2, 1, 0]]  # axes of the published models: their grid is inexact
        distance = torch.linalg.vector_norm(vectors, dim=1)
        basis = self.radial_basis(distance)
        if self.config.radial_basis == "sine":
            scale = 1.0 if self._exact else self._radius(distance)
            basis = basis * (2 / scale)
        basis = basis * self._envelope(distance)[:, None]
        return spherical_harmonics(self.lmax_edge, vectors), basis

    @property
    def _exact(self) -> bool:
        return self.config.envelope == "polynomial"

    def _radius(self, like: Tensor) -> Tensor:
        if self.config.trainable_cutoff:
            return self.radius.to(like)
        return torch.full_like(self.radius, self.config.cutoff, dtype=like.dtype)

    def _envelope(self, distance: Tensor) -> Tensor:
        config, radius = self.config, self._radius(distance)
        if config.envelope == "polynomial":
            return polynomial_envelope(distance / radius, config.envelope_order)
        if config.envelope == "xplor":
            return xplor_envelope(distance, radius, config.envelope_start)
        start, curvature = config.envelope_start, config.envelope_curvature
        return exponential_envelope(distance, radius, start, curvature)

    def _reduce(self, scalars: list[Tensor]) -> Tensor:
        if self.config.readout == "last":
            return scalars[-1]
        stacked = torch.stack(scalars)
        return stacked.mean(0) if self.config.readout == "mean" else stacked.sum(0)

    def _rescale(self, energies: Tensor, species: Tensor, graph: Any) -> Tensor:
        """Apply the published rescaling; its energy per atom is given to every atom alike."""
        batch = getattr(graph, "batch", None)
        if batch is None:
            batch = torch.zeros_like(species)
        n_graphs = int(batch.max()) + 1 if len(batch) else 1
        count = torch.bincount(batch, minlength=n_graphs).to(energies)
        scale, shift = self.species_scale[species], self.species_shift[species]
        if self.config.rescale == "sevennet":
            per_atom = structure_sum(energies * scale + shift, batch, n_graphs) / (count + 1e-6)
            return per_atom[batch]
        mean = structure_sum(energies, batch, n_graphs) / (count + 1e-6)
        mean = mean * _unit_softplus(structure_sum(scale, batch, n_graphs)) / count
        offset = structure_sum(shift, batch, n_graphs) / count + self.global_shift
        return (mean * _unit_softplus(self.global_scale) + offset)[batch]


def _message_channels(config: FacetConfig, target: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of the summed messages of a block; gates are extra scalars."""
    if config.node_update == "gate":
        return (target[0] + sum(target[1:]), *target[1:])
    return config.message or target


def _node_update(config: FacetConfig, mixed: tuple[int, ...], target: tuple[int, ...]) -> nn.Module:
    if config.node_update == "gate":
        return GateUpdate(target)
    if config.node_update == "linear":
        return EquivariantLinear(mixed, target)
    options = (config.activation, config.final_activation, config.mixer_normalization)
    if len(mixed) == 1:
        return ScalarUpdate(target[0], *options)
    if config.node_update == "sphere_grid":
        grid = (*config.grid, config.quadrature)
        return SphereGridUpdate(
            mixed, target, grid, config.mixer_hidden, config.mixer_heads, *options
        )
    return SphereProductUpdate(mixed, target, config.product_order, config.product_hidden)


def _unit_softplus(x: Tensor) -> Tensor:
    """softplus(x + ln(e − 1)), which is 1 at x = 0."""
    return nn.functional.softplus(x + 0.541324854612918)


def _lmax_edge(config: FacetConfig) -> int:
    if config.lmax_edge is not None:
        return config.lmax_edge
    return max(len(channels) for channels in (config.message or (), *config.hidden)) - 1


def _radial_basis(config: FacetConfig) -> nn.Module:
    if config.radial_basis == "gaussian":
        return GaussianBasis(config.n_radial, config.cutoff, config.cutoff / config.n_radial)
    step = torch.pi / config.cutoff if config.envelope == "polynomial" else 1.0
    return SineBasis([step * (n + 1) for n in range(config.n_radial)])
