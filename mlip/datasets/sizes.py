"""Count atoms and edges of every structure once, and remember the counts beside the data."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mlip.datasets.dataset import ConcatenatedDataset, Dataset, SelectedDataset
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Array
from mlip.errors import DataError, InputError, MlipError
from mlip.files import atomic_write
from mlip.graph import pair_distances

Counts = NDArray[np.uint32]
Progress = Callable[[int, int], None]
UNKNOWN = np.uint32(2**32 - 1)  # not counted yet
_CHUNK = 64  # structures that a process counts at a time
_SAVE_EVERY = 60.0  # seconds


def count_atoms(dataset: Dataset) -> Counts:
    """Give the number of atoms of every structure, [len] uint32; of a native store without a copy.

    Formats that have to read every entry for it are read once: the counts are kept in
    ``<file>.atoms.npz``.
    """
    if isinstance(dataset, StructureStore):
        return dataset.sizes
    if isinstance(dataset, SelectedDataset):
        return count_atoms(dataset.base)[dataset.indices]
    if isinstance(dataset, ConcatenatedDataset):
        return np.concatenate([count_atoms(part) for part in dataset.parts] or [_none_known(0)])
    file = _side_file(dataset, "atoms")
    known = _load(file, dataset)
    if (known == UNKNOWN).any():
        known = np.asarray(dataset.n_atoms()).astype(np.uint32)
        _save(file, dataset, known)
    return known


def count_edges(
    dataset: Dataset, cutoff: float, progress: Progress | None = None, workers: int = 0
) -> Counts:
    """Give the number of directed edges within a cutoff of every structure, [len] uint32.

    Counted once and kept in ``<file>.edges-<cutoff>.npz`` as long as the file holds the same
    entries; a count that was killed goes on from there. A folder that cannot be written, or data
    that is in no file, costs only the time of counting again.

    Args:
        dataset: opened data set; of a selection only the chosen structures are counted.
        cutoff: Å.
        progress: called with the number of structures counted and to count.
        workers: processes that count; 0 counts here.

    Raises:
        DataError: a structure cannot be read or has no neighbour list; names file and entry.
    """
    counts = np.empty(len(dataset), dtype=np.uint32)
    for base, places, slots in _bases(dataset, np.arange(len(dataset)), slice(None)):
        counts[slots] = _counted(base, places, cutoff, progress, workers)
    return counts


def known_edges(dataset: Dataset, cutoff: float) -> Counts:
    """Give the edges within a cutoff (Å) that were counted before, [len]; `UNKNOWN` for the others.

    Reads no structure.
    """
    counts = _none_known(len(dataset))
    for base, places, slots in _bases(dataset, np.arange(len(dataset)), slice(None)):
        counts[slots] = _load(_edges_file(base, cutoff), base)[places]
    return counts


def _bases(dataset: Dataset, places: Array, slots: Any) -> Iterator[tuple[Dataset, Array, Any]]:
    """Find the data sets below selections and concatenations, with the places asked for."""
    if isinstance(dataset, SelectedDataset):
        yield from _bases(dataset.base, dataset.indices[places], slots)
    elif isinstance(dataset, ConcatenatedDataset):
        position = np.arange(len(places))
        first = 0
        for part in dataset.parts:
            inside = (places >= first) & (places < first + len(part))
            target = position[inside] if isinstance(slots, slice) else slots[inside]
            yield from _bases(part, places[inside] - first, target)
            first += len(part)
    elif hasattr(dataset, "base"):  # the same structures with other labels
        yield from _bases(dataset.base, places, slots)
    else:
        yield dataset, places, slots


def _counted(
    dataset: Dataset, places: Array, cutoff: float, progress: Progress | None, workers: int
) -> Counts:
    file = _edges_file(dataset, cutoff)
    known = _load(file, dataset)
    wanted = np.unique(places)
    missing = wanted[known[wanted] == UNKNOWN]
    chunks = [missing[i : i + _CHUNK] for i in range(0, len(missing), _CHUNK)]
    saved, done = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        for chunk, counts in _count_all(dataset, chunks, cutoff, workers, stack):
            known[chunk] = counts
            done += len(chunk)
            if progress is not None:
                progress(done, len(missing))
            if time.monotonic() - saved > _SAVE_EVERY:
                _save(file, dataset, known)
                saved = time.monotonic()
    if len(missing):
        _save(file, dataset, known)
    return known[places]


def _count_all(
    dataset: Dataset,
    chunks: list[Array],
    cutoff: float,
    workers: int,
    stack: contextlib.ExitStack,
) -> Iterator[tuple[Array, Counts]]:
    """Count chunk after chunk, here or in processes that open the files themselves."""
    if workers < 1 or len(chunks) < 2:
        return ((chunk, _count(dataset, chunk, cutoff)) for chunk in chunks)
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)), multiprocessing.get_context("spawn"), _take_dataset,
        (dataset, cutoff),
    )  # fmt: skip
    stack.callback(pool.shutdown, cancel_futures=True)
    return zip(chunks, pool.map(_count_chunk, chunks), strict=True)


_task: tuple[Dataset, float]  # of a counting process


def _take_dataset(dataset: Dataset, cutoff: float) -> None:
    global _task
    _task = (dataset, cutoff)


def _count_chunk(chunk: Array) -> Counts:
    dataset, cutoff = _task
    return _count(dataset, chunk, cutoff)


def _count(dataset: Dataset, chunk: Array, cutoff: float) -> Counts:
    counts = np.empty(len(chunk), dtype=np.uint32)
    for k, place in enumerate(chunk.tolist()):
        s = dataset[place]
        try:
            counts[k] = len(pair_distances(s.positions, s.cell, s.pbc, cutoff)[1])
        except InputError as error:
            raise DataError(f"{dataset.name(place)}: {error}") from None
    return counts


def _side_file(dataset: Dataset, kind: str) -> Path | None:
    path = getattr(dataset, "path", None)
    return None if path is None else Path(path).with_name(f"{Path(path).name}.{kind}.npz")


def _edges_file(dataset: Dataset, cutoff: float) -> Path | None:
    return _side_file(dataset, f"edges-{cutoff:.17g}")


def _none_known(length: int) -> Counts:
    return np.full(length, UNKNOWN, dtype=np.uint32)


def _load(file: Path | None, dataset: Dataset) -> Counts:
    """Read kept counts; what is not known, damaged or of other data is `UNKNOWN`."""
    nothing = _none_known(len(dataset))
    if file is None or not file.exists():
        return nothing
    try:
        with np.load(file, allow_pickle=False) as content:
            counts, of_data = content["counts"], str(content["fingerprint"])
    except (OSError, ValueError, KeyError, BadZipFile, EOFError, AttributeError):
        return nothing
    fits = counts.dtype == np.uint32 and counts.shape == nothing.shape
    return counts if fits and of_data == dataset.fingerprint() else nothing


def _save(file: Path | None, dataset: Dataset, counts: Counts) -> None:
    if file is None:
        return
    with contextlib.suppress(MlipError), atomic_write(file) as opened:
        np.savez(opened, counts=counts, fingerprint=np.array(dataset.fingerprint()))
