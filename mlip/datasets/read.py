"""Read structures one at a time from any known file; a bad frame is reported, not fatal.

The table ``READERS`` is the place where further formats join.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlip.datasets.extxyz import COMPRESSED, read_extxyz
from mlip.datasets.labels import LabelKeys, extract, label_hints
from mlip.datasets.lmdb_file import check_lmdb_file
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Structure
from mlip.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

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


class Reader(NamedTuple):
    """A file format: its name, how it is recognised, how it is read from a frame on."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, int], Iterator[tuple[int, Any]]]


def iterate_file(path: Path, keys: LabelKeys | None = None, start: int = 0) -> Iterator[Entry]:
    """Give every frame of a file from ``start`` on, as a structure or with its problem.

    Raises:
        DataError: the file is missing, empty, damaged or of no known format.
    """
    reader = find_reader(path)
    count = start
    for index, content in reader.read(path, start):
        count += 1
        yield _entry(path, index, content, keys)
    if count == 0:
        raise DataError(f"{path}: there are no structures in this file")


def find_reader(path: Path) -> Reader:
    """Give the reader for a file.

    Raises:
        DataError: the file is missing, empty or of no known format.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name its files, for instance '{path}/*.extxyz'")
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
    """Resolve one path, a list, or patterns such as ``data/*.extxyz`` to files in order.

    Raises:
        DataError: a pattern matches nothing, or there is no path at all.
    """
    items = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files: list[Path] = []
    for item in items:
        pattern = os.fspath(item)
        if not glob.has_magic(pattern) or Path(pattern).exists():
            files.append(Path(pattern))
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no file matches this pattern")
        files += map(Path, matches)
    if not files:
        raise DataError("no data files were given")
    return files


def _entry(path: Path, index: int, content: Any, keys: LabelKeys | None) -> Entry:
    entry = Entry(path, index)
    if isinstance(content, Structure):
        labels = ("energy", "forces", "stress")
        used = {x: f"{x} (store)" for x in labels if getattr(content, x) is not None}
        return entry._replace(structure=content, used=used)
    if isinstance(content, DataError):
        return entry._replace(problem=f"{entry.name}: {content}")
    try:
        structure, used, not_kept = extract(content, keys, entry.name)
    except DataError as error:
        return entry._replace(problem=str(error))
    wanted = {"stress" if label == "virial" else label for label in (keys or LabelKeys()).named()}
    complete = structure.labelled and wanted <= used.keys()
    hints = () if complete else tuple(label_hints(content))
    return entry._replace(structure=structure, used=used, not_kept=not_kept, hints=hints)


def _is_lmdb(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".lmdb" or file.read(20)[16:] == b"\xde\xc0\xef\xbe"


def _read_store(path: Path, start: int) -> Iterator[tuple[int, Structure | DataError]]:
    check_lmdb_file(path)
    store = StructureStore(path)
    for i in range(start, len(store)):
        try:
            yield i, store[i]
        except DataError as error:
            yield i, error


def _is_extxyz(path: Path) -> bool:
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return bool(suffixes) and suffixes[-1] in {".extxyz", ".xyz"}


def _ase_format(path: Path) -> str | None:
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        name = filetype(str(path), read=True)
    except (UnknownFileTypeError, OSError, EOFError, UnicodeDecodeError):
        return None
    return name if name in ioformats and ioformats[name].can_read else None


def _read_trajectory(path: Path, start: int) -> Iterator[tuple[int, Atoms | DataError]]:
    from ase.io.trajectory import TrajectoryReader

    with _file_errors(path), TrajectoryReader(str(path)) as frames:
        for i in range(start, len(frames)):
            try:
                atoms = frames[i]
            except Exception as error:  # ASE raises whatever it trips over
                yield i, DataError(f"cannot be read: {error or type(error).__name__}")
            else:
                yield i, atoms


def _read_database(path: Path, start: int) -> Iterator[tuple[int, Atoms | DataError]]:
    from ase.db import connect

    with _file_errors(path):
        rows = connect(str(path)).select(sort="id", offset=start)
        for i, row in enumerate(rows, start=start):
            try:
                atoms = row.toatoms()
                atoms.info.update({**row.key_value_pairs, **(row.data or {})})
            except Exception as error:  # ASE raises whatever it trips over
                yield i, DataError(f"cannot be read: {error or type(error).__name__}")
            else:
                yield i, atoms


def _read_with_ase(path: Path, start: int) -> Iterator[tuple[int, Atoms]]:
    from ase.io import iread

    with _file_errors(path):
        yield from islice(enumerate(iread(str(path), index=":")), start, None)


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn what ASE raises about a whole file into one clear error."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # ASE raises whatever it trips over
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read ({reason}): is it complete? fetch or write it again"
        ) from error


READERS: tuple[Reader, ...] = (
    Reader("mlip store (.lmdb)", _is_lmdb, _read_store),
    Reader("extxyz (.extxyz, .xyz, also .xz .gz .bz2)", _is_extxyz, read_extxyz),
    Reader("ASE trajectory (.traj)", lambda p: _ase_format(p) == "traj", _read_trajectory),
    Reader("ASE database (.db, .json)", lambda p: _ase_format(p) in {"db", "json"}, _read_database),
    Reader(
        "any other format that ASE reads (OUTCAR, vasprun.xml, cif, ...)",
        lambda p: _ase_format(p) is not None,
        _read_with_ase,
    ),
)
