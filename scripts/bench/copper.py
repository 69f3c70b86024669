"""The structure and the simulation that benchmarks of potentials share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk


def copper(number: int, seed: int = 0) -> Atoms:
    """Build a rattled cubic supercell of copper with 4n³ atoms: 32, 108, 256, 500.

    Raises:
        ValueError: another number.
    """
    atoms = bulk("Cu", a=3.61, cubic=True).repeat(round((number / 4) ** (1 / 3)))
    if len(atoms) != number:
        raise ValueError(f"no cube of copper has {number} atoms; {len(atoms)} is near")
    atoms.rattle(0.05, seed=seed)
    return atoms


def simulation(calculator: Any, number: int) -> Callable[[], None]:
    """Give one call of a simulation: atoms move, energy, forces and stress are asked for."""
    atoms, rng = copper(number), np.random.default_rng(1)
    atoms.calc = calculator

    def call() -> None:
        atoms.positions += rng.normal(0, 1e-3, atoms.positions.shape)
        atoms.get_forces()
        atoms.get_stress()
        atoms.get_potential_energy()

    return call
