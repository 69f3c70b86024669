"""Graphs of data sets: surveyed once, kept in memory when they fit, else built when needed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from mlip.datasets import StructureStore, structure_to_graph
from mlip.datasets.dataset import ConcatenatedDataset, Dataset, SelectedDataset
from mlip.datasets.feed.mixture import Relabelled, appearance_weights, shift_of
from mlip.datasets.feed.noise import BatchNoise, PositionNoise, with_noise
from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.datasets.formats.native import is_lmdb
from mlip.datasets.policy import BadEntries
from mlip.datasets.read import expand
from mlip.datasets.sizes import UNKNOWN, known_edges
from mlip.datasets.structure import Structure
from mlip.errors import DataError, InputError
from mlip.graph import AtomicGraph, batch_graphs, pair_distances
from mlip.training.survey import Survey, Surveyor, join

HASHED_WHOLE = 256 << 20  # bytes; of larger files only the two ends are hashed
_HASHED_ENDS = 8 << 20


@dataclass
class Part:
    """The part of one data set that belongs to the training, validation or test set.

    Attributes:
        name: of the data set.
        dataset: its usable structures.
        survey: what is in it.
        graphs: graph of every structure, None if they are not kept.
        weight: expected appearances of a structure in an epoch.
        too_large: number of structures left out for their number of edges.
    """

    name: str
    dataset: Dataset
    survey: Survey
    graphs: list[AtomicGraph] | None
    weight: float = 1.0
    too_large: int = 0

    def shift_energies(self, by: Mapping[int, float]) -> None:
        """Add ``by[z]`` eV to the energies for each atom of element z."""
        self.dataset = Relabelled(self.dataset, energy_shift=by)
        self.survey = self.survey.shifted(dict(by))
        for graph in self.graphs or ():
            graph.energy = graph.energy + shift_of(graph.atomic_numbers.numpy(), by)


class GraphSet(TorchDataset[AtomicGraph]):
    """A training, validation or test set as graphs; `survey` tells what is in it.

    Args:
        parts: one or more data sets, one after the other.
        cutoff: neighbour cutoff of the graphs, Å.
    """

    def __init__(self, parts: Sequence[Part], cutoff: float) -> None:
        self.parts = list(parts)
        self.cutoff = cutoff
        self.refresh()

    def refresh(self) -> None:
        """Take up changes of the parts."""
        datasets = [part.dataset for part in self.parts]
        self.dataset: Dataset = datasets[0] if len(datasets) == 1 else ConcatenatedDataset(datasets)
        self.survey = join([part.survey for part in self.parts])
        self.graphs: list[AtomicGraph] | None = []
        for part in self.parts:
            if part.graphs is None or self.graphs is None:
                self.graphs = None
            else:
                self.graphs += part.graphs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> AtomicGraph:
        if self.graphs is not None:
            return self.graphs[i]
        return structure_to_graph(self.dataset[i], self.cutoff, index=i)

    def name(self, i: int) -> str:
        """Name the file and frame that graph `i` comes from."""
        return self.dataset.name(i)

    def weights(self) -> NDArray[np.float32] | None:
        """Give expected appearances of each structure in an epoch; None if all are 1."""
        return appearance_weights(
            [len(part.dataset) for part in self.parts], [part.weight for part in self.parts]
        )


class GraphMemory:
    """Bytes that graphs of one set may still take.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float) -> None:
        self.left = limit

    def take(self, graph: AtomicGraph) -> bool:
        """Count a graph in; tell whether all so far fit."""
        tensors = (v for v in graph.to_dict().values() if isinstance(v, torch.Tensor))
        self.left -= sum(v.nbytes for v in tensors)
        return self.left >= 0


