"""Read ``.aselmdb``: rows of an ASE database as compressed JSON in an LMDB file.

Row keys are decimal ids from 1 on; ``nextid``, ``deleted_ids`` and ``metadata`` are reserved.
OMat24, sAlex, OMol25, OC25 and their kin come in this form.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip.datasets.dataset import DatasetFacts, IndexedDataset, checked_index
from mlip.datasets.formats.ase_row import count_atoms, extract_row, load_json
from mlip.datasets.labels import Extracted
from mlip.datasets.lmdb_reader import LmdbReader
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import Array
from mlip.errors import DataError

FORMAT = "ASE LMDB (.aselmdb)"
RESERVED = (b"nextid", b"deleted_ids", b"metadata")
_FINGERPRINT_ROWS = 64


def is_aselmdb(path: Path) -> bool:
    """Recognise an ASE database in LMDB by its name, or by a row or counter in it."""
    if path.suffix == ".aselmdb":
        return True
    with path.open("rb") as file:
        if file.read(20)[16:] != b"\xde\xc0\xef\xbe":
            return False
    try:
        reader = LmdbReader(path)
        if _is_json(reader.get(b"nextid")) or _is_json(reader.get(b"1")):
            return True
        first = next(reader.keys(b"0"), b"")
        return first[:1].isdigit() and _is_json(reader.get(first))
    except DataError:
        return False


def open_aselmdb(path: Path, options: ReadOptions) -> AseLmdbDataset:
    """Open a file for random access."""
    return AseLmdbDataset(path, options)


class AseLmdbDataset(IndexedDataset):
    """Rows of one file in the order of their ids; read and checked when asked for.

    Cheap to open (rows are counted, not read), safe to fork and to pickle.

    Args:
        path: file.
        options: keys of labels, where the usual names do not fit.

    Raises:
        DataError: the file is damaged, no LMDB file, or has no rows.
    """

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._options = options
        self._file = LmdbReader(path)
        index = _read_index(path, self._file)
        self._ids = index.ids
        self.metadata = index.metadata
        self._n_atoms: Array | None = None
        super().__init__(path, DatasetFacts(FORMAT, problems=index.problems))

    def __len__(self) -> int:
        return len(self._ids)

    def extract(self, index: int) -> Extracted:
        """Read a row with the names its labels had, and what is not kept of it."""
        try:
            return extract_row(load_json(self._bytes(index)), self._options.keys)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    def raw(self, index: int) -> dict[str, Any]:
        """Give the JSON of a row as it is in the file."""
        index = checked_index(index, len(self))
        try:
            return load_json(self._bytes(index))
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from None

    def n_atoms(self) -> Array:
        """Give the number of atoms of every row, [len] int64; reads all rows the first time.

        Raises:
            DataError: a row that cannot be read.
        """
        if self._n_atoms is None:
            counts = np.empty(len(self), dtype=np.int64)
            for i in range(len(self)):
                try:
                    counts[i] = count_atoms(load_json(self._bytes(i)))
                except DataError as error:
                    raise DataError(f"{self.name(i)}: {error}") from None
            self._n_atoms = counts
        return self._n_atoms

    def name(self, index: int) -> str:
        """Name file and row id."""
        return f"{self.path} id {self._ids[index]}"

    def fingerprint(self) -> str:
        """Identify the content: ids, newest transaction and a sample of the rows."""
        n = len(self)
        digest = hashlib.blake2b(repr((n, *self._file.meta)).encode(), digest_size=8)
        for i in np.unique(np.linspace(0, n - 1, min(n, _FINGERPRINT_ROWS)).astype(int)).tolist():
            digest.update(b"%d" % self._ids[i])
            digest.update(self._file.get(b"%d" % self._ids[i]) or b"")
        return f"{n}-{digest.hexdigest()}"

    def _bytes(self, index: int) -> bytes:
        data = self._file.get(b"%d" % self._ids[index])
        if data is None:
            raise DataError("the row is not in the file: write the file again")
        return data


class _Index(NamedTuple):
    ids: Array | range
    metadata: dict[str, Any]
    problems: tuple[str, ...]


def _read_index(path: Path, file: LmdbReader) -> _Index:
    """Count the rows; all keys are looked at only if counters and rows disagree."""
    problems: list[str] = []
    try:
        values = {key: file.get(key) for key in RESERVED}
        nextid = _counter(values[b"nextid"], problems)
        deleted = _deleted(values[b"deleted_ids"], problems)
        if nextid is not None:
            deleted = {i for i in deleted if i < nextid}
        rows = file.entries - sum(value is not None for value in values.values())
        ids: Array | range | None = None
        if nextid is not None and 0 < nextid - 1 - len(deleted) == rows:
            ids = _expected_ids(nextid, deleted)
            if any(file.get(b"%d" % row_id) is None for row_id in (ids[0], ids[-1])):
                ids = None
        if ids is None:
            ids = _scan(file, nextid, deleted, problems)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    metadata = _reserved(values[b"metadata"], "metadata", {}, problems)
    if len(ids) == 0:
        raise DataError(f"{path}: there are no structures in this file (no rows)")
    metadata = metadata if isinstance(metadata, dict) else {}
    return _Index(ids, metadata, tuple(f"{path}: {problem}" for problem in problems))


def _expected_ids(nextid: int, deleted: set[int]) -> Array | range:
    if not deleted:
        return range(1, nextid)
    ids = np.arange(1, nextid)
    return np.delete(ids, np.fromiter(deleted, dtype=np.int64) - 1)


def _scan(file: LmdbReader, nextid: int | None, deleted: set[int], problems: list[str]) -> Array:
    """Find the rows that exist by their keys, and say what the counters have wrong."""
    found: list[int] = []
    foreign: list[str] = []
    for key in file.keys(b""):
        if key.isdigit() and key[:1] != b"0" and len(key) < 19:
            found.append(int(key))
        elif key not in RESERVED:
            foreign.append(repr(key))
    ids = np.array(found, dtype=np.int64)
    ids.sort()
    revived = np.isin(ids, np.array(sorted(deleted), dtype=np.int64))
    if revived.any():
        ids = ids[~revived]
        problems.append(f"{revived.sum()} rows are there but listed as deleted: left out")
    if foreign:
        problems.append(f"{len(foreign)} keys are no rows: {', '.join(foreign[:5])}")
    last = int(ids[-1]) if len(ids) else 0
    promised = len(ids) if nextid is None else nextid - 1 - len(deleted)
    if nextid is not None and (promised != len(ids) or last >= nextid):
        problems.append(
            f"nextid is {nextid}, which promises {promised} rows; {len(ids)} rows are there "
            f"(last id {last}) and are read"
        )
    return ids


def _reserved(value: bytes | None, name: str, default: Any, problems: list[str]) -> Any:
    if value is None:
        return default
    try:
        return load_json(value)
    except DataError as error:
        problems.append(f"{name} cannot be read ({error})")
        return default


def _counter(value: bytes | None, problems: list[str]) -> int | None:
    if value is None:
        problems.append("nextid is missing, other readers see no rows: the rows found are read")
        return None
    nextid = _reserved(value, "nextid", None, problems)
    if nextid is not None and (type(nextid) is not int or nextid < 1):
        problems.append(f"nextid is {nextid!r:.40}, expected a whole number from 1 on")
        return None
    return nextid


def _deleted(value: bytes | None, problems: list[str]) -> set[int]:
    deleted = _reserved(value, "deleted_ids", [], problems)
    if not isinstance(deleted, list) or any(type(i) is not int or i < 1 for i in deleted):
        problems.append("deleted_ids is no list of ids")
        return set()
    return set(deleted)


def _is_json(value: bytes | None) -> bool:
    """Tell whether bytes are compressed JSON: an object, a list or a number."""
    if value is None or value[:1] != b"\x78":
        return False
    try:
        return zlib.decompressobj().decompress(value, 1)[:1] in b"{[0123456789"
    except zlib.error:
        return False
