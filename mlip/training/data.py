"""Graphs of a data set: built once, kept in memory when they fit, batched by edge budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mlip.datasets import LabelKeys, open_dataset, split_indices, structure_to_graph
from mlip.errors import DataError, InputError
from mlip.graph import AtomicGraph, batch_graphs
from mlip.training.config import DataConfig
from mlip.training.sampler import EdgeBudgetSampler


@dataclass(frozen=True)
class Survey:
    """What one pass over a set of structures found.

    Attributes:
        n_atoms: [n].
        n_edges: [n] directed edges within the cutoff.
        energies: [n] eV, NaN where missing.
        forces_square: sum of squared force components, (eV/Å)².
        forces_count: number of force components.
        stress_count: structures with a stress label and three periodic directions.
        elements: atomic numbers found, ascending.
        counts: [n, n_elements] atoms of each element.
    """

    n_atoms: NDArray[np.int64]
    n_edges: NDArray[np.int64]
    energies: NDArray[np.float64]
    forces_square: float
    forces_count: int
    stress_count: int
    elements: tuple[int, ...]
    counts: NDArray[np.int32]

    @property
    def average_neighbors(self) -> float:
        """Mean number of neighbours of an atom."""
        return float(self.n_edges.sum() / self.n_atoms.sum())

    @property
    def forces_rms(self) -> float:
        """Root mean square force component, eV/Å; 0 without force labels."""
        return float(np.sqrt(self.forces_square / max(self.forces_count, 1)))


class GraphSet(Dataset[AtomicGraph]):
    """A part of an opened data set as graphs; `survey` tells what is in it.

    Args:
        dataset: opened data set.
        indices: which of its structures belong to this part.
        cutoff: neighbour cutoff, Å.
        memory_limit: bytes of graphs that may be kept; beyond it they are built when needed.
    """

    def __init__(
        self, dataset: Any, indices: Sequence[int], cutoff: float, memory_limit: float
    ) -> None:
        self.dataset = dataset
        self.indices = [int(i) for i in indices]
        self.cutoff = cutoff
        self.graphs: list[AtomicGraph] | None = []
        self.survey = self._pass(memory_limit)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> AtomicGraph:
        if self.graphs is not None:
            return self.graphs[i]
        return structure_to_graph(self.dataset[self.indices[i]], self.cutoff, index=i)

    def name(self, i: int) -> str:
        """Name the file and frame that graph `i` comes from."""
        return str(self.dataset.name(self.indices[i]))

    def _pass(self, memory_limit: float) -> Survey:
        atoms, edges, energies = [], [], []
        compositions: list[tuple[NDArray[Any], NDArray[Any]]] = []
        square, components, stresses, size = 0.0, 0, 0, 0
        for i, place in enumerate(self.indices):
            structure = self.dataset[place]
            graph = structure_to_graph(structure, self.cutoff, index=i)
            atoms.append(len(structure))
            edges.append(graph.edge_index.shape[1])
            energies.append(float(graph.energy[0]))
            compositions.append(np.unique(structure.numbers, return_counts=True))
            if structure.forces is not None:
                square += float(np.square(structure.forces).sum())
                components += structure.forces.size
            stresses += not bool(torch.isnan(graph.stress).any())
            size += sum(v.nbytes for v in graph.to_dict().values() if isinstance(v, torch.Tensor))
            if self.graphs is not None:
                self.graphs.append(graph)
            if size > memory_limit:
                self.graphs = None
        elements, counts = _composition_table(compositions)
        return Survey(
            np.array(atoms, dtype=np.int64),
            np.array(edges, dtype=np.int64),
            np.array(energies),
            square,
            components,
            stresses,
            elements,
            counts,
        )


def _composition_table(
    compositions: list[tuple[NDArray[Any], NDArray[Any]]],
) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    elements = tuple(sorted({int(z) for numbers, _ in compositions for z in numbers}))
    column = {z: i for i, z in enumerate(elements)}
    counts = np.zeros((len(compositions), len(elements)), dtype=np.int32)
    for row, (numbers, found) in enumerate(compositions):
        counts[row, [column[int(z)] for z in numbers]] = found
    return elements, counts


@dataclass(frozen=True)
class Splits:
    """Training, validation and (if any) test part."""

    train: GraphSet
    valid: GraphSet
    test: GraphSet | None


def open_splits(config: DataConfig, cutoff: float, seed: int) -> Splits:
    """Read the data sets of a run and build their graphs.

    Raises:
        DataError: a file that cannot be read, or a training or validation set without labels.
        InputError: unknown label keys.
    """
    keys = _label_keys(config.keys)
    limit = config.memory_limit_GB * 1e9
    dataset = open_dataset(list(config.train), keys=keys)
    if config.valid is None:
        if len(dataset) < 2:
            raise DataError(
                f"{config.train[0]} holds {len(dataset)} structure: at least 2 are needed, one to "
                "validate on; or name a validation set  (data.valid)"
            )
        chosen, held_out = split_indices(len(dataset), config.valid_fraction, seed)
        train = GraphSet(dataset, chosen.tolist(), cutoff, limit)
        valid = GraphSet(dataset, held_out.tolist(), cutoff, limit)
    else:
        train = GraphSet(dataset, range(len(dataset)), cutoff, limit)
        valid = _open_whole(config.valid, keys, cutoff, limit)
    test = _open_whole(config.test, keys, cutoff, limit) if config.test else None
    for part, name in ((train, "train"), (valid, "valid"), (test, "test")):
        if part is not None:
            _check_labels(part, f"data.{name}")
    return Splits(train, valid, test)


def _open_whole(
    paths: tuple[str, ...], keys: LabelKeys | None, cutoff: float, limit: float
) -> GraphSet:
    dataset = open_dataset(list(paths), keys=keys)
    return GraphSet(dataset, range(len(dataset)), cutoff, limit)


def _label_keys(keys: dict[str, str] | None) -> LabelKeys | None:
    if keys is None:
        return None
    known = tuple(LabelKeys.__dataclass_fields__)
    unknown = [name for name in keys if name not in known]
    if unknown:
        raise InputError(f"data.keys: unknown label {unknown[0]!r}, known: {', '.join(known)}")
    return LabelKeys(**keys)


def _check_labels(part: GraphSet, name: str) -> None:
    found = part.survey
    if len(part) == 0:
        raise DataError(f"{name} holds no structures")
    if np.isnan(found.energies).all() and not found.forces_count and not found.stress_count:
        raise DataError(
            f"{name}: none of {len(part)} structures has an energy, forces or stress; name the "
            "keys that hold them (data.keys), or look at them with  mlip convert"
        )


def loader(
    graphs: GraphSet, sampler: EdgeBudgetSampler, *, workers: int = 0
) -> DataLoader[AtomicGraph]:
    """Give batches in the order of `sampler`; workers only build graphs that are not in memory."""
    workers = workers if graphs.graphs is None else 0
    return DataLoader(
        graphs,
        batch_sampler=_Batches(sampler),
        collate_fn=batch_graphs,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else the loader draws from the global generator
    )


class _Batches:
    """The batches of a sampler without a length, which changes from epoch to epoch."""

    def __init__(self, sampler: EdgeBudgetSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Any:
        return iter(self.sampler)


def describe_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, size and SHA-256 of data files, for the checkpoint and to check a resume."""
    from mlip.datasets.read import expand

    described = []
    for path in expand(list(paths)):
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        size = Path(path).stat().st_size
        described.append({"name": Path(path).name, "bytes": size, "sha256": digest.hexdigest()})
    return described
