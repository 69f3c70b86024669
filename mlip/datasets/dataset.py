"""What an opened data set offers, and the ways to put data sets together."""

from __future__ import annotations

import bisect
import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np

from mlip.datasets.structure import Array, Structure

if TYPE_CHECKING:
    from mlip.datasets.labels import Extracted


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set without reading its entries.

    Attributes:
        format: name of the file format.
        energy_convention: ``"total"`` or ``"adsorption"`` as stated by the user or by the file,
            ``"unstated"`` where the format has both (OC20) and nobody said; None where the format
            leaves no doubt.
        problems: what is wrong with the files but leaves the entries readable (a wrong length,
            a size table that disagrees, missing keys), each with file and numbers.
        relaxation_frame: ``"initial"``, ``"relaxed"`` or ``"unstated"`` for IS2RE files, else None.
    """

    format: str
    energy_convention: str | None = None
    problems: tuple[str, ...] = ()
    relaxation_frame: str | None = None


class Dataset(Protocol):
    """A sequence of structures; entries are read and validated when asked for."""

    @property
    def facts(self) -> DatasetFacts:
        """Tell what is known without reading entries."""
        ...

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> list[Structure]: ...

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        ...

    def name(self, index: int) -> str:
        """Name the file and the place in it: ``"FILE kind key"``, no blanks in the last two."""
        ...

    def fingerprint(self) -> str:
        """Identify the content cheaply: changes when the files do."""
        ...


class StructureSequence(Sequence[Structure]):
    """What data sets share that read one entry at a time by its place."""

    def read(self, index: int) -> Structure:
        """Read and check the entry at a place from 0 to the length.

        Raises:
            DataError: a bad entry; the text names file, entry and field.
        """
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> list[Structure]: ...
    def __getitem__(self, index: int | slice) -> Structure | list[Structure]:
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        return self.read(checked_index(index, len(self)))


class IndexedDataset(StructureSequence):
    """What foreign formats with random access share.

    Args:
        path: the file.
        facts: what is known of it.
    """

    def __init__(self, path: Path, facts: DatasetFacts) -> None:
        self.path = path
        self.facts = facts

    def extract(self, index: int) -> Extracted:
        """Read an entry with the names its labels had, and what is not kept of it.

        Raises:
            DataError: a bad entry; the text names file, entry and field.
        """
        raise NotImplementedError

    def read(self, index: int) -> Structure:
        """Read and check the entry at a place from 0 to the length."""
        return self.extract(index).structure


class LoadedDataset(Sequence[Structure]):
    """Structures held in memory, with the place each came from."""

    def __init__(
        self, structures: Sequence[Structure], names: Sequence[str], facts: DatasetFacts
    ) -> None:
        self._structures = list(structures)
        self._names = list(names)
        self.facts = facts

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

    def fingerprint(self) -> str:
        """Identify the content (geometries and energies)."""
        digest = hashlib.blake2b(digest_size=8)
        for s in self._structures:
            for part in (s.numbers, s.positions, s.cell, s.pbc):
                digest.update(part.tobytes())
            digest.update(repr(s.energy).encode())
        return f"{len(self)}-{digest.hexdigest()}"


class ConcatenatedDataset(StructureSequence):
    """Several data sets one after the other.

    Args:
        parts: data sets.
        n_atoms: [len] number of atoms of every structure, if known without reading them.
        problems: what is wrong with the whole beside what is wrong with its parts.
    """

    def __init__(
        self,
        parts: Sequence[Dataset],
        *,
        n_atoms: Array | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.parts = list(parts)
        self._n_atoms = n_atoms
        self._problems = tuple(problems)
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    @property
    def facts(self) -> DatasetFacts:
        """Tell what the parts have in common; their problems are all listed."""
        facts = [part.facts for part in self.parts]
        formats = ", ".join(dict.fromkeys(f.format for f in facts))
        problems = (*(problem for f in facts for problem in f.problems), *self._problems)
        return DatasetFacts(
            formats,
            _common([f.energy_convention for f in facts]),
            problems,
            _common([f.relaxation_frame for f in facts]),
        )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Structure:
        """Read the entry at a place from 0 to the length."""
        part, place = self.locate(index)
        return self.parts[part][place]

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        if self._n_atoms is not None:
            return self._n_atoms
        return np.concatenate([part.n_atoms() for part in self.parts])

    def name(self, index: int) -> str:
        """Name the file and the place in it that a structure comes from."""
        part, place = self.locate(index)
        return self.parts[part].name(place)

    def fingerprint(self) -> str:
        """Identify the content of all parts in their order."""
        joined = "/".join(part.fingerprint() for part in self.parts)
        return f"{len(self)}-{hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()}"

    def locate(self, index: int) -> tuple[int, int]:
        """Give the part that holds a structure, and its place there."""
        i = checked_index(index, len(self))
        which = bisect.bisect_right(self._ends, i)
        return which, i - (self._ends[which - 1] if which else 0)


class SelectedDataset(StructureSequence):
    """Some entries of a data set, in a given order.

    Args:
        base: the whole set.
        indices: places of the entries in it.
        n_atoms: number of atoms of the chosen entries, if known without asking the whole set.
        problems: what is worth saying of the choice.
    """

    def __init__(
        self,
        base: Dataset,
        indices: Array,
        *,
        n_atoms: Array | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.base = base
        self.indices = np.asarray(indices, dtype=np.int64)
        self._n_atoms = n_atoms
        self._problems = tuple(problems)

    @property
    def facts(self) -> DatasetFacts:
        """Tell what the whole set says, and what was said of the choice."""
        facts = self.base.facts
        return replace(facts, problems=(*facts.problems, *self._problems))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Structure:
        """Read the entry at a place from 0 to the length."""
        return self.base[int(self.indices[index])]

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        return self.base.n_atoms()[self.indices] if self._n_atoms is None else self._n_atoms

    def name(self, index: int) -> str:
        """Name the file and the place in it that a structure comes from."""
        return self.base.name(int(self.indices[checked_index(index, len(self))]))

    def fingerprint(self) -> str:
        """Identify the content of the whole set and the choice."""
        digest = hashlib.blake2b(self.indices.tobytes(), digest_size=8)
        return f"{self.base.fingerprint()}-{digest.hexdigest()}"


def checked_index(index: int, length: int) -> int:
    """Give the place of a possibly negative index.

    Raises:
        IndexError: outside of the data set.
    """
    i = operator.index(index)
    i = i + length if i < 0 else i
    if not 0 <= i < length:
        raise IndexError(f"there is no structure {index}, the data set has {length}")
    return i


def _common(values: list[str | None]) -> str | None:
    stated = set(values)
    return stated.pop() if len(stated) == 1 else "mixed" if stated else None
