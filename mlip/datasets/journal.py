"""The journal of a conversion: what came of each chunk of frames, one line of JSON each.

It lies beside the partial output until that is complete. The output alone says how many structures
are safe; the journal tells which frames they were and what else was found up to there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from mlip.datasets.chunks import Chunk
from mlip.datasets.writer import left_over, open_locked, write_error
from mlip.errors import DataError


class Journal:
    """Append records, and read them back after an interruption.

    Attributes:
        resumed: whether there was one to go on with.
        ended: whether its conversion needed nothing but the name of the output any more.

    Args:
        path: the file; held by this process alone.
        job: identifies the conversion.
        resume: go on with what is there.
        overwrite: drop what is there.

    Raises:
        DataError: a journal is left and neither was asked for, or it is of another conversion.
        MlipError: it cannot be written.
    """

    def __init__(self, path: Path, job: str, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self.resumed = self.ended = False
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_locked(path)
        self._file = os.fdopen(handle, "r+b")
        try:
            self._begin(job, resume, overwrite)
        except BaseException:
            self._file.close()
            raise

    def restore(self, structures: int) -> Iterator[dict[str, Any]]:
        """Give the records up to a number of structures, and forget those beyond."""
        self._file.seek(0)
        self._file.readline()
        end, kept = self._file.tell(), 0
        for line in self._file:
            record = _parse(line)
            if record is None or "end" in record or kept + record["kept"] > structures:
                break
            kept += record["kept"]
            end += len(line)
            yield record
        self._file.seek(end)
        self._file.truncate()

    def records(self) -> Iterator[dict[str, Any]]:
        """Give all records."""
        self._file.seek(0)
        self._file.readline()
        for line in self._file:
            record = _parse(line)
            if record is not None and "end" not in record:
                yield record

    def append(self, record: dict[str, Any]) -> None:
        """Add a record at the end."""
        try:
            self._file.write(orjson.dumps(record) + b"\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from error

    def end(self) -> None:
        """Note, durably, that all is done but giving the output its name."""
        self.append({"end": True})
        os.fsync(self._file.fileno())

    def close(self, *, remove: bool) -> None:
        """Let go of the file."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _begin(self, job: str, resume: bool, overwrite: bool) -> None:
        """Read or write the first line."""
        first = _parse(self._file.readline())
        if first is not None and resume:
            if first.get("job") != job:
                raise DataError(
                    f"{self.path} was begun with other inputs or options (or the inputs changed "
                    "since): start again with --overwrite"
                )
            self.resumed = True
            self.ended = "end" in (_parse(self._last_line()) or {})
            return
        if first is not None and not overwrite:
            raise DataError(left_over(self.path))
        self._file.seek(0)
        self._file.truncate()
        self.append({"job": job})

    def _last_line(self) -> bytes:
        line = b""
        for line in self._file:  # noqa: B007
            pass
        return line


def chunk_record(chunk: Chunk) -> dict[str, Any]:
    """Give what the journal keeps of a chunk: everything but the entries."""
    return {
        "file": chunk.file,
        "start": chunk.start,
        "frames": chunk.frames,
        "kept": len(chunk.entries),
        "bad": chunk.bad,
        "damage": chunk.damage,
        "last": chunk.last,
        **chunk.record,
    }


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line; None for one that was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
