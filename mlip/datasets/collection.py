"""Open data sets as sequences of structures, whatever files they come from."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from mlip.datasets.labels import LabelKeys
from mlip.datasets.read import PathLike, expand, find_reader, iterate_file
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Array, Structure
from mlip.errors import DataError


class Dataset(Protocol):
    """What every opened data set offers."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> list[Structure]: ...

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        ...

    def name(self, index: int) -> str:
        """Name the file and the place in it that a structure comes from."""
        ...


class LoadedDataset(Sequence[Structure]):
    """Structures held in memory, with the place each came from."""

    def __init__(self, structures: Sequence[Structure], names: Sequence[str]) -> None:
        self._structures = list(structures)
        self._names = list(names)

    def __len__(self) -> int:
        return len(self._structures)

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> list[Structure]: ...
    def __getitem__(self, index: int | slice) -> Structure | list[Structure]:
        return self._structures[index]

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        return np.array([len(s) for s in self._structures], dtype=np.int64)

    def name(self, index: int) -> str:
        """Name the file and frame that a structure comes from."""
        return self._names[index]


class ConcatenatedDataset(Sequence[Structure]):
    """Several data sets one after the other."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> list[Structure]: ...
    def __getitem__(self, index: int | slice) -> Structure | list[Structure]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, place = self._locate(index)
        return part[place]

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        return np.concatenate([part.n_atoms() for part in self.parts])

    def name(self, index: int) -> str:
        """Name the file and the place in it that a structure comes from."""
        part, place = self._locate(index)
        return part.name(place)

    def _locate(self, index: int) -> tuple[Dataset, int]:
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"there is no structure {index}, the data set has {len(self)}")
        which = bisect.bisect_right(self._ends, i)
        return self.parts[which], i - (self._ends[which - 1] if which else 0)


def open_dataset(
    paths: PathLike | Sequence[PathLike], *, keys: LabelKeys | None = None
) -> StructureStore | LoadedDataset | ConcatenatedDataset:
    """Open files as one sequence of structures.

    A native store is read entry by entry; other files are read whole, each frame checked.

    Args:
        paths: a file, a pattern (``"data/*.extxyz"``) or a list of them.
        keys: keys of the labels, where the usual names do not fit.

    Raises:
        DataError: a file is missing, unknown or damaged, or a frame in it is bad; converting with
            ``mlip convert`` drops bad frames and reports them instead.
    """
    parts = [_open(path, keys) for path in expand(paths)]
    return parts[0] if len(parts) == 1 else ConcatenatedDataset(parts)


def _open(path: Path, keys: LabelKeys | None) -> StructureStore | LoadedDataset:
    reader = find_reader(path)
    if reader.name.startswith("mlip store"):
        return StructureStore(path)
    structures: list[Structure] = []
    names: list[str] = []
    for entry in iterate_file(path, keys):
        if entry.structure is None:
            raise DataError(f"{entry.problem} (mlip convert drops bad frames and reports them)")
        structures.append(entry.structure)
        names.append(entry.name)
    return LoadedDataset(structures, names)
