"""Noise on the positions of a batch, for training that denoises (DeNS, arXiv 2403.09549).

What is drawn depends on the seed, the place of the batch in the run and the structure alone: not
on processes that read, nor on what was drawn before, so that a resumed run draws the same again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from mlip.datasets.feed.columns import Columns
from mlip.datasets.structure import Array
from mlip.graph import AtomicGraph, batch_graphs, neighbor_list

_COIN, _ATOMS = 0xC014, 0xA703  # keep the streams apart from each other and from the sampler's


@dataclass(frozen=True)
class PositionNoise:
    """How positions are corrupted; `DenoisingConfig` has the published values.

    Attributes:
        seed: of all draws.
        probability: of noise in a batch; one draw for all processes of a step.
        ratio: probability of an atom to be selected in a batch with noise.
        sigma: standard deviation of each component of a displacement, Å.
        strict_max_ratio: a structure with a larger fraction of selected atoms is left alone.
        max_force: so is one with a larger force on any atom, eV/Å; None for no limit.
    """

    seed: int
    probability: float
    ratio: float
    sigma: float
    strict_max_ratio: float
    max_force: float | None

    def at(self, epoch: int, step: int) -> BatchNoise | None:
        """Give the noise of the batches at a place in the run, None if they have none."""
        draw = np.random.default_rng([_COIN, self.seed, epoch, step]).random()
        return BatchNoise(self, epoch, step) if draw < self.probability else None


class Displacements(NamedTuple):
    """Noise of one structure, in units of σ.

    noise: [N, 3], zero where not corrupted. mask: [N] bool, the corrupted atoms.
    """

    noise: Array
    mask: Array


@dataclass(frozen=True)
class BatchNoise:
    """The noise of the batches at one place in the run; small enough to send to workers."""

    recipe: PositionNoise
    epoch: int
    step: int

    def draw(self, index: int, forces: Array, fixed: Array) -> Displacements | None:
        """Draw the noise of a structure; None if it is left alone.

        Args:
            index: place of the structure in the data set.
            forces: [N, 3] eV/Å; a structure without all of them is left alone.
            fixed: [N] bool; such atoms do not move.
        """
        recipe = self.recipe
        size = np.sqrt(np.square(forces).sum(1).max(initial=0.0))
        if np.isnan(size) or (recipe.max_force is not None and size > recipe.max_force):
            return None
        random = np.random.default_rng([_ATOMS, recipe.seed, self.epoch, self.step, index])
        selected = random.random(len(forces)) < recipe.ratio
        if selected.mean() > recipe.strict_max_ratio:
            return None
        mask = selected & ~fixed
        noise = np.where(mask[:, None], random.standard_normal((len(forces), 3)), 0.0)
        return Displacements(noise, mask)

    def corrupt_columns(
        self, columns: Columns, n_atoms: Sequence[int], indices: Sequence[int]
    ) -> None:
        """Move the positions of many structures and add ``noise``, ``noise_mask``, ``noisy``."""
        total = sum(n_atoms)
        forces = np.asarray(columns["forces"], dtype=np.float64).reshape(total, 3)
        fixed = columns["fixed"].reshape(total) != 0
        noise, mask = np.zeros((total, 3)), np.zeros(total, dtype=np.uint8)
        noisy = np.zeros(len(n_atoms), dtype=np.uint8)
        begin = 0
        for k, count in enumerate(n_atoms):
            part = slice(begin, begin + count)
            begin += count
            found = self.draw(int(indices[k]), forces[part], fixed[part])
            if found is not None:
                noise[part], mask[part], noisy[k] = *found, 1
        positions = np.asarray(columns["positions"], dtype=np.float64).reshape(total, 3)
        columns["positions"] = positions + self.recipe.sigma * noise
        columns.update(noise=noise, noise_mask=mask, noisy=noisy)

    def corrupt_graphs(self, graphs: Sequence[AtomicGraph]) -> Batch:
        """Join graphs to a batch after moving atoms and finding their neighbours anew."""
        changed, noises, masks, noisy = [], [], [], []
        for graph in graphs:
            found = self.draw(int(graph.index), graph.forces.numpy(), graph.fixed.numpy())
            noisy.append(found is not None)
            if found is None:
                count = len(graph.positions)
                found = Displacements(np.zeros((count, 3)), np.zeros(count, dtype=np.bool_))
            else:
                graph = _moved(graph, self.recipe.sigma * found.noise)
            changed.append(graph)
            noises.append(torch.from_numpy(found.noise))
            masks.append(torch.from_numpy(found.mask))
        batch = batch_graphs(changed)
        mark_noise(batch, torch.cat(noises), torch.cat(masks), torch.tensor(noisy))
        return batch


def mark_noise(batch: Batch, noise: Tensor, mask: Tensor, noisy: Tensor) -> None:
    """Add to a batch what a model that denoises reads, and what it shall predict.

    Args:
        batch: graphs with the corrupted positions and the forces of the clean ones.
        noise: [N, 3] displacements in units of σ.
        mask: [N] bool, corrupted atoms.
        noisy: [B] bool, structures that were not left alone.
    """
    batch.noise, batch.noise_mask, batch.noisy = noise, mask, noisy
    batch.clean_forces = torch.where(mask[:, None], batch.forces, 0.0)


def with_noise(
    sampler: Any, noise: PositionNoise | None
) -> Iterator[tuple[BatchNoise | None, list[int]]]:
    """Give the batches of a sampler, each with its noise.

    Args:
        sampler: gives lists of places in the data set; with noise, it also has the ``epoch`` and
            ``step`` at which a pass begins.
        noise: None for none at all.
    """
    if noise is None:
        return ((None, indices) for indices in sampler)
    epoch, first = sampler.epoch, sampler.step
    return ((noise.at(epoch, step), indices) for step, indices in enumerate(sampler, first))


def _moved(graph: AtomicGraph, displacements: Array) -> AtomicGraph:
    """Copy a graph with other positions and their neighbours."""
    moved = copy.copy(graph)
    positions = graph.positions.numpy() + displacements
    edge_index, edge_shift = neighbor_list(
        positions, graph.cell[0].numpy(), graph.pbc[0].numpy(), float(graph.cutoff)
    )
    moved.positions = torch.from_numpy(positions)
    moved.edge_index = torch.from_numpy(edge_index)
    moved.edge_shift = torch.from_numpy(edge_shift)
    return moved
