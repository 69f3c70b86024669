"""The crystals of the demo: six elements with their DFT values, and structures made from them."""

from __future__ import annotations

import importlib.resources
import json
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.build import bulk

from mlip.validation.plots import DftCrystal

SUPERCELL_ATOMS = 32


class Crystal(NamedTuple):
    """A cubic crystal and what DFT says about it (Å, GPa; clamped ions)."""

    symbol: str
    lattice: str
    a: float
    C11: float
    C12: float
    C44: float
    B: float

    def cell(self, scale: float = 1.0) -> Atoms:
        """Build the conventional cell, its edge scaled."""
        return bulk(self.symbol, self.lattice, a=scale * self.a, cubic=True)

    @property
    def dft(self) -> DftCrystal:
        """Volume per atom and bulk modulus, as plots want them."""
        return DftCrystal(self.a**3 / len(self.cell()), self.B)


class Relaxation(NamedTuple):
    """A structure to relax, and what its cell may do."""

    name: str
    atoms: Atoms
    cell: str


def reference_crystals() -> dict[str, Crystal]:
    """Read the crystals and their DFT values that ship with the package, by symbol."""
    file = importlib.resources.files("mlip.data") / "structures" / "reference.json"
    values = json.loads(file.read_text(encoding="utf-8"))["crystals"]
    return {symbol: Crystal(symbol, **entry) for symbol, entry in values.items()}


def structures_to_relax(crystals: dict[str, Crystal], *, quick: bool = False) -> list[Relaxation]:
    """Build one structure per crystal, away from equilibrium.

    Silicon is a supercell with a vacancy, copper a rattled supercell (fixed cells); the others are
    conventional cells, stretched, sheared and rattled (the cell relaxes with the atoms).
    """
    made = []
    for symbol, crystal in crystals.items():
        if symbol == "Si":
            made.append(Relaxation("si-vacancy", vacancy(crystal), "fixed"))
        elif symbol == "Cu":
            atoms = crystal.cell().repeat(2 if quick else 3)
            atoms.rattle(0.1, seed=1)
            made.append(Relaxation("cu-rattled", atoms, "fixed"))
        else:
            made.append(Relaxation(f"{symbol.lower()}-strained", strained(crystal), "full"))
    return made


def vacancy(crystal: Crystal) -> Atoms:
    """Take one atom out of a 2×2×2 supercell and rattle the rest a little."""
    atoms = crystal.cell().repeat(2)
    del atoms[0]
    atoms.rattle(0.05, seed=1)
    return atoms


def strained(crystal: Crystal) -> Atoms:
    """Stretch, shear and rattle the conventional cell."""
    atoms = crystal.cell(1.02)
    shear = np.eye(3) + np.array([[0, 0.02, 0], [0, 0, 0.01], [0, 0, 0]])
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
    atoms.rattle(0.03, seed=1)
    return atoms


def supercell(crystal: Crystal, a: float) -> Atoms:
    """Build a cubic supercell of at least 32 atoms with the given edge of the conventional cell."""
    cell = crystal.cell(a / crystal.a)
    return cell.repeat(int(np.ceil(np.cbrt(SUPERCELL_ATOMS / len(cell)))))
