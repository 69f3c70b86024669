"""Write the native store: in batches, durably, resumably, under its name only when complete."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np

import mlip
from mlip.datasets.encoding import decode, encode
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
            stored = read_metadata(transaction, self.partial, complete=False) if size else None
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