def survey_part(
    name: str,
    dataset: Dataset,
    cutoff: float,
    memory: GraphMemory,
    bad: BadEntries,
    *,
    start: int = 0,
    weight: float = 1.0,
    max_edges: int | None = None,
) -> Part:
    """Read all structures once: survey them and keep their graphs while there is room.

    Where graphs are not kept, edges that were counted before (``mlip data index``) are not
    counted again.

    Args:
        name: of the data set.
        dataset: structures.
        cutoff: neighbour cutoff, Å.
        memory: room for graphs.
        bad: what to do with structures that cannot be used.
        start: `index` of the first graph.
        weight: expected appearances of a structure in an epoch.
        max_edges: larger structures are left out; None keeps all.

    Raises:
        DataError: a structure cannot be used and `bad` says to raise.
    """
    surveyor = Surveyor()
    graphs: list[AtomicGraph] = []
    good: list[int] = []
    keep, too_large = memory.left >= 0, 0
    known = known_edges(dataset, cutoff)
    for i, structure in _usable(dataset, bad):
        try:
            if keep:
                graph = structure_to_graph(structure, cutoff, index=start + len(good))
                n_edges = graph.edge_index.shape[1]
            else:
                graphs.clear()
                n_edges = _count_edges(structure, cutoff) if known[i] == UNKNOWN else int(known[i])
        except InputError as error:
            _take(bad, dataset.name(i), error)
            continue
        if max_edges is not None and n_edges > max_edges:
            too_large += 1
            continue
        if keep:
            graphs.append(graph)
            keep = memory.take(graph)
        surveyor.add(structure, n_edges)
        good.append(i)
    if len(good) < len(dataset):
        dataset = SelectedDataset(dataset, np.array(good, dtype=np.int64))
    kept = graphs if keep else None
    return Part(name, dataset, surveyor.result(), kept, weight, too_large)


def _count_edges(structure: Structure, cutoff: float) -> int:
    s = structure
    return len(pair_distances(s.positions, s.cell, s.pbc, cutoff)[1])


def _usable(dataset: Dataset, bad: BadEntries) -> Iterator[tuple[int, Structure]]:
    for i in range(len(dataset)):
        try:
            structure = dataset[i]
        except InputError as error:
            _take(bad, dataset.name(i), error)
        else:
            yield i, structure


def _take(bad: BadEntries, name: str, error: InputError) -> None:
    hint = " (data.on_bad=skip trains without such structures)" if bad.policy == "raise" else ""
    bad.add(name, f"{error}{hint}")


def loader(
    graphs: GraphSet,
    sampler: EdgeBudgetSampler,
    *,
    workers: int = 0,
    start_method: str | None = None,
    noise: PositionNoise | None = None,
) -> Iterable[AtomicGraph]:
    """Give batches in the order of `sampler`; graphs that are not in memory are built.

    Args:
        graphs: set to draw from.
        sampler: which structures make a batch.
        workers: processes that read and build; 0 does it here.
        start_method: how they start, None for the platform's way.
        noise: corrupts positions; None leaves them alone.
    """
    if graphs.graphs is None:
        from mlip.datasets.feed.loader import make_loader

        return make_loader(
            graphs.dataset, sampler, graphs.cutoff,
            workers=workers, start_method=start_method, noise=noise,
        )  # fmt: skip
    return _InMemory(graphs, sampler, noise)


class _InMemory:
    """Batches of graphs that are in memory, pass after pass."""

    def __init__(
        self, graphs: GraphSet, sampler: EdgeBudgetSampler, noise: PositionNoise | None
    ) -> None:
        self.graphs, self.order, self.noise = graphs, sampler, noise  # Lightning asks for .sampler

    def __iter__(self) -> Iterator[AtomicGraph]:
        return (self._batch(*task) for task in with_noise(self.order, self.noise))

    def _batch(self, noise: BatchNoise | None, indices: list[int]) -> AtomicGraph:
        graphs = [self.graphs[i] for i in indices]
        return batch_graphs(graphs) if noise is None else noise.corrupt_graphs(graphs)


def describe_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, size and identity of data files, for the checkpoint and to check a resume.

    The identity is the SHA-256 of the content; for a native store its fingerprint (checksums of
    all entries); for other large files the time of the last change and the SHA-256 of both ends.
    """
    return [_describe(path) for path in expand(list(paths))]


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    described: dict[str, Any] = {"name": path.name, "bytes": status.st_size}
    if status.st_size <= HASHED_WHOLE:
        return {**described, "sha256": _sha256(path, status.st_size)}
    if is_lmdb(path):
        with contextlib.suppress(DataError):  # raised by LMDB files that are no native store
            return {**described, "fingerprint": StructureStore(path).fingerprint()}
    ends = _sha256(path, _HASHED_ENDS) + _sha256(path, _HASHED_ENDS, -_HASHED_ENDS)
    return {**described, "modified_ns": status.st_mtime_ns, "sha256_of_ends": ends}


def _sha256(path: Path, length: int, start: int = 0) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start, 2 if start < 0 else 0)
        while length > 0 and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
