"""Log and trajectory of a run: appended to, and cut back to the last checkpoint on a restart."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io.trajectory import Trajectory

from mlip.errors import InputError
from mlip.simulation.output import clear_write_errors, extxyz_text


class LogFile:
    """CSV with a header line.

    Args:
        path: file.
        columns: header.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` bytes; 0 starts anew."""
        _cut_bytes(self.path, length)
        if length == 0:
            self.append(self.columns)

    def append(self, values: Sequence[Any]) -> None:
        """Write one line."""
        with (
            clear_write_errors(self.path),
            self.path.open("a", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerow(values)

    def length(self) -> int:
        """Bytes written, made durable."""
        return _durable_size(self.path)

    def read(self) -> list[list[str]]:
        """Return all lines below the header."""
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]


class TrajectoryFile:
    """Frames in ``.extxyz`` (also ``.xyz``) or ASE's ``.traj``.

    Args:
        path: file; its ending decides on the format.

    Raises:
        InputError: another ending.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".extxyz", ".xyz", ".traj"):
            raise InputError(f"{path}: a trajectory is .extxyz or .traj")
        self.path = path
        self.binary = path.suffix == ".traj"

    def cut(self, length: int) -> None:
        """Keep the first ``length`` bytes (.traj: frames); 0 starts anew."""
        if not self.binary or length == 0:
            _cut_bytes(self.path, length)
        elif self._frames() != length:
            self._cut_frames(length)

    def _cut_frames(self, length: int) -> None:
        if self._frames() < length:
            raise InputError(_too_short(self.path))
        temporary = self.path.with_name(f".{self.path.name}.cut")
        temporary.unlink(missing_ok=True)
        with Trajectory(str(self.path)) as old, Trajectory(str(temporary), "w") as new:
            for k in range(length):
                new.write(old[k])
        temporary.replace(self.path)

    def append(self, atoms: Atoms) -> None:
        """Write one frame with the results of its calculator."""
        with clear_write_errors(self.path):
            if self.binary:
                with Trajectory(str(self.path), "a") as file:
                    file.write(atoms)
            else:
                with self.path.open("a", encoding="utf-8") as text:
                    text.write(extxyz_text(atoms))

    def length(self) -> int:
        """Bytes (.traj: frames) written, made durable."""
        size = _durable_size(self.path)
        return self._frames() if self.binary and size else size

    def _frames(self) -> int:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return 0
        with Trajectory(str(self.path)) as file:
            return len(file)


def _cut_bytes(path: Path, length: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise InputError(_too_short(path))
    if length == 0:
        path.unlink(missing_ok=True)
    elif size > length:
        os.truncate(path, length)


def _too_short(path: Path) -> str:
    return f"{path}: shorter than when the checkpoint was written; start again without --resume"


def _durable_size(path: Path) -> int:
    if not path.exists():
        return 0
    with clear_write_errors(path), path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size
