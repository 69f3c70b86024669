"""Files that ASE reads: trajectories, databases, DFT outputs and everything else it knows.

Of VASP's energies ASE gives the one extrapolated to no smearing (``e_0_energy``, "sigma->0") as
``energy`` and the one that the forces derive from (``e_fr_energy``, TOTEN) as ``free_energy``; name
the latter with ``LabelKeys(energy="free_energy")``. Its stress has ASE's sign and unit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mlip.datasets.formats.reader import Frames
from mlip.datasets.options import ReadOptions
from mlip.errors import DataError


def ase_format(path: Path) -> str | None:
    """Give ASE's name of the format of a file, None if ASE cannot read it."""
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        name = filetype(str(path), read=True)
    except (UnknownFileTypeError, OSError, EOFError, UnicodeDecodeError):
        return None
    return name if name in ioformats and ioformats[name].can_read else None


def read_trajectory(path: Path, start: int, options: ReadOptions) -> Frames:  # noqa: ARG001
    """Read an ASE trajectory; a damaged frame costs only itself."""
    from ase.io.trajectory import TrajectoryReader

    with _file_errors(path), TrajectoryReader(str(path)) as frames:
        for i in range(start, len(frames)):
            try:
                atoms = frames[i]
            except Exception as error:  # ASE raises whatever it trips over
                yield i, DataError(f"cannot be read: {error or type(error).__name__}")
            else:
                yield i, atoms


def read_database(path: Path, start: int, options: ReadOptions) -> Frames:  # noqa: ARG001
    """Read an ASE database (sqlite or JSON) in the order of its ids."""
    from ase.db import connect

    with _file_errors(path):
        rows = connect(str(path)).select(sort="id", offset=start)
        for i, row in enumerate(rows, start=start):
            try:
                atoms = row.toatoms()
                atoms.info.update({**row.key_value_pairs, **(row.data or {})})
            except Exception as error:  # ASE raises whatever it trips over
                yield i, DataError(f"cannot be read: {error or type(error).__name__}")
            else:
                yield i, atoms


def read_with_ase(path: Path, start: int, options: ReadOptions) -> Frames:  # noqa: ARG001
    """Read any file that ASE knows."""
    from ase.io import iread

    with _file_errors(path):
        yield from islice(enumerate(iread(str(path), index=":")), start, None)


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn what ASE raises about a whole file into one clear error."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # ASE raises whatever it trips over
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read ({reason}): is it complete? fetch or write it again"
        ) from error
