"""Open LMDB files safely: checked before mapping, one environment a file and process, fork-proof.

LMDB maps a file into memory; reading a map past the end of a truncated file kills the process
with SIGBUS, so the two meta pages are read and compared with the file size first. LMDB forbids
two environments on one file in a process and using one across a fork; both are handled here.
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from pathlib import Path
from typing import IO, NamedTuple

import lmdb

from mlip.errors import DataError

_MAGIC = 0xBEEFC0DE
_VERSION = 1
_META_FLAG = 0x08
_PAGE_SIZES = frozenset(2**k for k in range(9, 17))
NO_ROOT = 2**64 - 1
MAX_DEPTH = 32  # levels of the tree of pages, as in LMDB itself
# One meta page, 64-bit layout: page header (number, -, flags, -, -), then magic, version, address,
# map size, two table records (page size or 0, flags, depth, 3 page counts, entries, root page),
# last used page and transaction number.
_META = struct.Struct("<QHHHHIIQQ IHHQQQQQ IHHQQQQQ QQ")


class MetaPage(NamedTuple):
    """What one of the two meta pages says: layout, and the root page of the table of entries."""

    page_size: int
    last_page: int
    transaction: int
    root: int
    depth: int
    entries: int

    @property
    def bytes_needed(self) -> int:
        return (self.last_page + 1) * self.page_size


def check_lmdb_file(path: Path) -> MetaPage:
    """Check with plain reads that a file is a whole LMDB file; give its newest meta page.

    Raises:
        DataError: the file is missing, empty, no LMDB file, or shorter than its content.
    """
    with open_lmdb_file(path) as file:
        return newest_meta_page(path, file)


def open_lmdb_file(path: Path) -> IO[bytes]:
    """Open a file for plain reads, without a buffer.

    Raises:
        DataError: it is missing, no regular file, or may not be read.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            kind = "not a regular file" if path.exists() else "there is no such file"
            raise DataError(f"{path}: {kind}")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def newest_meta_page(path: Path, file: IO[bytes]) -> MetaPage:
    """Read and check both meta pages of an open file; see :func:`check_lmdb_file`."""
    try:
        size = os.fstat(file.fileno()).st_size
        head = os.pread(file.fileno(), 2 * max(_PAGE_SIZES), 0)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if size == 0:
        raise DataError(f"{path}: the file is empty: write or copy it again")
    first = _meta_page(path, head, 0)
    second = _meta_page(path, head, first.page_size)
    if first.page_size != second.page_size:
        raise DataError(f"{path}: the two LMDB headers disagree, the file is damaged")
    newest = max(first, second, key=lambda meta: meta.transaction)
    if size < newest.bytes_needed:
        raise DataError(
            f"{path}: the file is truncated: {size} bytes of {newest.bytes_needed}: "
            "copy or download it again"
        )
    return newest


def _meta_page(path: Path, head: bytes, offset: int) -> MetaPage:
    if len(head) < offset + _META.size:
        kind = "truncated" if offset or head[16:20] == struct.pack("<I", _MAGIC) else "no LMDB file"
        raise DataError(f"{path}: the file is {kind} ({len(head)} bytes)")
    fields = _META.unpack_from(head, offset)
    flags, magic, version, page_size = fields[2], fields[5], fields[6], fields[9]
    roots, last_page, transaction = (fields[16], fields[24]), fields[25], fields[26]
    table_flags, depth, entries = fields[18], fields[19], fields[23]
    if magic != _MAGIC or not flags & _META_FLAG:
        place = "" if offset == 0 else " (second header damaged)"
        raise DataError(f"{path}: this is no LMDB file{place}")
    if version != _VERSION or page_size not in _PAGE_SIZES:
        raise DataError(
            f"{path}: LMDB format {version} with pages of {page_size} bytes is not known, "
            f"expected format {_VERSION}"
        )
    if last_page < 1 or any(root != NO_ROOT and not 1 < root <= last_page for root in roots):
        raise DataError(f"{path}: the LMDB header contradicts itself, the file is damaged")
    if table_flags or depth > MAX_DEPTH:
        raise DataError(f"{path}: the table is of an unusual kind (flags {table_flags:#x})")
    return MetaPage(page_size, last_page, transaction, roots[1], depth, entries)


FileIdentity = tuple[int, int]


def file_identity(path: Path) -> FileIdentity:
    """Give device and inode, the same for every name of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


class SharedEnvironment:
    """A read-only LMDB environment that every reader of one file in one process shares.

    A forked child closes the inherited handle and opens its own on first use.
    """

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        self.path = path
        self.identity = identity
        self._lock = threading.Lock()
        self._pid = -1
        self._environment: lmdb.Environment | None = None

    def get(self) -> lmdb.Environment:
        """Give the environment of this process, opened if necessary."""
        if self._environment is None or self._pid != os.getpid():
            self._open()
        assert self._environment is not None
        return self._environment

    def _open(self) -> None:
        if self._pid not in {-1, os.getpid()}:
            self._lock = threading.Lock()  # the parent's may be held by a thread lost in the fork
        with self._lock:
            if self._environment is not None:
                if self._pid == os.getpid():
                    return
                self._environment.close()
            check_lmdb_file(self.path)
            if file_identity(self.path) != self.identity:
                raise DataError(f"{self.path}: the file was replaced while in use: open it again")
            try:
                self._environment = lmdb.open(
                    str(self.path), subdir=False, readonly=True, lock=False, readahead=False,
                    meminit=False, max_spare_txns=4,
                )  # fmt: skip
            except lmdb.Error as error:
                self._environment = None
                raise DataError(f"{self.path}: LMDB cannot open it: {error}") from None
            self._pid = os.getpid()

    def __del__(self) -> None:
        if self._environment is not None:
            self._environment.close()


_open_files: weakref.WeakValueDictionary[FileIdentity, SharedEnvironment] = (
    weakref.WeakValueDictionary()
)


def shared_environment(path: Path) -> SharedEnvironment:
    """Give the environment of a file, the same object for every name of that file.

    Raises:
        DataError: see :func:`check_lmdb_file`.
    """
    check_lmdb_file(path)
    identity = file_identity(path)
    return _open_files.setdefault(identity, SharedEnvironment(path, identity))
