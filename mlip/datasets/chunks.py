"""Read, check and encode the frames of a conversion in chunks, the same ones in any process.

A chunk is a run of frames of one file. Where it ends depends on the files alone, not on how many
processes share the work nor on where an interrupted run stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip.datasets.options import ReadOptions
from mlip.datasets.read import Entry, iterate_file, pick_entries
from mlip.datasets.statistics import Statistics
from mlip.datasets.structure import Array, Structure
from mlip.errors import DataError, InputError

CHUNK_FRAMES = 250
CHUNK_BYTES = 16 * 2**20
TASKS_PER_FILE = 200  # of formats with random access, which several processes can share
LONGEST_TASK = 8000  # frames
HINTS = 20


@dataclass(frozen=True)
class Job:
    """What every process of a conversion needs to know.

    Attributes:
        files: inputs in their order.
        lengths: frames of each input, None where the format only streams.
        options: how to read them.
        encode: gives the bytes of one structure as the output wants them.
        selected: for each input the frames that are wanted, [n] True or False; all if left out.
        accept: says why a structure is left out on purpose, None if it is wanted.
    """

    files: tuple[Path, ...]
    lengths: tuple[int | None, ...]
    options: ReadOptions
    encode: Callable[[Structure], bytes]
    selected: tuple[Array, ...] | None = None
    accept: Callable[[Structure], str | None] | None = None


class Task(NamedTuple):
    """Frames of one input for one process: up to ``stop``, or to the end of the file."""

    file: int
    start: int
    stop: int | None


class Place(NamedTuple):
    """Where a chunk begins: number of the input and frame."""

    file: int = 0
    frame: int = 0


@dataclass
class Chunk:
    """What came of a run of frames of one input.

    Attributes:
        file: number of the input.
        start: first frame.
        frames: number of frames.
        entries: bytes of the structures that are kept, in order.
        atoms: their numbers of atoms.
        bad: frame and reason of those that are not.
        damage: why the file cannot be read further.
        last: whether the input ends here.
        record: everything that is counted: statistics, label keys, what was not kept, hints.
    """

    file: int
    start: int
    frames: int = 0
    entries: list[bytes] = field(default_factory=list)
    atoms: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    damage: str | None = None
    last: bool = False
    record: dict[str, Any] = field(default_factory=dict)


def list_tasks(lengths: Sequence[int | None], place: Place) -> Iterator[Task]:
    """Divide the work from a place on; a place in the middle changes no later border."""
    for file in range(place.file, len(lengths)):
        start, length = (place.frame if file == place.file else 0), lengths[file]
        if not length:
            yield Task(file, start, length)
            continue
        size = CHUNK_FRAMES * min(
            LONGEST_TASK // CHUNK_FRAMES, 1 + length // (TASKS_PER_FILE * CHUNK_FRAMES)
        )
        while start < length:
            stop = min(length, start - start % size + size)
            yield Task(file, start, stop)
            start = stop


def read_task(job: Job, task: Task) -> Iterator[Chunk]:
    """Give the chunks of a task; a damaged file ends with a chunk that says so."""
    collected = _Collector(job, task.file, task.start)
    try:
        for entry in _entries(job, task):
            if collected.full(entry.frame):
                yield collected.finish(entry.frame)
                collected = _Collector(job, task.file, entry.frame)
            collected.add(entry)
    except DataError as error:
        collected.chunk.damage = str(error)
    last = task.stop == job.lengths[task.file] or collected.chunk.damage is not None
    yield collected.finish(task.stop, last)


def _entries(job: Job, task: Task) -> Iterator[Entry]:
    path = job.files[task.file]
    if task.stop is None:
        return iterate_file(path, job.options, task.start)
    if task.stop == 0:
        raise DataError(f"{path}: there are no structures in this file")
    if job.selected is None:
        return islice(iterate_file(path, job.options, task.start), task.stop - task.start)
    wanted = task.start + np.flatnonzero(job.selected[task.file][task.start : task.stop])
    return pick_entries(path, wanted.tolist(), job.options) if len(wanted) else iter(())


class _Collector:
    """Fill one chunk."""

    def __init__(self, job: Job, file: int, start: int) -> None:
        self.chunk = Chunk(file, start)
        self._job = job
        self._bytes = 0
        self._seen = start
        self._statistics = Statistics()
        self._labels: dict[str, Counter[str]] = {}
        self._not_kept: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._hints: dict[str, None] = {}

    def full(self, frame: int) -> bool:
        """Tell whether the next frame belongs to another chunk."""
        start = self.chunk.start
        crossed = frame // CHUNK_FRAMES > start // CHUNK_FRAMES
        return frame > start and (crossed or self._bytes >= CHUNK_BYTES)

    def add(self, entry: Entry) -> None:
        """Take a frame behind those before."""
        selected = self._job.selected
        self._seen = entry.frame + 1
        if selected is not None and not selected[self.chunk.file][entry.frame]:
            return
        structure, problem = entry.structure, entry.problem
        if structure is not None:
            try:
                reason = self._job.accept and self._job.accept(structure)
                if reason:
                    self._left_out[reason] += 1
                    return
                data = self._job.encode(structure)
                self._statistics.add(structure)
                self._keep(data, len(structure), entry)
                return
            except InputError as error:
                problem = f"{entry.name}: {error}"
        self.chunk.bad.append((entry.frame, problem or "unusable"))

    def _keep(self, data: bytes, n_atoms: int, entry: Entry) -> None:
        self._bytes += len(data)
        self.chunk.entries.append(data)
        self.chunk.atoms.append(n_atoms)
        for label, key in entry.used.items():
            self._labels.setdefault(label, Counter())[key] += 1
        self._not_kept.update(entry.not_kept)
        if len(self._hints) < HINTS:
            self._hints.update(dict.fromkeys(entry.hints))

    def finish(self, end: int | None, last: bool = False) -> Chunk:
        """Give the chunk with all that was counted; frames up to ``end`` belong to it."""
        chunk = self.chunk
        chunk.frames = (self._seen if end is None or chunk.damage else end) - chunk.start
        chunk.last = last
        taken = len(chunk.entries) + len(chunk.bad) + self._left_out.total()
        if chunk.frames > taken:
            self._left_out["not selected"] = chunk.frames - taken
        chunk.record = {
            "statistics": self._statistics.to_record(),
            "label_keys": {label: dict(counts) for label, counts in self._labels.items()},
            "not_kept": dict(self._not_kept),
            "left_out": dict(self._left_out),
            "hints": list(self._hints),
        }
        return chunk
