"""The structure that benchmarks of potentials share."""

from __future__ import annotations

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
