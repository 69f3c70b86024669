"""Append results to files so that a run killed at any moment resumes without loss or repetition.

The record beside the files says how long each of them was when so many structures were finished.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from mlip.errors import InputError, MlipError
from mlip.files import atomic_write


@contextlib.contextmanager
def clear_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to append to a file into one clear error; what was committed stays."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise MlipError(
            f"cannot write {path}: {reason}; free space, then go on with --resume"
        ) from error


class ResumableFiles:
    """Write files under temporary names (``NAME.part``) that become final when all is done.

    ``record`` (JSON) holds the settings of the run, how many structures are finished and whether
    all are. With ``resume``, parts are cut back to the last commit and go on from there.

    Args:
        files: final names.
        record: name of the record; it stays when the run is finished.
        settings: JSON-able description of the run; a resumed run must have the same.
        resume: go on from an unfinished run, if there is one.

    Raises:
        InputError: the unfinished run had other settings, or its files are gone.
    """

    def __init__(
        self,
        files: Sequence[Path],
        record: Path,
        settings: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        self.files = list(files)
        self.record = record
        self.settings = json.loads(json.dumps(settings))
        self.done = 0
        self.counts: dict[str, int] = {}
        self.finished = False
        self._handles: list[IO[bytes]] = []
        old = self._read_record() if resume and record.exists() else None
        lengths = [0] * len(self.files)
        if old is not None:
            self.done, self.finished, lengths = old["done"], old["finished"], old["bytes"]
            self.counts = old["counts"]
        if not self.finished:
            self._open(lengths)
            if old is None:
                self.commit(0)

    def _read_record(self) -> dict[str, Any]:
        try:
            old = json.loads(self.record.read_text(encoding="utf-8"))
            before = old["settings"]
            complete = {"done", "counts", "finished", "bytes"} <= set(old)
        except (ValueError, KeyError, TypeError):
            before, complete = {}, False
        if not complete:
            raise InputError(
                f"{self.record}: not the record of a run; delete it or write elsewhere"
            )
        for key in sorted(before.keys() | self.settings.keys()):
            if before.get(key) != self.settings.get(key):
                raise InputError(
                    f"{self.record}: cannot resume, {key} was {before.get(key)!r} and is "
                    f"{self.settings.get(key)!r} now; use the same settings, or start again "
                    "without --resume"
                )
        return dict(old)

    def _open(self, lengths: Sequence[int]) -> None:
        for path, length in zip(self.files, lengths, strict=True):
            part = _part(path)
            with clear_write_errors(path):
                part.parent.mkdir(parents=True, exist_ok=True)
            renamed = length and not part.exists() and path.exists()
            if renamed and path.stat().st_size == length:  # killed while finishing
                path.replace(part)
            if length and (not part.exists() or part.stat().st_size < length):
                raise InputError(f"{part}: gone or shortened; start again without --resume")
            with clear_write_errors(path):
                handle = part.open("r+b" if length else "wb")
                handle.truncate(length)
                handle.seek(length)
            self._handles.append(handle)

    def append(self, *chunks: str) -> None:
        """Write one piece of text to each file, in their order.

        Raises:
            MlipError: the disk is full or gone.
        """
        for path, handle, chunk in zip(self.files, self._handles, chunks, strict=True):
            with clear_write_errors(path):
                handle.write(chunk.encode())

    def commit(self, done: int, counts: Mapping[str, int] | None = None) -> None:
        """Make everything appended so far durable.

        Args:
            done: structures finished so far.
            counts: further counts for the record; they come back on resuming.
        """
        for path, handle in zip(self.files, self._handles, strict=True):
            with clear_write_errors(path):
                handle.flush()
                os.fsync(handle.fileno())
        self.done = done
        self.counts = dict(counts or self.counts)
        self._write_record()

    def finish(self) -> None:
        """Give the files their final names."""
        if self.finished:
            return
        self.commit(self.done)
        lengths = [handle.tell() for handle in self._handles]
        self._close()
        for path in self.files:
            _part(path).replace(path)
        self.finished = True
        self._write_record(lengths)

    def _write_record(self, lengths: list[int] | None = None) -> None:
        state = {
            "settings": self.settings,
            "done": self.done,
            "counts": self.counts,
            "finished": self.finished,
            "bytes": lengths or [handle.tell() for handle in self._handles],
        }
        with atomic_write(self.record, "w") as file:
            json.dump(state, file, indent=1)

    def _close(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            with contextlib.suppress(OSError):  # flushed before, or an error is on its way
                handle.close()

    def __enter__(self) -> ResumableFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()


def check_not_input(output: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Raise InputError if writing ``output`` would replace one of the inputs."""
    if any(Path(path).resolve() == output.resolve() for path in inputs):
        raise InputError(
            f"{output} is an input: an input is never overwritten; choose another name"
        )


def with_results(atoms: Atoms, results: Mapping[str, Any], **info: Any) -> Atoms:
    """Copy a structure with results that ASE reads back, and facts in ``info``.

    Old results among ``info`` and ``arrays`` that would clash with the new ones are dropped.

    Args:
        atoms: structure; unchanged.
        results: by ASE's names (energy, forces, stress, …).
        info: JSON-able facts that the file keeps.
    """
    copy = atoms.copy()
    for name in all_properties:
        copy.info.pop(name, None)
        copy.arrays.pop(name, None)
    copy.info.update(info)
    known = {name: value for name, value in results.items() if name in all_properties}
    copy.calc = SinglePointCalculator(copy, **known)
    return copy


def extxyz_text(atoms: Atoms) -> str:
    """Format one frame, with the results of its calculator, as extended XYZ.

    Empty strings in ``info`` are left out: the format has no way to write them, and what follows
    them would be misread.
    """
    from ase.io.extxyz import write_extxyz

    text = io.StringIO()
    writable = atoms.copy()
    writable.calc = atoms.calc
    writable.info = {key: value for key, value in atoms.info.items() if not _is_empty(value)}
    write_extxyz(text, writable)
    return text.getvalue()


def _is_empty(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
