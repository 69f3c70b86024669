"""Stream extended XYZ one frame at a time, compressed or not; ASE parses each frame.

Unlike ASE's own loop this needs no second pass over the file, and a frame that cannot be parsed
costs only itself: reading goes on at the next line that looks like the start of a frame.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mlip.datasets.formats.reader import Frames
from mlip.datasets.options import ReadOptions
from mlip.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

_OPENERS: dict[str, Callable[..., Any]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
}
COMPRESSED = frozenset(_OPENERS)
STREAM_ERRORS = (EOFError, lzma.LZMAError, zlib.error, OSError)


def is_extxyz(path: Path) -> bool:
    """Recognise extended XYZ by the name of the file, compressed or not."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return bool(suffixes) and suffixes[-1] in {".extxyz", ".xyz"}


def stem(path: Path) -> str:
    """Give the name of a file without ``.extxyz`` and the ending of its compression."""
    name = path.stem if path.suffix in COMPRESSED else path.name
    return name.rpartition(".")[0] or name


def open_text(path: Path) -> IO[str]:
    """Open a text file, compressed or not; bytes that are no UTF-8 become lone surrogates."""
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8", errors="surrogateescape")


def read_extxyz(path: Path, start: int, options: ReadOptions) -> Frames:  # noqa: ARG001
    """Give (frame index, atoms) from frame ``start`` on; a bad frame gives an error in its place.

    A compressed stream that is damaged or ends early gives an error after the frames before.

    Raises:
        DataError: such a stream without any whole frame.
    """
    number = -1
    try:
        with open_text(path) as file:
            for number, frame in enumerate(_frames(_Lines(file))):
                if number >= start:
                    yield number, _parse(frame) if isinstance(frame, list) else frame
    except STREAM_ERRORS as error:
        kind = "ends early" if isinstance(error, EOFError) else f"is damaged ({error})"
        text = f"the file {kind} after {number + 1} frames (interrupted download?): fetch it again"
        if number < 0:
            raise DataError(f"{path}: {text}") from None
        if number + 1 >= start:
            yield number + 1, DataError(text)


class FrameCount(NamedTuple):
    """How many frames a file has, and whether it ends inside one more."""

    whole: int
    cut: bool


def count_frames(path: Path) -> FrameCount:
    """Count the frames of a file, bad ones too, without parsing them."""
    whole = 0
    try:
        with open_text(path) as file:
            for frame in _frames(_Lines(file)):
                if isinstance(frame, _CutFrameError):
                    return FrameCount(whole, cut=True)
                whole += 1
    except STREAM_ERRORS:
        return FrameCount(whole, cut=True)
    return FrameCount(whole, cut=False)


class _CutFrameError(DataError):
    """The file ends inside a frame."""


class _Lines:
    """Lines of a file with a line count and a place to put lines back."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._returned: deque[str] = deque()
        self.number = 0

    def next(self) -> str:
        """Give the next line, empty at the end of the file."""
        self.number += 1
        return self._returned.popleft() if self._returned else self._file.readline()

    def put_back(self, lines: list[str]) -> None:
        self.number -= len(lines)
        self._returned.extendleft(reversed(lines))


def _frames(lines: _Lines) -> Iterator[list[str] | DataError]:
    """Cut the file into the lines of one frame each, or an error where that is impossible."""
    while line := lines.next():
        if not line.strip():
            continue
        place = lines.number
        if not line.strip().isdecimal():
            yield DataError(f"line {place}: expected the number of atoms, found {line.strip()!r}")
            _skip_to_header(lines)
            continue
        frame = [line]
        for _ in range(int(line) + 1):
            frame.append(lines.next())
            if not frame[-1]:
                break
        inner = _inner_header(frame)
        if inner is not None:
            lines.put_back(frame[inner:])
            rows = inner - 2
            yield DataError(f"line {place}: {rows} atoms, expected {line.strip()}")
        elif not frame[-1] or _last_row_is_cut(frame[2:]):
            rows = max(0, len(frame) - 3)
            yield _CutFrameError(
                f"line {place}: the file ends inside the frame ({rows} atoms of {line.strip()}; "
                "interrupted download?)"
            )
        else:
            yield frame + _cell_vectors(lines)


def _inner_header(frame: list[str]) -> int | None:
    """Find the start of the next frame among the lines of this one (a frame with rows missing)."""
    for i in range(2, len(frame) - 1):
        if frame[i].strip().isdecimal() and "=" in frame[i + 1]:
            return i
    last = len(frame) - 1
    return last if last >= 2 and frame[last].strip().isdecimal() else None


def _last_row_is_cut(rows: list[str]) -> bool:
    """Tell whether the last row has no end and is shorter than all others, which are alike.

    Such a row may still parse, with digits missing.
    """
    if len(rows) < 3 or rows[-1].endswith("\n"):
        return False
    lengths = {len(row) for row in rows[:-1]}
    return len(lengths) == 1 and len(rows[-1]) + 1 < lengths.pop()


def _skip_to_header(lines: _Lines) -> None:
    previous = lines.next()
    while previous:
        line = lines.next()
        if previous.strip().isdecimal() and "=" in line:
            lines.put_back([previous, line])
            return
        previous = line


def _cell_vectors(lines: _Lines) -> list[str]:
    vectors: list[str] = []
    while (line := lines.next()).lstrip().startswith("VEC"):
        vectors.append(line)
    if line:
        lines.put_back([line])
    return vectors


def _parse(frame: list[str]) -> Atoms | DataError:
    from ase.io.extxyz import read_extxyz as parse

    text = "".join(frame)
    try:
        text.encode()
    except UnicodeEncodeError:
        return DataError("the frame holds bytes that are no UTF-8 text")
    try:
        return next(iter(parse(io.StringIO(text), 0)))
    except Exception as error:  # ASE raises whatever its parser trips over
        return DataError(f"cannot be parsed: {error or type(error).__name__}")
