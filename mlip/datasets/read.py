"""Read structures one at a time from any known file; a bad frame is reported, not fatal."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlip.datasets.folders import folder_files
from mlip.datasets.formats.reader import Reader
from mlip.datasets.formats.table import READERS
from mlip.datasets.labels import Extracted, extract, label_hints
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import LABELS, Structure
from mlip.errors import DataError

PathLike = str | os.PathLike[str]


class Entry(NamedTuple):
    """One frame of a file: a structure, or the problem that it has."""

    file: Path
    frame: int
    structure: Structure | None = None
    used: dict[str, str] = {}  # noqa: RUF012  label -> key it was found under
    not_kept: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()  # possible labels of a structure that has none
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.file} frame {self.frame}"


def iterate_file(path: Path, options: ReadOptions | None = None, start: int = 0) -> Iterator[Entry]:
    """Give every frame of a file from ``start`` on, as a structure or with its problem.

    Raises:
        DataError: the file is missing, empty, damaged or of no known format.
    """
    options = options or ReadOptions()
    reader = find_reader(path)
    count = start
    for index, content in reader.read(path, start, options):
        count += 1
        yield _entry(path, index, content, options)
    if count == 0:
        raise DataError(f"{path}: there are no structures in this file")


def pick_entries(
    path: Path, frames: Iterable[int], options: ReadOptions | None = None
) -> Iterator[Entry]:
    """Give chosen frames of a file with random access, each as a structure or with its problem.

    Raises:
        DataError: the file is missing, empty, damaged or of a format that only streams.
    """
    options = options or ReadOptions()
    reader = find_reader(path)
    if reader.open is None:
        raise DataError(f"{path}: frames of {reader.name} cannot be picked: convert it first")
    dataset = reader.open(path, options)
    fetch: Callable[[int], Any] = getattr(dataset, "extract", dataset.__getitem__)
    for frame in frames:
        try:
            content = fetch(frame)
        except DataError as error:
            content = error
        yield _entry(path, frame, content, options)


def find_reader(path: Path) -> Reader:
    """Give the reader for a file.

    Raises:
        DataError: the file is missing, empty or of no known format.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a file")
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty: write or download it again")
    for reader in READERS:
        if reader.recognises(path):
            return reader
    known = ", ".join(reader.name for reader in READERS)
    raise DataError(f"{path}: not a known format; known are {known}")


def expand(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """Resolve files, folders, patterns such as ``data/*.extxyz``, or a list of them, to files.

    Raises:
        DataError: a pattern matches nothing, a folder has no data or two kinds of data, a file is
            given twice, or there is no path at all.
    """
    items = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    origin: dict[Path, str] = {}
    files: list[Path] = []
    for item in items:
        pattern = os.path.expanduser(os.fspath(item))
        for path in _matches(pattern):
            same = path.resolve()
            if same in origin:
                raise DataError(
                    f"{path} is given twice (by {origin[same]!r} and {pattern!r}): leave one out"
                )
            origin[same] = pattern
            files.append(path)
    if not files:
        raise DataError("no data files were given")
    return files


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return _folder(path) if path.is_dir() else [path]
    matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    matches = [match for match in matches if not match.name.endswith("-lock")]  # made by LMDB
    if not matches:
        raise DataError(f"{pattern}: no file matches this pattern")
    files = [match for match in matches if match.is_file()]  # '**' also matches folders
    return files or [file for match in matches for file in _folder(match)]


def _folder(folder: Path) -> list[Path]:
    files = folder_files(folder)
    kinds: dict[str, Path] = {}
    for file in files:
        if file.suffix == ".lmdb":
            kinds.setdefault(find_reader(file).name, file)
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise DataError(
            f"{folder} holds two kinds of LMDB: {one.name} ({first}) and {other.name} ({second}): "
            "name the files"
        )
    return files


def _entry(path: Path, index: int, content: Any, options: ReadOptions) -> Entry:
    entry = Entry(path, index)
    if isinstance(content, Structure):
        used = {x: f"{x} (store)" for x in LABELS if getattr(content, x) is not None}
        return entry._replace(structure=content, used=used)
    if isinstance(content, DataError):
        known = str(content).startswith(f"{path}")
        return entry._replace(problem=f"{content}" if known else f"{entry.name}: {content}")
    if isinstance(content, Extracted):
        return entry._replace(**content._asdict())
    try:
        structure, used, not_kept = extract(content, options.keys, entry.name)
    except DataError as error:
        return entry._replace(problem=str(error))
    wanted = {"stress" if label == "virial" else label for label in options.keys.named()}
    complete = structure.labelled and wanted <= used.keys()
    hints = () if complete else tuple(label_hints(content))
    return entry._replace(structure=structure, used=used, not_kept=not_kept, hints=hints)
