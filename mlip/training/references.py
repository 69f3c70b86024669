"""Reference energies per element: a ridge fit in float64, with the residual it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from mlip.errors import DataError, InputError

MAX_RESIDUAL = 20.0  # eV/atom; beyond it the labels do not share one zero of energy


@dataclass(frozen=True)
class References:
    """Reference energies and what they leave unexplained.

    Attributes:
        energies: eV per atom of each atomic number.
        rmse: residual of all structures, eV/atom; NaN if none has an energy.
        rmse_of_element: the same over the structures that hold the element.
        fitted: False if the energies were given.
    """

    energies: dict[int, float]
    rmse: float
    rmse_of_element: dict[int, float]
    fitted: bool

    def lines(self) -> list[str]:
        """Report one line per element and one for all."""
        how = "fitted" if self.fitted else "given"
        text = [
            f"  {chemical_symbols[z]:2s} {energy:14.6f} eV   residual "
            f"{self.rmse_of_element[z]:8.4f} eV/atom"
            for z, energy in self.energies.items()
        ]
        return [f"reference energies ({how}), residual RMSE {self.rmse:.4f} eV/atom:", *text]


def fit_references(
    counts: NDArray[np.integer], energies: NDArray[np.float64], elements: tuple[int, ...]
) -> dict[int, float]:
    """Fit one energy per element by ridge regression of E_i / N_i ≈ Σ_z x_iz μ_z.

    The ridge term pulls towards the mean energy per atom, so that elements that always come in
    the same ratio share the energy instead of cancelling hugely; at 1e-10 of the trace it
    changes a well-determined fit by a relative 1e-10.

    Args:
        counts: [n, n_elements] atoms of each element.
        energies: [n] eV, NaN where missing.
        elements: atomic numbers of the columns.

    Returns:
        Energy of each element in eV; zeros if there is no energy at all.
    """
    known = np.isfinite(energies)
    if not known.any():
        return dict.fromkeys(elements, 0.0)
    size = len(elements)
    gram, moment = np.zeros((size, size)), np.zeros(size)
    n_atoms = counts.sum(1)
    mean = float(np.mean(energies[known] / n_atoms[known]))
    for rows in np.array_split(np.flatnonzero(known), 1 + known.sum() // 65536):
        x = counts[rows] / n_atoms[rows, None]
        gram += x.T @ x
        moment += x.T @ (energies[rows] / n_atoms[rows] - mean)  # totals may be -1e5 eV/atom
    ridge = 1e-10 * np.trace(gram) * np.eye(size)
    solution = mean + np.linalg.solve(gram + ridge, moment)
    return {z: float(mu) for z, mu in zip(elements, solution, strict=True)}


def given_references(energies: Mapping[str, float], elements: tuple[int, ...]) -> dict[int, float]:
    """Turn reference energies by symbol into energies by atomic number.

    Raises:
        InputError: an unknown symbol, or an element of the data without an energy.
    """
    unknown = [symbol for symbol in energies if symbol not in atomic_numbers]
    if unknown:
        raise InputError(f"reference_energies: {unknown[0]!r} is not an element symbol")
    table = {atomic_numbers[symbol]: float(value) for symbol, value in energies.items()}
    missing = [chemical_symbols[z] for z in elements if z not in table]
    if missing:
        raise InputError(
            f"reference_energies: no value for {', '.join(missing)}, which the data holds; "
            "add it, or leave reference_energies out to have all fitted"
        )
    return {z: table[z] for z in elements}


def summarise(
    references: dict[int, float],
    counts: NDArray[np.integer],
    energies: NDArray[np.float64],
    *,
    fitted: bool,
) -> References:
    """Compute the residual RMSE of all structures and of each element.

    Args:
        references: eV per element, in the order of the columns of `counts`.
        counts: [n, n_elements] atoms of each element.
        energies: [n] eV, NaN where missing.
        fitted: whether the references were fitted to these energies.

    Raises:
        DataError: the residual is beyond 20 eV/atom.
    """
    residuals = (energies - counts @ np.array(list(references.values()))) / counts.sum(1)
    known = np.isfinite(residuals)

    def rmse(mask: NDArray[np.bool_]) -> float:
        chosen = residuals[mask & known]
        return float(np.sqrt(np.mean(chosen**2))) if chosen.size else float("nan")

    by_element = {z: rmse(counts[:, i] > 0) for i, z in enumerate(references)}
    total = rmse(np.ones(len(residuals), dtype=bool))
    if total > MAX_RESIDUAL:
        worst = int(np.nanargmax(np.abs(residuals)))
        raise DataError(
            f"energies differ from the reference energies by {total:.1f} eV/atom (RMSE; at most "
            f"{MAX_RESIDUAL:g} expected), worst in training structure {worst}: "
            f"{residuals[worst]:.1f} eV/atom. Check units and level of theory of the labels"
            + ("" if fitted else ", or leave reference_energies out to have them fitted")
        )
    return References(references, total, by_element, fitted)
