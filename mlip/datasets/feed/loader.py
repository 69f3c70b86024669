"""Batches of graphs in the order of a sampler, read and built here or in worker processes."""

from __future__ import annotations

import multiprocessing
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Batch

from mlip.datasets.dataset import ConcatenatedDataset, Dataset, SelectedDataset
from mlip.datasets.feed.flat import FlatBatch
from mlip.datasets.feed.noise import BatchNoise, PositionNoise, with_noise
from mlip.datasets.store import StructureStore
from mlip.errors import InputError, MlipError

Task = tuple[BatchNoise | None, list[int]]


def read_batch(
    dataset: Dataset,
    indices: Sequence[int],
    cutoff: float | None,
    noise: BatchNoise | None = None,
) -> FlatBatch:
    """Read some structures of a data set as one batch; the fastest way it allows.

    Args:
        dataset: opened data set; entries of native stores, also in parts of it, are not even
            made into structures.
        indices: places in the data set.
        cutoff: Å; neighbour lists are built if given.
        noise: moves atoms before neighbours are found.

    Raises:
        DataError: an entry cannot be used; the text names file and entry.
    """
    places: dict[int, tuple[Dataset, list[int], list[int]]] = {}
    for k, index in enumerate(indices):
        base, place = _resolve(dataset, operator.index(index))
        _, wanted, slots = places.setdefault(id(base), (base, [], []))
        wanted.append(place)
        slots.append(k)
    if not all(isinstance(base, StructureStore) for base, _, _ in places.values()):
        structures = [dataset[i] for i in indices]
        return FlatBatch.from_structures(structures, indices, cutoff, dataset.name, noise)
    entries: list[bytes] = [b""] * len(indices)
    for base, wanted, slots in places.values():
        assert isinstance(base, StructureStore)
        for k, data in zip(slots, base.read_bytes(wanted), strict=True):
            entries[k] = data
    return FlatBatch.from_bytes(entries, indices, cutoff, dataset.name, noise)


def _resolve(dataset: Dataset, index: int) -> tuple[Dataset, int]:
    """Find the data set below selections and concatenations that holds a structure."""
    if isinstance(dataset, SelectedDataset):
        return _resolve(dataset.base, int(dataset.indices[index]))
    if isinstance(dataset, ConcatenatedDataset):
        part, place = dataset.locate(index)
        return _resolve(dataset.parts[part], place)
    return dataset, index


class GraphLoader:
    """Yields batches of graphs, pass after pass; made by :func:`make_loader`."""

    def __init__(
        self, groups: DataLoader[list[FlatBatch | MlipError]], device: torch.device
    ) -> None:
        self._groups = groups
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        return map(self._widen, chain.from_iterable(iter(self._groups)))

    def close(self) -> None:
        """End the workers; left to the garbage collector, each of them is waited for 5 s."""
        iterator, self._groups._iterator = self._groups._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _widen(self, found: FlatBatch | MlipError) -> Batch:
        if isinstance(found, MlipError):
            try:
                raise found
            finally:
                del found  # the cycle error, traceback, frame would delay the end of the workers
        if self._device.type != "cpu":
            found = found.to(self._device, non_blocking=True)
        return found.to_graph()


def make_loader(
    dataset: Dataset,
    sampler: Iterable[list[int]],
    cutoff: float | None,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    start_method: str | None = None,
    prefetch: int = 8,
    noise: PositionNoise | None = None,
) -> GraphLoader:
    """Give batches of graphs in the order of a sampler; neighbour lists are built on the way.

    Every pass takes the position that the sampler has when the pass begins; what workers read
    ahead of an abandoned pass is thrown away. Workers live as long as the loader, open the files
    themselves and send a batch as one tensor.

    Args:
        dataset: opened data set.
        sampler: gives lists of places in the data set, such as
            :class:`~mlip.datasets.feed.packing.EdgeBudgetSampler`.
        cutoff: neighbour cutoff, Å; None for graphs without edges.
        workers: processes that read and build; 0 does it here.
        device: where the graphs are made. For a CUDA device batches are pinned, cross in one
            copy and are widened there.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; None for Python's choice.
        prefetch: batches that each worker reads ahead; half of them travel as one message, which
            costs the main process less than single ones.
        noise: moves atoms before neighbours are found; the sampler must tell ``epoch`` and
            ``step``, as the one above does.

    Raises:
        DataError: while iterating, for an entry that cannot be used; names file and entry.
        InputError: an unknown start method.
    """
    group = max(prefetch // 2, 1) if workers else 1
    known = multiprocessing.get_all_start_methods()
    if start_method is not None and start_method not in known:
        raise InputError(f"start method {start_method!r} is not one of {', '.join(known)}")
    groups: DataLoader[Any] = DataLoader(
        _Groups(dataset, cutoff),
        sampler=_Order(sampler, group, noise),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context=start_method if workers else None,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # else the loader draws from the global generator
    )
    return GraphLoader(groups, torch.device(device))


class _Groups(torch.utils.data.Dataset[Any]):
    """Groups of batches by their lists of places, as torch's DataLoader asks for them.

    Errors on purpose are handed over as values: torch would bury their text in a traceback.
    """

    def __init__(self, dataset: Dataset, cutoff: float | None) -> None:
        self.dataset = dataset
        self.cutoff = cutoff

    def __getitem__(self, group: list[Task]) -> list[FlatBatch | MlipError]:
        found: list[FlatBatch | MlipError] = []
        for noise, indices in group:
            try:
                found.append(read_batch(self.dataset, indices, self.cutoff, noise))
            except MlipError as error:
                return [*found, error]
        return found


class _Order(torch.utils.data.Sampler[Any]):
    """Groups of batches of a sampler; without a length, which changes from epoch to epoch."""

    def __init__(
        self, sampler: Iterable[list[int]], group: int, noise: PositionNoise | None
    ) -> None:
        self.sampler = sampler
        self.group = group
        self.noise = noise

    def __iter__(self) -> Iterator[list[Task]]:
        batches = with_noise(self.sampler, self.noise)
        return iter(lambda: list(islice(batches, self.group)), [])


def _unchanged(batch: Any) -> Any:
    return batch
