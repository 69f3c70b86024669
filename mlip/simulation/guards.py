"""Tell when a simulation has gone wrong: numbers that are not finite, atoms that fuse, runaways."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from mlip.graph import neighbor_list

# Atoms closer than this fraction of the sum of their covalent radii have fused. Bonds are near 1;
# the shortest pairs of physical structures (H2 under pressure, hot liquids) stay above 0.7.
FUSED = 0.4
# A cell whose volume changed by more than this factor has run away.
VOLUME_FACTOR = 10.0


class ClosestPair(NamedTuple):
    """Two atoms, their distance in Å and its ratio to the sum of their covalent radii."""

    first: int
    second: int
    distance: float
    ratio: float


def closest_pair(atoms: Atoms, ratio: float = FUSED) -> ClosestPair | None:
    """Find the pair, periodic images included, with the smallest distance below a ratio.

    Args:
        atoms: structure.
        ratio: distances are looked at up to this fraction of the sum of covalent radii.

    Returns:
        The pair, or None if no two atoms are that close.
    """
    radii = covalent_radii[atoms.numbers]
    cell, pbc = np.asarray(atoms.cell), atoms.pbc
    edges, shifts = neighbor_list(atoms.positions, cell, pbc, 2 * ratio * float(radii.max()))
    if edges.shape[1] == 0:
        return None
    source, target = edges
    distances = np.linalg.norm(
        atoms.positions[source] + shifts @ cell - atoms.positions[target], axis=1
    )
    ratios = distances / (radii[source] + radii[target])
    k = int(ratios.argmin())
    if ratios[k] >= ratio:
        return None
    first, second = sorted((int(source[k]), int(target[k])))
    return ClosestPair(first, second, float(distances[k]), float(ratios[k]))


class FusionGuard:
    """Report atoms that fuse; a structure that starts with close atoms may not get any closer."""

    def __init__(self, atoms: Atoms) -> None:
        start = closest_pair(atoms)
        self.limit = FUSED if start is None else 0.9 * start.ratio

    def problem(self, atoms: Atoms) -> str | None:
        """Name the closest pair if it is below the limit."""
        pair = closest_pair(atoms, self.limit)
        if pair is None:
            return None
        symbols = atoms.symbols
        return (
            f"atoms {pair.first} ({symbols[pair.first]}) and {pair.second} "
            f"({symbols[pair.second]}) collapsed to {pair.distance:.3f} Å"
        )


def not_finite(energy: float, forces: np.ndarray, atoms: Atoms) -> str | None:
    """Name the first of energy, forces, positions and cell that is not finite."""
    if not math.isfinite(energy):
        return f"the energy became {energy}"
    for name, values in (("force", forces), ("position", atoms.positions)):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            i = int(bad.argmax())
            return f"the {name} of atom {i} ({atoms.symbols[i]}) is not finite"
    if not np.isfinite(np.asarray(atoms.cell)).all():
        return "the cell is not finite"
    return None
