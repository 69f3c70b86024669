"""Write the native store: in batches, durably, resumably, under its name only when complete."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np

import mlip
from mlip.datasets.encoding import encode
from mlip.datasets.lmdb_file import check_lmdb_file
from mlip.datasets.store import (
    FORMAT,
    METADATA_KEY,
    PROGRESS_KEY,
    SIZE_RECORD,
    SIZES_PREFIX,
    UNITS,
    VERSION,
    entry_key,
    read_metadata,
)
from mlip.datasets.structure import Structure
from mlip.errors import DataError, MlipError

BATCH_ENTRIES = 1000
BATCH_BYTES = 64 * 2**20
FIRST_MAP_SIZE = 64 * 2**20
HEADER_BYTES = 2 * 4096  # the two header pages, which LMDB writes before anything else


class LmdbWriter(ABC):
    """Write an LMDB file entry by entry; it takes its name when all entries are on the disk.

    Entries are committed in batches, each in one transaction with their number and the progress of
    the caller, to ``<path>.partial``. After a ``kill -9`` the file holds whole batches only, and
    ``resume=True`` continues behind the last one. Used as a context manager it closes at the end;
    after an error the partial file is removed (kept if ``resume`` was given, or after Ctrl-C).
    The same entries give the same file, byte for byte, interrupted or not.

    Args:
        path: final name of the file.
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
        self.partial = partial_name(self.path)
        self.metadata = dict(metadata or {})
        self.progress: dict[str, Any] = {}
        self.complete = False
        self._resume = resume
        self._committed = 0
        self._pending: list[tuple[bytes, int]] = []
        self._pending_bytes = 0
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists: choose another name or allow overwriting it")
        self._lock_handle = self._claim(overwrite)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    @staticmethod
    @abstractmethod
    def encode(structure: Structure) -> bytes:
        """Give the bytes of one entry; needs no writer, so that other processes can do it."""

    @abstractmethod
    def _restore(self, transaction: lmdb.Transaction) -> None:
        """Take up number of entries, metadata, progress and completeness of a partial file."""

    @abstractmethod
    def _put(self, transaction: lmdb.Transaction, complete: bool) -> None:
        """Write the pending entries and all that describes the file with them included."""

    def __len__(self) -> int:
        return self._committed + len(self._pending)

    def append(self, structure: Structure, progress: dict[str, Any] | None = None) -> None:
        """Add a structure.

        Args:
            structure: what to store.
            progress: JSON-able state of the job with this structure included; committed with it
                and given back as ``writer.progress`` after ``resume=True``.
        """
        if progress is not None:
            self.progress = progress
        self.append_encoded(self.encode(structure), len(structure))

    def append_encoded(self, data: bytes, n_atoms: int) -> None:
        """Add the bytes of an entry as ``encode`` gives them."""
        self._pending.append((data, n_atoms))
        self._pending_bytes += len(data)
        if len(self._pending) >= BATCH_ENTRIES or self._pending_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Commit what was appended, together with the progress, in one transaction."""
        self._commit(complete=False)

    def close(self) -> None:
        """Commit the rest and give the file its final name."""
        if self._lock_handle < 0:
            return
        if not self.complete:
            self._commit(complete=True)
        try:
            os.fsync(self._lock_handle)
            self.partial.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._release()

    def abort(self, *, keep_partial: bool = False) -> None:
        """Stop without a result; the partial file stays only if asked for."""
        if self._lock_handle >= 0 and not keep_partial:
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
        except OSError as error:
            raise write_error(self.path, error) from error
        handle = open_locked(self.partial)
        try:
            found = os.fstat(handle).st_size
            if found and overwrite and not self._resume:
                os.ftruncate(handle, 0)
            elif found and not self._resume:
                raise DataError(left_over(self.partial))
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _open(self) -> None:
        size = os.fstat(self._lock_handle).st_size
        if 0 < size < HEADER_BYTES:
            os.ftruncate(self._lock_handle, 0)  # killed before anything was committed
        elif size:
            check_lmdb_file(self.partial)
            with self._environment() as environment, environment.begin() as transaction:
                if transaction.stat()["entries"]:
                    self._restore(transaction)

    def _environment(self, growth: int = 1) -> lmdb.Environment:
        """Open the partial file with a map ``growth`` times as large as it needs now.

        It is opened for each commit: LMDB leaves traces of earlier ones in pages of a later one,
        and the bytes of the file shall not tell how often its writer was interrupted.
        """
        map_size = FIRST_MAP_SIZE
        while map_size < os.fstat(self._lock_handle).st_size:
            map_size *= 2
        try:
            return lmdb.open(
                str(self.partial),
                subdir=False,
                lock=False,
                map_size=map_size * growth,
                readahead=False,
            )
        except (lmdb.Error, OSError) as error:
            raise write_error(self.path, error) from error

    def _commit(self, complete: bool) -> None:
        if self._lock_handle < 0 or self.complete:
            raise MlipError(f"{self.path}: the writer is closed")
        growth = 1
        while True:
            try:
                with (
                    self._environment(growth) as environment,
                    environment.begin(write=True) as transaction,
                ):
                    self._put(transaction, complete)
                break
            except lmdb.MapFullError:
                growth *= 2
            except (lmdb.Error, OSError) as error:
                raise write_error(self.path, error) from error
        self._committed += len(self._pending)
        self._pending, self._pending_bytes = [], 0
        self.complete = complete

    def _release(self) -> None:
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1


class StructureWriter(LmdbWriter):
    """Write a native store (see :class:`LmdbWriter` for arguments and behaviour).

    The metadata of the file get a ``content_hash``: starting from nothing, the 128-bit blake2b of
    the hash so far and the bytes of the next entry.
    """

    _hash = b""
    _next_hash = b""

    @staticmethod
    def encode(structure: Structure) -> bytes:
        """Give the bytes of one entry."""
        return encode(structure)

    def _restore(self, transaction: lmdb.Transaction) -> None:
        stored = read_metadata(transaction, self.partial, complete=False)
        self._committed = stored["count"]
        self._hash = bytes.fromhex(stored.get("content_hash", ""))
        self.complete = stored["complete"]
        self.metadata = {**stored["user"], **self.metadata}
        self.progress = json.loads(bytes(transaction.get(PROGRESS_KEY, b"{}")))

    def _put(self, transaction: lmdb.Transaction, complete: bool) -> None:
        content = self._hash
        for index, (data, _) in enumerate(self._pending, start=self._committed):
            transaction.put(entry_key(index), data, append=True)
            content = hashlib.blake2b(content + data, digest_size=16).digest()
        if self._pending:
            sizes = [(n_atoms, zlib.crc32(data)) for data, n_atoms in self._pending]
            block = np.array(sizes, dtype=SIZE_RECORD).tobytes()
            transaction.put(SIZES_PREFIX + entry_key(self._committed), block)
        metadata = {
            "format": FORMAT, "version": VERSION, "written_by": f"mlip {mlip.__version__}",
            "units": UNITS, "count": len(self), "complete": complete,
            "content_hash": content.hex(), "user": self.metadata,
        }  # fmt: skip
        transaction.put(METADATA_KEY, json.dumps(metadata).encode())
        if complete:
            transaction.delete(PROGRESS_KEY)
        else:
            transaction.put(PROGRESS_KEY, json.dumps(self.progress).encode())
        self._next_hash = content

    def _commit(self, complete: bool) -> None:
        super()._commit(complete)
        self._hash = self._next_hash


def partial_name(path: Path) -> Path:
    """Give the name under which something is written before it is complete."""
    return path.with_name(path.name + ".partial")


def left_over(partial: Path) -> str:
    """Say what to do with what an interrupted run left."""
    return (
        f"{partial} is left from an interrupted run: continue it (--resume), or drop it "
        "(--overwrite)"
    )


def open_locked(path: Path) -> int:
    """Open or create a file for this process alone; give its file descriptor.

    Raises:
        MlipError: it cannot be written, or another process writes it.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise MlipError(f"{path} is being written by another process: wait for it") from None
    return handle


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, error: Exception) -> MlipError:
    """Say that a file cannot be written and why."""
    reason = getattr(error, "strerror", None) or str(error)
    return MlipError(
        f"cannot write {path}: {reason}; free space or choose another folder "
        "(nothing was left under that name)"
    )
