"""The correction of stress labels that contradict energies, on labels of a known potential."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

SCRIPT = Path(__file__).parents[2] / "scripts" / "mlearn_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mlearn_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_takes_it_out_of_the_labels(script):
    for atoms, truth in zip(strained_copper(0.177), strained_copper(0.0), strict=True):
        clean = script.corrected(atoms, 0.177)
        np.testing.assert_allclose(clean.get_stress(), truth.get_stress(), atol=1e-12)
        np.testing.assert_allclose(clean.get_forces(), truth.get_forces(), atol=1e-12)
        assert clean.get_potential_energy() == truth.get_potential_energy()


def test_strained_copies_leave_out_other_crystals(script):
    frames = strained_copper(0.0)
    rattled = [atoms.copy() for atoms in frames[:3]]
    for atoms in rattled:
        atoms.rattle(0.3)
    assert script.strained_copies([*rattled, *frames]) == frames
