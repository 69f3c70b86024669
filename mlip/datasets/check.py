"""Look through a data set without writing one: every entry is read, the bad ones are counted.

Reading never stops at the first error. What was found is a :class:`CheckReport`
(check_report.py), a page on the terminal and JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlip.datasets.check_report import CheckedFile, CheckReport, draw_up
from mlip.datasets.dataset import Dataset
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import Entry, PathLike, expand, find_reader, iterate_file, pick_entries
from mlip.datasets.structure import Array
from mlip.datasets.tally import Tally
from mlip.errors import DataError, InputError

OnEntry = Callable[[int, int | None, int], None]


def check(
    paths: PathLike | Sequence[PathLike],
    options: ReadOptions | None = None,
    *,
    cutoff: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_entry: OnEntry | None = None,
) -> CheckReport:
    """Read data files of any known format and report what is in them and what is wrong.

    Args:
        paths: files, folders or patterns.
        options: label keys, and what energies and IS2RE frames are meant to be.
        cutoff: also count neighbours within this distance, Å.
        limit: check no more than this many entries: a random sample where the format has random
            access, else the first ones of each file.
        seed: of the sample.
        on_entry: called after each entry with the entries done, their number in all (None where
            it is not known), and the bad ones so far.

    Raises:
        DataError: there are no such files.
    """
    options = options or ReadOptions()
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    files = [_look(path, options) for path in expand(paths)]
    places = _sample(files, limit, seed)
    known = all(file.entries is not None or file.unreadable for file in files)
    total = sum(map(len, places.values())) if known else None
    tally = Tally(cutoff)
    for number, file in enumerate(files):
        if file.unreadable:
            continue
        for entry in _entries(file, places.get(number), limit, options):
            file.bad += not tally.take(entry, number)
            file.checked += 1
            if on_entry is not None:
                on_entry(tally.done, total, tally.bad)
    return draw_up(files, tally, options, limit, seed)


def _look(path: Path, options: ReadOptions) -> CheckedFile:
    """Find the format of a file; open it once if it has random access, which costs little."""
    file = CheckedFile(str(path))
    try:
        reader = find_reader(path)
        file.format, file.bytes = reader.name, path.stat().st_size
        if reader.open is None:
            file.facts = reader.facts(options) if reader.facts is not None else None
        else:
            dataset = reader.open(path, options)
            file.entries, file.facts = len(dataset), dataset.facts
            file.problems = list(dataset.facts.problems)
            file.fields = _fields(dataset)
    except DataError as error:
        file.unreadable = str(error)
    return file


def _fields(dataset: Dataset) -> dict[str, str]:
    """Name type and shape of what the first entry holds, where the format shows it."""
    raw = getattr(dataset, "raw", None)
    if raw is None:
        return {}
    try:
        return {k: describe(value) for k, value in raw(0).items() if value is not None}
    except DataError:
        return {}


def describe(value: Any) -> str:
    """Name a stored value: ``int``, ``float64``, ``float32[14, 3]``."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return value.dtype.name if isinstance(value, np.generic) else type(value).__name__


def _sample(files: list[CheckedFile], limit: int | None, seed: int) -> dict[int, Array]:
    """Choose the entries of each file with random access."""
    numbers = [i for i, file in enumerate(files) if file.entries is not None]
    lengths = np.array([files[i].entries for i in numbers], dtype=np.int64)
    n = int(lengths.sum())
    if limit is None or limit >= n:
        return {i: np.arange(length) for i, length in zip(numbers, lengths, strict=True)}
    sample = np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))
    starts = np.cumsum(lengths) - lengths
    parts = np.split(sample, np.searchsorted(sample, starts[1:]))
    return {i: part - start for i, part, start in zip(numbers, parts, starts, strict=True)}


def _entries(
    file: CheckedFile, chosen: Array | None, limit: int | None, options: ReadOptions
) -> Iterator[Entry]:
    """Give the entries of a file that are to be checked; what ends the reading is noted."""
    path = Path(file.path)
    try:
        if chosen is None:
            yield from islice(iterate_file(path, options), limit)
        elif len(chosen) == file.entries:
            yield from iterate_file(path, options)
        else:
            yield from pick_entries(path, chosen.tolist(), options)
    except DataError as error:
        file.unreadable = str(error)
