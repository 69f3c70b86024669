"""Read OC20 and OC22 LMDB files: pickled entries under the keys 0, 1, 2, ..., read safely.

Written by Meta's preprocessing scripts and everything modelled on them. A ``length`` key may be
there or not, right or wrong; it is a hint, the keys decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip.datasets.dataset import DatasetFacts, IndexedDataset, checked_index
from mlip.datasets.formats.oc20_entry import count_atoms, extract_entry, is_relaxation
from mlip.datasets.formats.pickles import loads
from mlip.datasets.labels import Extracted
from mlip.datasets.lmdb_reader import LmdbReader
from mlip.datasets.options import ReadOptions
from mlip.datasets.store import METADATA_KEY
from mlip.datasets.structure import Array
from mlip.errors import DataError

FORMAT = "OC20 LMDB (pickled entries)"
_LENGTH = b"length"
_PICKLE = b"\x80"
_AFTER_DIGITS = b":"
_LOOKED_AT = 20  # first entries that tell the format and the task
_SCANNED = 10_000  # entries up to which all keys are looked at when a file is opened
_FINGERPRINT_ENTRIES = 64
_MAX_DIGITS = 18
# Fields that counting atoms does not need.
_NOT_COUNTED = frozenset({"edge_index", "cell_offsets", "distances", "force", "forces", "tags"})


def is_oc20(path: Path) -> bool:
    """Recognise an LMDB file whose numbered entries are pickles."""
    with path.open("rb") as head:
        if head.read(20)[16:] != b"\xde\xc0\xef\xbe":
            return False
    try:
        reader = LmdbReader(path)
        if reader.get(METADATA_KEY) is not None:
            return False  # a store of this package: its entries may begin with the same byte
        for key in islice(reader.keys(b"0"), _LOOKED_AT):
            if key >= _AFTER_DIGITS:
                return False
            if (reader.get(key) or b"")[:1] == _PICKLE:
                return True
    except DataError:
        pass
    return False


def open_oc20(path: Path, options: ReadOptions) -> Oc20Dataset:
    """Open a file for random access."""
    return Oc20Dataset(path, options)


class Oc20Dataset(IndexedDataset):
    """Entries of one file by their keys; read and checked when asked for.

    Cheap to open (keys are counted, not read), safe to fork and to pickle.

    Args:
        path: file.
        options: what its energies are, and which frame of IS2RE entries is meant.

    Raises:
        DataError: the file is damaged, no LMDB file, has no entries, or a hostile length.
    """

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._options = options
        self._file = LmdbReader(path)
        self._keys, problems = _read_index(self._file)
        self._n_atoms: Array | None = None
        super().__init__(path, DatasetFacts(FORMAT))
        self.facts = DatasetFacts(
            FORMAT,
            options.energy_convention or "unstated",
            tuple(f"{path}: {problem}" for problem in problems),
            (options.is2re or "unstated") if self._relaxations() else None,
        )

    def __len__(self) -> int:
        return len(self._keys)

    def extract(self, index: int) -> Extracted:
        """Read an entry with the names its labels had, and what is not kept of it."""
        key = int(self._keys[index])
        try:
            return extract_entry(_fields(self._get(key)), self._options)
        except DataError as error:
            raise DataError(f"{self.path}: entry {key}: {error}") from None

    def raw(self, index: int) -> dict[str, Any]:
        """Give the fields of an entry exactly as they are in the file."""
        key = int(self._keys[checked_index(index, len(self))])
        try:
            return _fields(self._get(key))
        except DataError as error:
            raise DataError(f"{self.path}: entry {key}: {error}") from None

    def n_atoms(self) -> Array:
        """Give the number of atoms of every entry, [len] int64; reads all entries the first time.

        Raises:
            DataError: an entry that cannot be read.
        """
        if self._n_atoms is None:
            counts = np.empty(len(self), dtype=np.uint32)
            for i, key in enumerate(self._keys):
                try:
                    counts[i] = count_atoms(_fields(self._get(int(key)), _NOT_COUNTED))
                except DataError as error:
                    raise DataError(f"{self.path}: entry {key}: {error}") from None
            self._n_atoms = counts
        return self._n_atoms.astype(np.int64)

    def name(self, index: int) -> str:
        """Name file and entry."""
        return f"{self.path} entry {self._keys[index]}"

    def fingerprint(self) -> str:
        """Identify the content: keys, newest transaction and a sample of the entries."""
        n = len(self)
        digest = hashlib.blake2b(repr((n, *self._file.meta)).encode(), digest_size=8)
        for i in np.unique(np.linspace(0, n - 1, min(n, _FINGERPRINT_ENTRIES)).astype(int)):
            key = b"%d" % self._keys[i]
            digest.update(key + (self._file.get(key) or b""))
        return f"{n}-{digest.hexdigest()}"

    def _get(self, key: int) -> bytes:
        data = self._file.get(b"%d" % key)
        if data is None:
            raise DataError("the entry is missing from the file: write or download it again")
        if not data:
            raise DataError("the entry is empty: write or download the file again")
        return data

    def _relaxations(self) -> bool:
        """Tell from the first readable entry whether this is a file of IS2RE."""
        for key in self._keys[:_LOOKED_AT]:
            try:
                return is_relaxation(_fields(self._get(int(key))))
            except DataError:
                continue
        return False


def _fields(data: bytes, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    fields = loads(data, skip)
    if not isinstance(fields, dict):
        raise DataError(f"the entry is a {type(fields).__name__}, expected a Data object")
    return fields


class _Count(NamedTuple):
    """How many keys of which kind a file has."""

    entries: int
    foreign: list[bytes]
    length: int | None


def _read_index(file: LmdbReader) -> tuple[Array | range, list[str]]:
    """Find the keys; all of them are looked at only if the file is small or counts disagree."""
    problems: list[str] = []
    try:
        count = _count(file)
        keys: Array | range = range(count.entries)
        if count.entries <= _SCANNED or not _looks_dense(file, count):
            keys = _place(_scan(file, count), count, problems)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None
    if count.foreign:
        names = ", ".join(f"{key!r:.40}" for key in count.foreign[:5])
        problems.append(f"{len(count.foreign)} keys are no entries: {names}")
    if len(keys) == 0:
        raise DataError(f"{file.path}: there are no structures in this file (no keys 0, 1, 2, ...)")
    return keys, problems


def _count(file: LmdbReader) -> _Count:
    foreign = [key for key in _outside_digits(file) if key != _LENGTH]
    value = file.get(_LENGTH)
    entries = file.entries - len(foreign) - (value is not None)
    return _Count(entries, foreign, None if value is None else _length(value))


def _length(value: bytes) -> int:
    try:
        length = loads(value)
    except DataError as error:
        raise DataError(f"key 'length': {error}") from None
    if type(length) is not int or length < 0:
        raise DataError(f"key 'length': it is {length!r:.60}, expected a whole number")
    return length


def _outside_digits(file: LmdbReader) -> Iterator[bytes]:
    yield from takewhile(lambda key: key < b"0", file.keys())
    yield from file.keys(_AFTER_DIGITS)


def _looks_dense(file: LmdbReader, count: _Count) -> bool:
    """Check by a few keys whether the entries are 0 to n - 1."""
    n = count.entries
    if count.length not in {None, n} or file.get(b"%d" % n) is not None:
        return False
    tens = [10**k for k in range(_MAX_DIGITS) if 10**k < n]
    samples = {0, n - 1, *tens, *(t - 1 for t in tens), *range(0, n, n // 64 + 1)}
    return all(file.get(b"%d" % key) is not None for key in samples)


def _scan(file: LmdbReader, count: _Count) -> Array:
    """Find all keys that are decimal numbers, sorted; adds the others to the foreign ones."""
    numbers: list[int] = []
    for key in takewhile(lambda key: key < _AFTER_DIGITS, file.keys(b"0")):
        if key.isdigit() and len(key) <= _MAX_DIGITS and (key[:1] != b"0" or key == b"0"):
            numbers.append(int(key))
        else:
            count.foreign.append(key)
    keys = np.array(numbers, dtype=np.int64)
    keys.sort()
    return keys


def _place(keys: Array, count: _Count, problems: list[str]) -> Array | range:
    """Decide which entry each index is, and say what is wrong with keys and length."""
    n, length = len(keys), count.length
    span = int(keys[-1]) + 1 if n else 0
    if length is not None and n < span == length <= 2 * n:
        missing = np.setdiff1d(np.arange(span), keys)
        some = ", ".join(map(str, missing[:5].tolist()))
        problems.append(
            f"the length key says {length}, {n} entries are there; missing: {some}"
            f"{', ...' if len(missing) > 5 else ''} (asking for one is an error)"
        )
        return range(span)
    if length not in {None, n}:
        problems.append(
            f"the length key says {length}, {n} entries are there: all of them are read"
        )
    if n == span:
        return range(n)
    problems.append(
        f"the keys are not 0 to {n - 1}: the {n} that are there, {keys[0]} to {keys[-1]}, are "
        "read in their order"
    )
    return keys
