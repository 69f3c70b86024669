"""The native store: one LMDB file of structures, written durably and resumably, read anywhere.

Layout of the file (default LMDB table; keys that are no entries sort before all entries):
``#metadata`` JSON; ``#progress`` JSON of an unfinished job; ``#sizes/<first index>`` the size and
checksum of each entry, one block a transaction; ``<index, 12 digits>`` safetensors bytes.
"""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import lmdb
import numpy as np

import mlip
from mlip.datasets.dataset import DatasetFacts
from mlip.datasets.encoding import decode, encode
from mlip.datasets.lmdb_file import (
    SharedEnvironment,
    check_lmdb_file,
    file_identity,
    shared_environment,
)  # fmt: skip
from mlip.datasets.structure import Array, Structure
from mlip.errors import DataError, MlipError

FORMAT = "mlip-structures"
VERSION = 1
UNITS = {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³, tension positive"}
METADATA_KEY, PROGRESS_KEY, SIZES_PREFIX = b"#metadata", b"#progress", b"#sizes/"
SIZE_RECORD = np.dtype([("atoms", "<u4"), ("crc32", "<u4")])

BATCH_ENTRIES = 1000
BATCH_BYTES = 64 * 2**20
FIRST_MAP_SIZE = 64 * 2**20
HEADER_BYTES = 2 * 4096  # the two header pages, which LMDB writes before anything else


def entry_key(index: int) -> bytes:
    """Give the LMDB key of an entry."""
    return b"%012d" % index


class StructureWriter:
    """Write a store; it takes its name when all entries are safely on the disk.

    Entries are committed in batches, each in one transaction with the progress of the caller, to
    ``<path>.partial``. After a ``kill -9`` the file holds whole batches only, and ``resume=True``
    continues behind the last one. Used as a context manager it closes at the end; after an error
    the partial file is removed (kept if ``resume`` was given, or after Ctrl-C).

    Args:
        path: final name of the file, usually ``*.lmdb``.
        metadata: JSON-able facts about the data (source, level of theory, ...).
        resume: continue a partial file if there is one.
        overwrite: replace an existing file (at the end) and drop a partial one (now).

    Raises:
        DataError: the file exists, a partial file exists, or the partial file is damaged.
        MlipError: the disk is full or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path).absolute()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.metadata = dict(metadata or {})
        self.progress: dict[str, Any] = {}
        self._resume = resume
        self._committed = 0
        self._pending: list[bytes] = []
        self._sizes: list[tuple[int, int]] = []
        self._pending_bytes = 0
        self._environment: lmdb.Environment | None = None
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists: choose another name or allow overwriting it")
        self._lock_handle = self._claim(overwrite)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    def __len__(self) -> int:
        return self._committed + len(self._pending)

    def append(self, structure: Structure, progress: dict[str, Any] | None = None) -> None:
        """Add a structure.

        Args:
            structure: what to store.
            progress: JSON-able state of the job with this structure included; committed with it
                and given back as ``writer.progress`` after ``resume=True``.
        """
        data = encode(structure)
        self._pending.append(data)
        self._sizes.append((len(structure), zlib.crc32(data)))
        self._pending_bytes += len(data)
        if progress is not None:
            self.progress = progress
        if len(self._pending) >= BATCH_ENTRIES or self._pending_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Commit what was appended, together with the progress, in one transaction."""
        self._commit(complete=False)

    def read_committed(self, index: int) -> Structure:
        """Read back an entry that an earlier run committed."""
        assert self._environment is not None
        with self._environment.begin() as transaction:
            return decode(transaction.get(entry_key(index)) or b"")

    def close(self) -> None:
        """Commit the rest and give the file its final name."""
        if self._environment is None:
            return
        self._commit(complete=True)
        self._environment.close()
        self._environment = None
        try:
            os.fsync(self._lock_handle)
            self.partial.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise _write_error(self.path, error) from error
        finally:
            self._release()

    def abort(self, *, keep_partial: bool = False) -> None:
        """Stop without a result; the partial file stays only if asked for."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None
            if not keep_partial:
                self.partial.unlink(missing_ok=True)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException:
                self.abort(keep_partial=self._resume)
                raise
        else:
            self.abort(keep_partial=self._resume or not issubclass(kind, Exception))

    def _claim(self, overwrite: bool) -> int:
        """Take the partial file for this process alone; give its file descriptor."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _write_error(self.path, error) from error
        try:
            _lock(handle, self.partial)
            found = os.fstat(handle).st_size
            if found and overwrite and not self._resume:
                os.ftruncate(handle, 0)
            elif found and not self._resume:
                raise DataError(
                    f"{self.partial} is left from an interrupted run: "
                    "continue it (--resume), or drop it (--overwrite)"
                )
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _open(self) -> None:
        size = os.fstat(self._lock_handle).st_size
        if 0 < size < HEADER_BYTES:
            os.ftruncate(self._lock_handle, 0)  # killed before anything was committed
            size = 0
        if size:
            check_lmdb_file(self.partial)
        try:
            self._environment = lmdb.open(
                str(self.partial), subdir=False, lock=False, map_size=max(FIRST_MAP_SIZE, 2 * size),
                meminit=False, readahead=False,
            )  # fmt: skip
        except (lmdb.Error, OSError) as error:
            raise _write_error(self.path, error) from error
        with self._environment.begin() as transaction:
            stored = _metadata(transaction, self.partial, complete=False) if size else None
            if stored is not None:
                self._committed = stored["count"]
                self.metadata = {**stored["user"], **self.metadata}
                self.progress = json.loads(transaction.get(PROGRESS_KEY, b"{}"))

    def _commit(self, complete: bool) -> None:
        if self._environment is None:
            raise MlipError(f"{self.path}: the writer is closed")
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    self._put_batch(transaction, complete)
                break
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except (lmdb.Error, OSError) as error:
                raise _write_error(self.path, error) from error
        self._committed += len(self._pending)
        self._pending, self._sizes, self._pending_bytes = [], [], 0

    def _put_batch(self, transaction: lmdb.Transaction, complete: bool) -> None:
        for index, data in enumerate(self._pending, start=self._committed):
            transaction.put(entry_key(index), data, append=True)
        if self._sizes:
            block = np.array(self._sizes, dtype=SIZE_RECORD).tobytes()
            transaction.put(SIZES_PREFIX + entry_key(self._committed), block)
        metadata = {
            "format": FORMAT, "version": VERSION, "written_by": f"mlip {mlip.__version__}",
            "units": UNITS, "count": len(self), "complete": complete, "user": self.metadata,
        }  # fmt: skip
        transaction.put(METADATA_KEY, json.dumps(metadata).encode())
        if complete:
            transaction.delete(PROGRESS_KEY)
        else:
            transaction.put(PROGRESS_KEY, json.dumps(self.progress).encode())

    def _release(self) -> None:
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1


class StructureStore(Sequence[Structure]):
    """Read a store; cheap to open, safe to fork, to pickle and to use from threads.

    Args:
        path: file written by :class:`StructureWriter`.

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
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} entries, there is no entry {index}")
        try:
            with self._environment().begin() as transaction:
                data = transaction.get(entry_key(i))
            if data is None or zlib.crc32(data) != self._index["crc32"][i]:
                what = "missing" if data is None else "damaged (wrong checksum)"
                raise DataError(f"the entry is {what}: copy or write the file again")
            return decode(data)
        except (DataError, lmdb.Error) as error:
            raise DataError(f"{self.path}: entry {i}: {error}") from None

    def n_atoms(self) -> Array:
        """Give the number of atoms of every entry, [len] int64."""
        return self._index["atoms"].astype(np.int64)

    def name(self, index: int) -> str:
        """Name the file and entry of a structure."""
        return f"{self.path} entry {range(len(self))[index]}"

    def n_edges(self, cutoff: float) -> Array:
        """Give the number of directed edges of every entry, [len] int64.

        Counted once and kept in a small file beside the store.
        """
        from mlip.datasets.edges import count_edges

        return count_edges(self, cutoff)

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
            metadata = _metadata(transaction, path, complete=True)
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


def _metadata(transaction: lmdb.Transaction, path: Path, *, complete: bool) -> dict[str, Any]:
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


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise MlipError(f"{path} is being written by another process: wait for it") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, error: Exception) -> MlipError:
    reason = getattr(error, "strerror", None) or str(error)
    return MlipError(
        f"cannot write {path}: {reason}; free space or choose another folder "
        "(nothing was left under that name)"
    )
