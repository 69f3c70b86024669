"""What one pass over a set of structures finds: sizes, labels, elements, statistics of energies."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mlip.datasets import Structure
from mlip.training.references import EnergyCollector, EnergyStatistics, merge

ISOLATED = frozenset({"isolatedatom", "isolated"})  # config_type, in small letters without - and _


@dataclass(frozen=True)
class Survey:
    """Facts about structures, in 8 bytes a structure.

    Attributes:
        n_atoms: [n].
        n_edges: [n] directed edges within the cutoff.
        energy: statistics of the energies.
        isolated: energy of the neutral isolated atom of each element that has one, eV (the lowest
            where there are several).
        forces_square: sum of squared force components, (eV/Å)².
        forces_count: number of force components.
        stress_count: structures with a stress label and three periodic directions.
        first_with: for each element, ascending, the first structure that holds it.
    """

    n_atoms: NDArray[np.uint32]
    n_edges: NDArray[np.uint32]
    energy: EnergyStatistics
    isolated: dict[int, float]
    forces_square: float
    forces_count: int
    stress_count: int
    first_with: dict[int, int]

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers found, ascending."""
        return tuple(self.first_with)

    @property
    def labelled(self) -> bool:
        """Tell whether any structure has an energy, forces or stress."""
        return bool(self.energy.count or self.forces_count or self.stress_count)

    @property
    def average_neighbors(self) -> float:
        """Mean number of neighbours of an atom."""
        return float(self.n_edges.sum() / self.n_atoms.sum())

    @property
    def forces_rms(self) -> float:
        """Root mean square force component, eV/Å; 0 without force labels."""
        return float(np.sqrt(self.forces_square / max(self.forces_count, 1)))

    def shifted(self, by: dict[int, float]) -> Survey:
        """Give the survey with ``by[z]`` eV added to the energies for each atom of element z."""
        isolated = {z: energy + by[z] for z, energy in self.isolated.items()}
        return replace(self, energy=self.energy.shifted(by), isolated=isolated)


@dataclass
class Surveyor:
    """Makes a survey, one structure after the other."""

    _atoms: array[int] = field(default_factory=lambda: array("I"))
    _edges: array[int] = field(default_factory=lambda: array("I"))
    _energy: EnergyCollector = field(default_factory=EnergyCollector)
    _isolated: dict[int, float] = field(default_factory=dict)
    _square: float = 0.0
    _components: int = 0
    _stresses: int = 0
    _first_with: dict[int, int] = field(default_factory=dict)

    def add(self, structure: Structure, n_edges: int) -> None:
        """Take in a structure with its number of edges."""
        s = structure
        for z in np.unique(s.numbers).tolist():
            self._first_with.setdefault(z, len(self._atoms))
        self._atoms.append(len(s))
        self._edges.append(n_edges)
        if s.energy is not None:
            self._energy.add(s.numbers, s.energy)
            if is_isolated(s):
                z = int(s.numbers[0])
                self._isolated[z] = min(s.energy, self._isolated.get(z, s.energy))
        if s.forces is not None:
            self._square += float(np.square(s.forces).sum())
            self._components += s.forces.size
        self._stresses += s.stress is not None and bool(s.pbc.all())

    def result(self) -> Survey:
        """Give what was found."""
        return Survey(
            np.array(self._atoms, dtype=np.uint32),
            np.array(self._edges, dtype=np.uint32),
            self._energy.result(),
            self._isolated,
            self._square,
            self._components,
            self._stresses,
            dict(sorted(self._first_with.items())),
        )


def is_isolated(structure: Structure) -> bool:
    """Tell whether a structure is a neutral isolated atom: not periodic, or called one."""
    if len(structure) != 1 or structure.charge:
        return False
    kind = str(structure.info.get("config_type", "")).lower().replace("_", "").replace("-", "")
    return kind in ISOLATED or not structure.pbc.any()


def join(surveys: Sequence[Survey]) -> Survey:
    """Give the survey of several sets one after the other."""
    if len(surveys) == 1:
        return surveys[0]
    starts = np.cumsum([0, *(len(s.n_atoms) for s in surveys)]).tolist()
    first: dict[int, int] = {}
    isolated: dict[int, float] = {}
    for start, survey in zip(starts, surveys, strict=False):
        for z, place in survey.first_with.items():
            first.setdefault(z, start + place)
        for z, energy in survey.isolated.items():
            isolated[z] = min(energy, isolated.get(z, energy))
    return Survey(
        np.concatenate([s.n_atoms for s in surveys]),
        np.concatenate([s.n_edges for s in surveys]),
        merge(s.energy for s in surveys),
        isolated,
        sum(s.forces_square for s in surveys),
        sum(s.forces_count for s in surveys),
        sum(s.stress_count for s in surveys),
        dict(sorted(first.items())),
    )
