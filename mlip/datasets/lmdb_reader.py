"""Read LMDB files from anywhere with plain reads: no mapping, no library that a bad page can crash.

liblmdb trusts the pages it maps: damaged or crafted ones end the process (failed assertion, bus
error, segmentation fault), whatever the headers say. Here every number of a page is checked
against the page and the file, so a bad page is an error of the entries on it and nothing else.
Reading needs no locks: a reader keeps the state that the file had when it was opened; sharing it
between threads, across a fork and opening one file many times are all fine.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from mlip.datasets.lmdb_file import (
    MAX_DEPTH,
    NO_ROOT,
    MetaPage,
    file_identity,
    newest_meta_page,
    open_lmdb_file,
)  # fmt: skip
from mlip.errors import DataError

MAX_VALUE = 2**28  # bytes of one entry
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_KIND = 0x7F  # flags of a page that say what it is (one more is set by writers in passing)
_BIG = 0x01  # the value is on pages of its own
# Page header: number, -, flags, end of the places of the nodes, begin of the nodes.
_PAGE = struct.Struct("<QHHHH")
# Overflow page: number, -, flags, how many pages it spans.
_LARGE = struct.Struct("<QHHI")
# Node: size of the value (leaf) or number of the child (branch, with the flags), flags, key size.
_NODE = struct.Struct("<IHH")
_NUMBER = struct.Struct("<Q")
_CACHED = 1024  # branch pages


class LmdbReader:
    """The entries of one file, by key; safe on any content.

    Args:
        path: file.

    Raises:
        DataError: the file is missing, empty, no LMDB file, or shorter than its content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._file = open_lmdb_file(path)
        self._identity = file_identity(path)
        self.meta: MetaPage = newest_meta_page(path, self._file)
        self._branches: dict[int, bytes] = {}

    @property
    def entries(self) -> int:
        """Number of entries that the header states."""
        return self.meta.entries

    def get(self, key: bytes) -> bytes | None:
        """Give the value of a key, None if there is no such key.

        Raises:
            DataError: a page on the way to it, or of it, is damaged.
        """
        number = self.meta.root
        if number == NO_ROOT:
            return None
        for _ in range(MAX_DEPTH):
            page, leaf, count = self._page(number)
            try:
                if leaf:
                    place = bisect_left(range(count), key, key=partial(_key, page))
                    if place == count or _key(page, place) != key:
                        return None
                    return self._value(page, place)
                number = _child(page, _branch(page, count, key))
            except (IndexError, struct.error):
                raise self._damaged(number) from None
        raise self._damaged(number)

    def keys(self, start: bytes = b"") -> Iterator[bytes]:
        """Give the keys from ``start`` on, in the order of their bytes.

        Raises:
            DataError: a page that holds keys is damaged.
        """
        for page, count in self._leaves(start):
            try:
                keys = [_key(page, i) for i in range(count)]
            except (IndexError, struct.error):
                raise DataError("a page of keys is damaged: copy the file again") from None
            yield from (keys if not start or keys[0] >= start else keys[bisect_left(keys, start) :])

    def close(self) -> None:
        """Let go of the file; the next access opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_branches": {}}

    def _leaves(self, start: bytes) -> Iterator[tuple[bytes, int]]:
        """Walk over the leaf pages from the one that may hold ``start``."""
        waiting = [] if self.meta.root == NO_ROOT else [self.meta.root]
        first = True
        for _ in range(self.meta.last_page + 1):
            if not waiting:
                return
            number = waiting.pop()
            page, leaf, count = self._page(number)
            if leaf:
                first = False
                yield page, count
                continue
            try:
                place = _branch(page, count, start) if first else 0
                waiting += [_child(page, i) for i in range(count - 1, place - 1, -1)]
            except (IndexError, struct.error):
                raise self._damaged(number) from None
        raise DataError("the pages of the file lead in a circle: copy it again")

    def _page(self, number: int) -> tuple[bytes, bool, int]:
        """Read a branch or leaf page: its bytes, whether it is a leaf, its number of nodes."""
        page = self._branches.get(number)
        if page is None:
            page = self._read(number, self.meta.page_size)
        own, _, flags, lower, upper = _PAGE.unpack_from(page)
        kind, count = flags & _KIND, (lower - _PAGE.size) >> 1
        if own != number or kind not in {_BRANCH, _LEAF} or count < 1 or upper < lower:
            raise self._damaged(number)
        if kind == _BRANCH:
            if len(self._branches) >= _CACHED:
                self._branches.clear()
            self._branches[number] = page
        return page, kind == _LEAF, count

    def _value(self, page: bytes, place: int) -> bytes:
        at = _place(page, place)
        size, flags, key_size = _NODE.unpack_from(page, at)
        begin = at + _NODE.size + key_size
        if flags & ~_BIG:
            raise DataError("the entry is a table of its own: this is no file of data")
        if not flags:
            if begin + size > len(page):
                raise IndexError
            return page[begin : begin + size]
        (number,) = _NUMBER.unpack_from(page, begin)
        if size > MAX_VALUE:
            raise DataError(f"the entry declares {size} bytes, more than {MAX_VALUE}")
        content = self._read(number, _LARGE.size + size)
        own, _, kind, span = _LARGE.unpack_from(content)
        if own != number or not kind & _OVERFLOW or _LARGE.size + size > span * self.meta.page_size:
            raise self._damaged(number)
        return content[_LARGE.size :]

    def _read(self, number: int, size: int) -> bytes:
        """Read bytes from the begin of a page; all of them must lie within the file."""
        offset = number * self.meta.page_size
        if not 1 < number <= self.meta.last_page or offset + size > self.meta.bytes_needed:
            raise self._damaged(number)
        try:
            content = os.pread(self._descriptor(), size, offset)
        except OSError as error:
            raise DataError(f"the file cannot be read: {error.strerror}") from None
        if len(content) != size:
            raise DataError("the file was cut short while in use: copy it again")
        return content

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = open_lmdb_file(self.path)
            same = file_identity(self.path) == self._identity
            if not same or newest_meta_page(self.path, self._file) != self.meta:
                self.close()
                raise DataError("the file was replaced while in use: open it again")
        return self._file.fileno()

    def _damaged(self, number: int) -> DataError:
        return DataError(f"page {number:.20g} of the file is damaged: copy or download it again")


def _place(page: bytes, i: int) -> int:
    at = 16 + 2 * i
    return page[at] | page[at + 1] << 8


def _key(page: bytes, i: int) -> bytes:
    at = 16 + 2 * i
    at = page[at] | page[at + 1] << 8
    begin = at + 8
    return page[begin : begin + (page[at + 6] | page[at + 7] << 8)]


def _branch(page: bytes, count: int, key: bytes) -> int:
    """Find the child that may hold a key; the first child has no key of its own."""
    return bisect_right(range(1, count), key, key=partial(_key, page))


def _child(page: bytes, i: int) -> int:
    low, high, _ = _NODE.unpack_from(page, _place(page, i))
    return low | high << 32  # type: ignore[no-any-return]
