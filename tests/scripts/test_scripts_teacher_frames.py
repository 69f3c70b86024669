"""Frames with the mean labels of several potentials."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

import mlip
from mlip.models import create_model
from mlip.potential import Potential

SETTINGS = {"elements": [29], "cutoff": 4.0, "hidden": [[4, 3]], "message": [4, 4]}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("teacher_frames")


def copper(energy: float, seed: int = 0):
    atoms = bulk("Cu", cubic=True).repeat(2)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = SinglePointCalculator(atoms, energy=energy * len(atoms))
    return atoms


def teacher(seed: int) -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model("facet", SETTINGS)
    units_of_output = {"reference_energies": {29: -3.5 - seed}, "scale": {29: 1.0}}
    return Potential(model, **units_of_output).to_dtype(torch.float64)


def test_temperatures_are_those_of_equipartition(script):
    frames = [copper(energy) for energy in (-3.0, -3.0 + 1.5 * units.kB * 500, -1.0)]
    np.testing.assert_allclose(script.temperatures(frames), [100, 500, 6000])


def test_snapshots_lie_on_one_way_and_leave_the_start_alone(script):
    start, rng = copper(0.0), np.random.default_rng(3)
    start.calc, calculator = EMT(), EMT()
    frames = script.snapshots(
        start, calculator, 500, rng, count=3, interval=4, timestep_fs=2.0
    )  # fmt: skip
    assert len(frames) == 3
    before = start.get_positions()
    for atoms in frames:
        moved = np.abs(atoms.positions - before).max()
        assert 0.005 < moved < 0.3  # 8 fs
        before = atoms.positions
    rng = np.random.default_rng(3)
    (alone,) = script.snapshots(start, EMT(), 500, rng, count=1, interval=12, timestep_fs=2.0)
    np.testing.assert_allclose(alone.positions, frames[-1].positions, atol=1e-12)
    assert start.calc is not calculator
    np.testing.assert_array_equal(start.positions, copper(0.0).positions)


def test_labels_are_means_of_calculators(script):
    teachers = [teacher(seed) for seed in (1, 2, 3)]
    frames = [copper(0.0, seed) for seed in (1, 2)]
    spreads = script.label(frames, teachers)
    for atoms, spread in zip(frames, spreads, strict=True):
        found = []
        for each in teachers:
            copy = atoms.copy()
            copy.calc = mlip.Calculator(each, dtype="float64")
            found.append((copy.get_potential_energy(), copy.get_forces(), copy.get_stress()))
        energies, forces, stresses = (np.array(values) for values in zip(*found, strict=True))
        assert atoms.get_potential_energy() == pytest.approx(energies.mean(), abs=1e-9)
        np.testing.assert_allclose(atoms.get_forces(), forces.mean(0), atol=1e-10)
        np.testing.assert_allclose(atoms.get_stress(), stresses.mean(0), atol=1e-12)
        away = np.linalg.norm(forces - forces.mean(0), axis=-1)
        assert spread == pytest.approx(np.sqrt((away**2).mean()), rel=1e-9)


def test_a_frame_on_which_a_teacher_fails_has_no_label(script):
    frames = [copper(0.0), bulk("Ni", cubic=True), copper(0.0, 1)]
    frames[1].calc = None
    spreads = script.label(frames, [teacher(1), teacher(2)])
    assert np.isfinite(spreads).tolist() == [True, False, True]
    assert frames[1].calc is None


def test_files_can_be_read_back(script, tmp_path):
    frames = [copper(-3.0), copper(-2.0, seed=1)]
    script.write_frames(tmp_path / "new.extxyz.xz", frames)
    back = script.read_frames(tmp_path / "new.extxyz.xz")
    assert [round(atoms.get_potential_energy() / 32, 6) for atoms in back] == [-3.0, -2.0]
