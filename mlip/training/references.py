"""Reference energies per element: fitted, given, or isolated atoms, with the residual they leave.

Energies are seen once, in any number; what is kept grows with the number of elements only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from mlip.errors import InputError

MAX_RESIDUAL = 20.0  # eV/atom; beyond it the labels do not share one zero of energy
_BLOCK = 4096  # structures between two updates
_RIDGE = 1e-10  # of the squared length of a column
_REFINEMENTS = 3  # of the ridge: its bias on a well-determined energy is of the order _RIDGE³

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class EnergyStatistics:
    """What energies say about reference energies, without the energies.

    With the composition x of a structure (fractions, one column an element) and y its energy per
    atom, the triangular factor R of [X | y] = Q R is kept, for all structures and for those that
    hold each element. |X μ − y| of any μ is |R (−μ, 1)|: unlike sums of squares this loses no
    digits, even at -1e5 eV/atom. Energies that get a new zero need no second pass either.

    Attributes:
        elements: atomic numbers in the order of the columns.
        counts: number of structures that hold an element; under 0 that of all.
        factors: R of the same, [rows, 1 + len(elements)].
    """

    elements: tuple[int, ...]
    counts: dict[int, int]
    factors: dict[int, Reals]

    @property
    def count(self) -> int:
        """Number of energies."""
        return self.counts.get(0, 0)

    def factor(self, element: int, columns: Sequence[int]) -> Reals:
        """Give R of all structures (element 0) or of those that hold an element, other columns.

        Args:
            element: atomic number or 0.
            columns: atomic numbers of the k columns; the last column is the energy per atom.
        """
        found = self.factors[element]
        wide = np.zeros((len(found), len(columns) + 1))
        wide[:, [columns.index(z) for z in self.elements]] = found[:, :-1]
        wide[:, -1] = found[:, -1]
        return wide

    def shifted(self, by: Mapping[int, float]) -> EnergyStatistics:
        """Give the statistics of energies plus ``by[z]`` eV for each atom of element z."""
        shift = np.array([*(by[z] for z in self.elements), 1.0])
        factors = {}
        for element, old in self.factors.items():
            factors[element] = np.column_stack([old[:, :-1], old @ shift])
        return EnergyStatistics(self.elements, self.counts, factors)


class EnergyCollector:
    """Makes energy statistics from one energy after the other."""

    def __init__(self) -> None:
        self._found = EnergyStatistics((), {}, {})
        self._rows: list[NDArray[np.int64]] = []
        self._energies: list[float] = []

    def add(self, numbers: NDArray[np.int64], energy: float) -> None:
        """Take in the energy (eV) of a structure with these atomic numbers [N]."""
        self._rows.append(np.bincount(numbers, minlength=119))
        self._energies.append(energy)
        if len(self._rows) == _BLOCK:
            self.result()

    def result(self) -> EnergyStatistics:
        """Give the statistics of all energies so far."""
        if self._rows:
            counts = np.array(self._rows)
            columns = np.flatnonzero(counts.any(0))
            table = np.column_stack([counts[:, columns], self._energies])
            table /= counts.sum(1, keepdims=True)
            block = _of_block(table, tuple(columns.tolist()))
            self._rows, self._energies = [], []
            self._found = merge([self._found, block])
        return self._found


def _of_block(table: Reals, elements: tuple[int, ...]) -> EnergyStatistics:
    counts, factors = {0: len(table)}, {0: table}
    for i, z in enumerate(elements):
        holds = table[:, i] > 0
        counts[z], factors[z] = int(holds.sum()), table[holds]
    return EnergyStatistics(elements, counts, factors)


def merge(parts: Iterable[EnergyStatistics]) -> EnergyStatistics:
    """Give the statistics of all energies of several."""
    parts = list(parts)
    elements = tuple(dict.fromkeys(z for part in parts for z in part.elements))
    counts: dict[int, int] = {}
    factors: dict[int, Reals] = {}
    for element in (0, *elements):
        having = [part for part in parts if element in part.counts]
        if having:
            rows = np.vstack([part.factor(element, elements) for part in having])
            counts[element] = sum(part.counts[element] for part in having)
            factors[element] = np.asarray(np.linalg.qr(rows, mode="r"))
    return EnergyStatistics(elements, counts, factors)


@dataclass(frozen=True)
class References:
    """Reference energies and what they leave unexplained.

    Attributes:
        energies: eV per atom of each atomic number.
        rmse: residual of all structures, eV/atom; NaN if none has an energy.
        rmse_of_element: the same over the structures that hold the element.
        source: ``"fitted"``, ``"given"`` or ``"isolated atoms"``.
    """

    energies: dict[int, float]
    rmse: float
    rmse_of_element: dict[int, float]
    source: str

    def lines(self) -> list[str]:
        """Report one line for all and one per element."""
        text = [
            f"  {chemical_symbols[z]:2s} {energy:14.6f} eV   {residual(self.rmse_of_element[z])}"
            for z, energy in self.energies.items()
        ]
        return [f"reference energies ({self.source}), {residual(self.rmse)}:", *text]


def residual(rmse: float) -> str:
    """Say what references leave unexplained, eV/atom; NaN: nothing was there to explain."""
    return "no energies" if math.isnan(rmse) else f"residual RMSE {rmse:.4f} eV/atom"


def fit_references(found: EnergyStatistics, elements: Sequence[int]) -> dict[int, float]:
    """Fit one energy per element by ridge regression of E_i / N_i ≈ Σ_z x_iz μ_z.

    The ridge term pulls towards the mean energy per atom, so that elements that always come in
    the same ratio share the energy instead of cancelling hugely. It is refined, so that it does
    not bias what the data determine.

    Args:
        found: statistics of the energies.
        elements: atomic numbers wanted.

    Returns:
        Energy of each element in eV: the mean for elements without energies, zeros if there is no
        energy at all.
    """
    if not found.count:
        return dict.fromkeys(elements, 0.0)
    factor = found.factor(0, found.elements)
    x, y = factor[:, :-1], factor[:, -1]
    ones = x.sum(1)  # the fractions of a structure add up to one
    mean = float(ones @ y / (ones @ ones))
    lengths = np.linalg.norm(x, axis=0)
    left, values, right = np.linalg.svd(x / lengths, full_matrices=False)
    damped = (_RIDGE / (values**2 + _RIDGE)) ** _REFINEMENTS
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(values > 0, (1 - damped) / values, 0.0)
    solution = mean + right.T @ (inverse * (left.T @ (y - mean * ones))) / lengths
    energies = dict(zip(found.elements, solution.tolist(), strict=True))
    return {z: energies.get(z, mean) for z in elements}


def given_references(
    energies: Mapping[str, float], elements: Sequence[int], where: str = "reference_energies"
) -> dict[int, float]:
    """Turn reference energies by symbol into energies by atomic number.

    Raises:
        InputError: an unknown symbol, or an element of the data without an energy.
    """
    unknown = [symbol for symbol in energies if symbol not in atomic_numbers]
    if unknown:
        raise InputError(f"{where}: {unknown[0]!r} is not an element symbol")
    table = {atomic_numbers[symbol]: float(value) for symbol, value in energies.items()}
    missing = [chemical_symbols[z] for z in elements if z not in table]
    if missing:
        raise InputError(
            f"{where}: no value for {', '.join(missing)}, which the data holds; "
            "add it, or leave reference_energies out to have all fitted"
        )
    return {z: table[z] for z in elements}


def isolated_references(
    isolated: Mapping[int, float], elements: Sequence[int], where: str = "reference_energies"
) -> dict[int, float]:
    """Take the energies of isolated atoms as references.

    Raises:
        InputError: the data lack the isolated atom of an element.
    """
    missing = [chemical_symbols[z] for z in elements if z not in isolated]
    if missing:
        raise InputError(
            f"{where} is 'isolated', but the data hold no neutral isolated atom (one atom, not "
            f"periodic or with config_type isolated_atom) with an energy of {', '.join(missing)}: "
            "add them, give the energies by symbol, or leave reference_energies out"
        )
    return {z: isolated[z] for z in elements}


def residual_rmse(found: EnergyStatistics, references: Mapping[int, float], of: int = 0) -> float:
    """Compute the root mean square of E_i / N_i − Σ_z x_iz μ_z, eV/atom.

    Args:
        found: statistics of the energies.
        references: μ, eV per element.
        of: only structures that hold this element; 0: all.
    """
    if not found.count or of not in found.counts:
        return float("nan")
    factor = found.factor(of, found.elements)
    mu = np.array([references[z] for z in found.elements])
    return float(np.linalg.norm(factor[:, -1] - factor[:, :-1] @ mu) / np.sqrt(found.counts[of]))


def summarise(references: Mapping[int, float], found: EnergyStatistics, source: str) -> References:
    """Compute the residual RMSE of all structures and of each element.

    Args:
        references: eV per element.
        found: statistics of the energies.
        source: see `References`.
    """
    by_element = {z: residual_rmse(found, references, z) for z in references}
    return References(dict(references), residual_rmse(found, references), by_element, source)
