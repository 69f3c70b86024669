"""The native store: one LMDB file of structures, read anywhere (written by writer.py).

Layout of the file (default LMDB table; keys that are no entries sort before all entries):
``#metadata`` JSON; ``#progress`` JSON of an unfinished job; ``#sizes/<first index>`` the size and
checksum of each entry, one block a transaction; ``<index, 12 digits>`` safetensors bytes.
"""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import lmdb
import numpy as np

import mlip
from mlip.datasets.dataset import DatasetFacts
from mlip.datasets.encoding import decode
from mlip.datasets.lmdb_file import (
    SharedEnvironment,
    file_identity,
    shared_environment,
)  # fmt: skip
from mlip.datasets.structure import Array, Structure
from mlip.errors import DataError

FORMAT = "mlip-structures"
VERSION = 1
UNITS = {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³, tension positive"}
METADATA_KEY, PROGRESS_KEY, SIZES_PREFIX = b"#metadata", b"#progress", b"#sizes/"
SIZE_RECORD = np.dtype([("atoms", "<u4"), ("crc32", "<u4")])


def entry_key(index: int) -> bytes:
    """Give the LMDB key of an entry."""
    return b"%012d" % index


class StructureStore(Sequence[Structure]):
    """Read a store; cheap to open, safe to fork, to pickle and to use from threads.

    Args:
        path: file written by :class:`~mlip.datasets.writer.StructureWriter`.

    Raises:
        DataError: the file is missing, truncated, foreign, unfinished or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._file: SharedEnvironment | None = None
        self._index, self.metadata = _read_index(self.path)
        self._identity = file_identity(self.path)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> list[Structure]: ...
    def __getitem__(self, index: int | slice) -> Structure | list[Structure]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = operator.index(index)
        if i < 0:
            i += len(self)
        (data,) = self.read_bytes([i] if i >= 0 else [index])
        try:
            return decode(data)
        except DataError as error:
            raise DataError(f"{self.path}: entry {i}: {error}") from None

    def read_bytes(self, indices: Sequence[int]) -> list[bytes]:
        """Give the bytes of entries, their checksums compared; see encoding.py for what is in them.

        Raises:
            DataError: an entry is missing or damaged.
            IndexError: there is no such entry.
        """
        found = []
        checksums, last = self._index["crc32"], len(self) - 1
        try:
            with self._environment().begin() as transaction:
                get = transaction.get
                for i in indices:
                    if not 0 <= i <= last:
                        raise IndexError(
                            f"{self.path} has {len(self)} entries, there is no entry {i}"
                        )
                    data = get(entry_key(i))
                    if data is None or zlib.crc32(data) != checksums[i]:
                        what = "missing" if data is None else "damaged (wrong checksum)"
                        raise DataError(
                            f"{self.path}: entry {i}: the entry is {what}: "
                            "copy or write the file again"
                        )
                    found.append(data)
        except lmdb.Error as error:
            raise DataError(f"{self.path}: entry {indices[len(found)]}: {error}") from None
        return found

    def n_atoms(self) -> Array:
        """Give the number of atoms of every entry, [len] int64."""
        return self._index["atoms"].astype(np.int64)

    @property
    def sizes(self) -> Array:
        """Number of atoms of every entry, [len] uint32, without a copy."""
        return self._index["atoms"]

    def name(self, index: int) -> str:
        """Name the file and entry of a structure."""
        return f"{self.path} entry {range(len(self))[index]}"

    def n_edges(self, cutoff: float) -> Array:
        """Give the number of directed edges of every entry, [len] int64.

        Counted once and kept in a small file beside the store.
        """
        from mlip.datasets.sizes import count_edges

        return count_edges(self, cutoff).astype(np.int64)

    @property
    def facts(self) -> DatasetFacts:
        """Tell format and energy convention as the writer stated them."""
        return DatasetFacts("mlip store", self.metadata["user"].get("energy_convention"))

    def fingerprint(self) -> str:
        """Identify the content (sizes and checksums of all entries)."""
        return f"{len(self)}-{zlib.crc32(self._index.tobytes()):08x}"

    def close(self) -> None:
        """Let go of the file; the next access opens it again."""
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _environment(self) -> lmdb.Environment:
        if self._file is None:
            file = shared_environment(self.path)
            if file.identity != self._identity:
                raise DataError(f"{self.path}: the file was replaced while in use: open it again")
            self._file = file
        return self._file.get()


def _read_index(path: Path) -> tuple[Array, dict[str, Any]]:
    file = shared_environment(path)
    try:
        with file.get().begin() as transaction:
            metadata = read_metadata(transaction, path, complete=True)
            blocks = []
            cursor = transaction.cursor()
            found = cursor.set_range(SIZES_PREFIX)
            while found and cursor.key().startswith(SIZES_PREFIX):
                blocks.append(np.frombuffer(cursor.value(), dtype=SIZE_RECORD))
                found = cursor.next()
            entries = transaction.stat()["entries"] - len(blocks) - 1
    except lmdb.Error as error:
        raise DataError(f"{path}: the file is damaged: {error}") from None
    index = np.concatenate([np.empty(0, SIZE_RECORD), *blocks])
    if not metadata["count"] == len(index) == entries:
        raise DataError(
            f"{path}: {entries} entries, but the header says {metadata['count']} and the size "
            f"index {len(index)}: the file is damaged, write it again"
        )
    return index, metadata


def _parse_metadata(transaction: lmdb.Transaction) -> dict[str, Any] | None:
    try:
        metadata = json.loads(bytes(transaction.get(METADATA_KEY, b"null")))
    except ValueError:
        return None
    return metadata if isinstance(metadata, dict) and metadata.get("format") == FORMAT else None


def read_metadata(transaction: lmdb.Transaction, path: Path, *, complete: bool) -> dict[str, Any]:
    metadata = _parse_metadata(transaction)
    if metadata is None:
        if not complete and transaction.stat()["entries"] == 0:
            return {"count": 0, "user": {}}  # killed before the first batch
        raise DataError(f"{path}: an LMDB file, but no store of this package (no {FORMAT} header)")
    if metadata["version"] > VERSION:
        raise DataError(
            f"{path}: store version {metadata['version']}, written by {metadata['written_by']}; "
            f"this is mlip {mlip.__version__}, which reads up to {VERSION}: upgrade mlip"
        )
    if complete and not metadata["complete"]:
        raise DataError(
            f"{path}: unfinished ({metadata['count']} entries so far): repeat the command that "
            "wrote it with --resume"
        )
    return metadata
