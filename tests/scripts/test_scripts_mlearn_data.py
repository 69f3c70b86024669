"""The correction of stress labels that contradict energies, on labels of a known potential."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("mlearn_data")


def strained_copper(c: float, turn: bool = False) -> list[Atoms]:
    """Strained crystals with the labels of EMT, their pressure off by c/V for each atom."""
    random = np.random.default_rng(0)
    frames = []
    for _ in range(16):
        atoms = bulk("Cu", cubic=True)
        strain = random.normal(scale=0.004, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        if turn:
            atoms.rotate(random.uniform(0, 360), random.normal(size=3), rotate_cell=True)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        labels["stress"] = atoms.get_stress() + c * 4 / atoms.get_volume() * np.repeat([1, 0], 3)
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("c", [0.0, 0.177, -0.05])
def test_finds_the_pressure_that_was_added(script, c, turn):
    found, pairs = script.pulay_constant(strained_copper(c, turn))
    assert pairs > 20
    assert found == pytest.approx(c, abs=0.002)


@pytest.mark.parametrize("jump", [0.0, 0.002])
def test_finds_a_jump_of_the_energies(script, jump):
    frames = strained_copper(0.177)
    for i, atoms in enumerate(frames):
        atoms.info["config_type"] = "Elastic"
        if i >= 8:
            atoms.calc.results["energy"] += jump * len(atoms)
    found = script.largest_jump(frames, 0.177)
    assert found == pytest.approx(jump, abs=1e-4)


def test_takes_it_out_of_the_labels(script):
    for atoms, truth in zip(strained_copper(0.177), strained_copper(0.0), strict=True):
        clean = script.corrected(atoms, 0.177)
        np.testing.assert_allclose(clean.get_stress(), truth.get_stress(), atol=1e-12)
        np.testing.assert_allclose(clean.get_forces(), truth.get_forces(), atol=1e-12)
        assert clean.get_potential_energy() == truth.get_potential_energy()


def test_primitive_cells_keep_labels_and_are_not_turned(script):
    for frame in strained_copper(0.0, turn=True)[:4]:
        labels = {"energy": frame.get_potential_energy(), "stress": frame.get_stress()}
        atoms = frame.repeat((2, 1, 2))
        forces = np.zeros((16, 3))
        forces[3] = [0.0, 0.0, 0.016]  # noise of one atom
        labels["energy"] *= 4
        atoms.calc = SinglePointCalculator(atoms, forces=forces, **labels)
        small = script.primitive(atoms)
        assert len(small) == 1
        np.testing.assert_allclose(small.get_forces(), [[0, 0, 0.001]], atol=1e-12)
        np.testing.assert_allclose(small.get_stress(), labels["stress"], atol=1e-12)
        assert small.get_potential_energy() == pytest.approx(labels["energy"] / 16, rel=1e-12)
        small.calc = EMT()
        np.testing.assert_allclose(small.get_stress(), labels["stress"], atol=1e-9)


def test_primitive_cells_of_two_atoms_keep_both_forces(script):
    atoms = bulk("Si", cubic=True)
    shift = np.array([0.1, 0.02, 0.0])
    atoms.positions[1::2] += shift
    forces = np.tile([[0.3, 0.1, 0.0], [-0.3, -0.1, 0.0]], (4, 1))
    atoms.calc = SinglePointCalculator(atoms, energy=-8.0, forces=forces)
    small = script.primitive(atoms)
    assert len(small) == 2
    assert small.get_potential_energy() == -2.0
    assert "stress" not in small.calc.results
    away = small.get_distance(0, 1, mic=True, vector=True)
    sign = 1 if abs(np.linalg.norm(away - shift) - np.sqrt(3) / 4 * 5.43) < 1e-6 else -1
    np.testing.assert_allclose(small.get_forces()[0], sign * forces[0], atol=1e-12)
    np.testing.assert_allclose(small.get_forces()[1], -small.get_forces()[0], atol=1e-12)


def test_a_frame_without_lattice_vectors_stays(script):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05)
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.zeros((4, 3)))
    assert script.primitive(atoms) is atoms


def test_strained_copies_leave_out_other_crystals(script):
    frames = strained_copper(0.0)
    rattled = [atoms.copy() for atoms in frames[:3]]
    for atoms in rattled:
        atoms.rattle(0.3)
    assert script.strained_copies([*rattled, *frames]) == frames


@pytest.mark.parametrize(
    ("symbol", "shear", "kept"), [("Li", 0.0, True), ("Li", 0.02, False), ("Mo", 0.02, True)]
)
def test_only_sheared_cells_of_lithium_lose_their_stress(script, symbol, shear, kept):
    atoms = bulk(symbol, cubic=True)
    cell = atoms.cell.array * [1.01, 1.0, 1.0]
    cell[2, 1] = shear * cell[2, 2]
    atoms.set_cell(cell, scale_atoms=True)
    labels = {"energy": -3.8, "forces": np.zeros((2, 3)), "stress": np.arange(6.0)}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    assert ("stress" in script.corrected(atoms, 0.0).calc.results) == kept
