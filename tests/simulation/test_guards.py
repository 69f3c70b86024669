"""Guards find the closest pair, images included, and name what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.data import covalent_radii

from mlip.simulation.guards import FusionGuard, closest_pair, not_finite


def brute_force(atoms: Atoms) -> float:
    """Return the smallest ratio of a distance to the sum of covalent radii, over images."""
    best = np.inf
    ranges = [range(-2, 3) if p else range(1) for p in atoms.pbc]
    for i, a in enumerate(atoms):
        for j, b in enumerate(atoms):
            for shift in np.array(np.meshgrid(*ranges)).reshape(3, -1).T:
                if i == j and not shift.any():
                    continue
                distance = np.linalg.norm(a.position - b.position + shift @ atoms.cell)
                best = min(best, distance / covalent_radii[[a.number, b.number]].sum())
    return best


@pytest.mark.parametrize("pbc", [False, True, (True, False, True)])
def test_closest_pair_is_that_of_a_brute_force_search(pbc):
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(40):
        atoms = Atoms(
            "CuSiHU", rng.uniform(0, 2.2, (4, 3)), cell=rng.normal(0, 0.3, (3, 3)), pbc=pbc
        )
        atoms.cell += 2.2 * np.eye(3)
        expected, pair = brute_force(atoms), closest_pair(atoms)
        found += pair is not None
        assert (pair is None) == (expected >= 0.4)
        if pair is not None:
            assert pair.ratio == pytest.approx(expected)
    assert found > 3


def test_names_the_pair():
    atoms = Atoms("CuSi", [[0, 0, 0], [0, 0, 3.0]])
    guard = FusionGuard(atoms)
    assert guard.problem(atoms) is None
    atoms.positions[1, 2] = 0.5
    assert guard.problem(atoms) == "atoms 0 (Cu) and 1 (Si) collapsed to 0.500 Å"


def test_close_from_the_start_may_stay_but_not_get_closer():
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 0.6]])
    guard = FusionGuard(atoms)
    assert guard.problem(atoms) is None
    atoms.positions[1, 2] = 0.5
    assert "collapsed" in guard.problem(atoms)


def test_what_is_not_finite_is_named():
    atoms = Atoms("CuSi", [[0, 0, 0], [0, 0, 3.0]])
    forces = np.zeros((2, 3))
    assert not_finite(1.0, forces, atoms) is None
    assert "energy became inf" in not_finite(np.inf, forces, atoms)
    forces[1, 2] = np.nan
    assert not_finite(1.0, forces, atoms) == "the force of atom 1 (Si) is not finite"
    atoms.positions[0, 1] = np.inf
    assert "position of atom 0 (Cu)" in not_finite(1.0, np.zeros((2, 3)), atoms)
    atoms.positions[0, 1] = 0
    atoms.cell[2, 2] = np.nan
    assert "cell" in not_finite(1.0, np.zeros((2, 3)), atoms)
