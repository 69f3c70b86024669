"""Dynamics: restarts to the bit, conserved energies, thermostats, guards, readable files."""

from __future__ import annotations

import csv
import errno
import os
import shutil

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from mlip.errors import CheckpointError, InputError, MlipError
from mlip.simulation.calculator import Calculator
from mlip.simulation.md import run_md

ENSEMBLES = {
    "nve": {"ensemble": "nve", "temperature_K": 300},
    "langevin": {"ensemble": "nvt-langevin", "temperature_K": 300},
    "bussi": {"ensemble": "nvt-bussi", "temperature_K": 300},
    "npt-iso": {"ensemble": "npt", "temperature_K": 300, "pressure_GPa": 5, "barostat_fs": 200},
    "npt-full": {"ensemble": "npt", "temperature_K": 300, "cell": "full", "barostat_fs": 200},
}


@pytest.fixture
def cube() -> Atoms:
    """Copper, 32 atoms."""
    return bulk("Cu", "fcc", a=3.6, cubic=True) * (2, 2, 2)


def state(atoms: Atoms) -> list[np.ndarray]:
    return [atoms.positions, atoms.get_momenta(), np.array(atoms.cell)]


def same(a: Atoms, b: Atoms) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def files(folder, ending="extxyz") -> dict:
    folder.mkdir(exist_ok=True)
    return {
        "trajectory": folder / f"run.{ending}",
        "log": folder / "run.csv",
        "checkpoint": folder / "run.checkpoint",
        "trajectory_interval": 6,
        "log_interval": 3,
        "checkpoint_interval": 10,
    }


@pytest.mark.parametrize("name", ENSEMBLES)
@pytest.mark.parametrize("ending", ["extxyz", "traj"])
def test_restart_continues_to_the_bit(facet, copper, tmp_path, name, ending):
    calculator = Calculator(facet, skin=1.0)
    whole, parts = files(tmp_path / "whole", ending), files(tmp_path / "parts", ending)
    expected = run_md(copper, calculator, steps=24, **ENSEMBLES[name], **whole)
    run_md(copper, Calculator(facet), steps=12, **ENSEMBLES[name], **parts)
    resumed = run_md(copper, Calculator(facet), steps=24, resume=True, **ENSEMBLES[name], **parts)
    assert resumed.steps == expected.steps == 24
    assert same(resumed.atoms, expected.atoms)
    assert not same(resumed.atoms, copper)
    np.testing.assert_equal(resumed.rows, expected.rows)
    assert [row.step for row in resumed.rows] == list(range(0, 25, 3))
    assert parts["log"].read_bytes() == whole["log"].read_bytes()
    frames = {key: read(paths["trajectory"], ":") for key, paths in
              (("whole", whole), ("parts", parts))}  # fmt: skip
    assert [frame.info["step"] for frame in frames["parts"]] == [0, 6, 12, 18, 24]
    for a, b in zip(frames["whole"], frames["parts"], strict=True):
        assert same(a, b)
        assert np.array_equal(a.get_forces(), b.get_forces())


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("name", ["bussi", "npt-iso"])
@pytest.mark.parametrize("ending", ["extxyz", "traj"])
@pytest.mark.parametrize("damage", ["none", "torn checkpoint"])
def test_killed_between_checkpoints(morse, copper, tmp_path, name, ending, damage):
    whole, parts = files(tmp_path / "whole", ending), files(tmp_path / "parts", ending)
    expected = run_md(copper, morse, steps=30, **ENSEMBLES[name], **whole)

    def kill(row):
        if row.step == 27:  # the last checkpoint is of step 20, the one before of step 10
            raise Killed

    with pytest.raises(Killed):
        run_md(copper, morse, steps=30, on_log=kill, **ENSEMBLES[name], **parts)
    if damage == "torn checkpoint":
        data = parts["checkpoint"].read_bytes()
        parts["checkpoint"].write_bytes(data[: len(data) // 2])
    if ending == "extxyz":
        with parts["trajectory"].open("a") as file:
            file.write("8\nLattice=torn")
    seen = []
    resumed = run_md(
        copper, morse, steps=30, resume=True, on_log=seen.append, **ENSEMBLES[name], **parts
    )
    assert seen[0].step == (21 if damage == "none" else 12)
    assert same(resumed.atoms, expected.atoms)
    assert parts["log"].read_bytes() == whole["log"].read_bytes()
    pairs = zip(*(read(p["trajectory"], ":") for p in (whole, parts)), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_resume_from_the_very_first_checkpoint(morse, copper, tmp_path):
    run_md(copper, morse, steps=0, **ENSEMBLES["bussi"], **files(tmp_path))
    run_md(copper, morse, steps=9, resume=True, **ENSEMBLES["bussi"], **files(tmp_path))
    steps = [row["step"] for row in csv.DictReader((tmp_path / "run.csv").open())]
    assert steps == ["0", "3", "6", "9"]


def test_a_finished_run_is_not_run_again(morse, copper, tmp_path):
    first = run_md(copper, morse, steps=12, **ENSEMBLES["nve"], **files(tmp_path))
    again = run_md(copper, morse, steps=12, resume=True, **ENSEMBLES["nve"], **files(tmp_path))
    assert same(first.atoms, again.atoms)
    assert again.steps == 12
    assert again.rows == first.rows


def test_resume_refuses_what_would_not_continue(morse, facet, copper, tmp_path):
    paths = files(tmp_path)
    run_md(copper, morse, steps=12, **ENSEMBLES["bussi"], **paths)

    def resume(structure=copper, calculator=morse, **changes):
        settings = {**ENSEMBLES["bussi"], "steps": 20, "resume": True, **paths, **changes}
        run_md(structure, calculator, **settings)

    with pytest.raises(InputError, match="temperature_K was 300 and is 400"):
        resume(temperature_K=400)
    with pytest.raises(InputError, match=r"timestep_fs was 1\.0 and is 2\.0"):
        resume(timestep_fs=2.0)
    with pytest.raises(InputError, match="same potential"):
        resume(calculator=facet)
    with pytest.raises(InputError, match="other atoms"):
        resume(structure=copper[:4])
    with pytest.raises(InputError, match="needs the checkpoint"):
        resume(checkpoint=None)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        resume(checkpoint=tmp_path / "other")
    paths["trajectory"].write_text("")
    with pytest.raises(InputError, match="shorter"):
        resume()
    shutil.copy(paths["log"], paths["checkpoint"])
    (tmp_path / "run.checkpoint.previous").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        resume()


def test_nve_is_ase_written_by_hand(cube):
    atoms = cube.copy()
    thermalize_momenta(atoms, 600, rng=np.random.default_rng(4))
    Stationary(atoms)
    start = atoms.copy()
    atoms.calc = EMT()
    VelocityVerlet(atoms, 2 * units.fs).run(20)
    result = run_md(start, EMT(), timestep_fs=2.0, steps=20)
    assert same(result.atoms, atoms)
    drawn = run_md(cube, EMT(), temperature_K=600, seed=4, timestep_fs=2.0, time_ps=0.04)
    assert same(drawn.atoms, atoms)


def test_nve_conserves_energy_and_momentum(morse, cube):
    results = {
        dt: run_md(cube, Calculator(morse, skin=0.7), temperature_K=300, timestep_fs=dt,
                   steps=round(200 / dt), log_interval=1, seed=1)
        for dt in (1.0, 2.0)
    }  # fmt: skip
    spread = {dt: result.energies.std() / len(cube) for dt, result in results.items()}
    assert 3 < spread[2.0] / spread[1.0] < 5  # second order in the time step
    assert abs(results[1.0].drift_meV_per_atom_per_ps) < 0.05
    assert np.abs(results[1.0].atoms.get_momenta().sum(axis=0)).max() < 1e-8
    assert results[1.0].status == "completed"


def test_drift_is_the_slope_after_the_first_tenth(cube):
    result = run_md(cube, EMT(), temperature_K=300, timestep_fs=5.0, steps=60, log_interval=2)
    times, energies = result.times_ps[3:], result.energies[3:]
    slope = np.linalg.lstsq(np.stack([times, np.ones_like(times)], 1), energies, rcond=None)[0][0]
    assert len(result.rows) == 31
    assert result.drift_meV_per_atom_per_ps == pytest.approx(1000 * slope / 32, rel=1e-9)
    assert np.isnan(run_md(cube, EMT(), temperature_K=300, steps=2).drift_meV_per_atom_per_ps)


@pytest.mark.parametrize("name", ["bussi", "npt-iso", "npt-full"])
def test_conserved_energies_are_conserved(morse, cube, name):
    result = run_md(cube, morse, steps=150, log_interval=5, thermostat_fs=50, **ENSEMBLES[name])
    conserved = np.array([row.conserved_eV for row in result.rows]) / len(cube)
    assert np.ptp(conserved) < 1e-3
    assert np.ptp(result.energies / len(cube)) > 20 * np.ptp(conserved)


@pytest.mark.parametrize("name", ["langevin", "bussi"])
def test_thermostats_reach_the_temperature(cube, name):
    result = run_md(
        cube, EMT(), steps=500, timestep_fs=4.0, thermostat_fs=40, log_interval=2,
        **{**ENSEMBLES[name], "temperature_K": 500},
    )  # fmt: skip
    assert result.temperatures[50:].mean() == pytest.approx(500, rel=0.08)
    assert np.isnan(result.drift_meV_per_atom_per_ps) == (name == "langevin")
    center = result.atoms.get_center_of_mass() - cube.get_center_of_mass()
    assert np.abs(center).max() < 1e-9


def test_npt_reaches_the_pressure(morse, cube):
    kwargs = {**ENSEMBLES["npt-iso"], "thermostat_fs": 30, "barostat_fs": 100}
    result = run_md(cube, Calculator(morse, skin=0.7), steps=400, timestep_fs=3.0, **kwargs)
    pressures = np.array([row.pressure_GPa for row in result.rows])
    assert pressures[20:].mean() == pytest.approx(5, abs=1.0)
    volumes = np.array([row.volume_A3 for row in result.rows])
    assert np.ptp(volumes) > 1
    lengths = result.atoms.cell.cellpar()
    assert lengths[:3] == pytest.approx(np.full(3, lengths[0]), abs=1e-9)


def test_velocities_of_the_structure_are_kept(cube):
    thermalize_momenta(cube, 100, rng=np.random.default_rng(0))
    result = run_md(cube, EMT(), temperature_K=900, steps=0)
    assert np.array_equal(result.atoms.get_momenta(), cube.get_momenta())
    at_rest = run_md(bulk("Cu", cubic=True), EMT(), steps=0)
    assert not at_rest.atoms.get_momenta().any()


def test_seeds(cube):
    def run(seed):
        return run_md(cube, EMT(), steps=5, seed=seed, **ENSEMBLES["langevin"]).atoms

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_input_is_not_changed_and_constraints_are_kept(cube, tmp_path):
    cube.set_constraint(FixAtoms([0, 1]))
    before = cube.copy()
    result = run_md(cube, EMT(), steps=30, trajectory=tmp_path / "t.extxyz", **ENSEMBLES["bussi"])
    assert cube == before
    assert cube.calc is None
    assert cube.constraints[0].index.tolist() == [0, 1]
    assert np.array_equal(result.atoms.positions[:2], cube.positions[:2])
    assert read(tmp_path / "t.extxyz").constraints[0].index.tolist() == [0, 1]
    free = run_md(before[2:], EMT(), steps=3, **ENSEMBLES["bussi"])
    assert free.atoms.constraints == []


def test_a_single_atom_can_be_simulated(morse):
    for name in ("nve", "langevin", "bussi"):
        result = run_md(Atoms("Cu"), morse, steps=5, **ENSEMBLES[name])
        assert result.status == "completed"
        assert np.isfinite(result.temperatures).all()


@pytest.mark.parametrize("ending", ["extxyz", "traj"])
def test_trajectory_reads_back_into_a_calculator(morse, copper, tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    run_md(copper, morse, steps=4, trajectory=path, trajectory_interval=2, **ENSEMBLES["nve"])
    frames = read(path, ":")
    assert len(frames) == 3
    for frame in frames:
        check = Calculator(morse)
        for name in ("energy", "forces", "stress"):
            expected = check.get_property(name, frame)
            assert frame.calc.get_property(name, frame) == pytest.approx(expected, abs=1e-5)
        assert frame.get_temperature() > 50


def test_log_holds_what_ase_says(morse, copper, tmp_path):
    result = run_md(
        copper, morse, steps=6, log=tmp_path / "log.csv", log_interval=3, **ENSEMBLES["nve"]
    )
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["step"] for row in rows] == ["0", "3", "6"]
    last, atoms = rows[-1], result.atoms
    atoms.calc = Calculator(morse)
    pressure = -atoms.get_stress(include_ideal_gas=True)[:3].mean() / units.GPa
    expected = {
        "time_ps": 0.006, "potential_eV": atoms.get_potential_energy(),
        "kinetic_eV": atoms.get_kinetic_energy(), "total_eV": atoms.get_total_energy(),
        "conserved_eV": atoms.get_total_energy(), "temperature_K": atoms.get_temperature(),
        "pressure_GPa": pressure, "volume_A3": atoms.get_volume(),
    }  # fmt: skip
    assert {key: float(last[key]) for key in expected} == pytest.approx(expected, rel=1e-9)


def test_nan_stops_the_run(poisoned, tmp_path):
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True) * (2, 2, 2)
    result = run_md(
        atoms, poisoned, steps=400, ensemble="nvt-langevin", temperature_K=3000,
        thermostat_fs=20, checkpoint=tmp_path / "c", checkpoint_interval=5,
    )  # fmt: skip
    assert result.status == "diverged"
    assert "the energy became nan at step" in result.message
    assert 0 < result.steps < 400
    resumed = run_md(
        atoms, poisoned, steps=400, ensemble="nvt-langevin", temperature_K=3000,
        thermostat_fs=20, checkpoint=tmp_path / "c", checkpoint_interval=5, resume=True,
    )  # fmt: skip
    assert (resumed.status, resumed.steps) == ("diverged", result.steps)


def test_runaway_temperature_stops_the_run(cube):
    cube.positions[0] += [1.0, 0.9, 0]
    hot = run_md(cube, EMT(), temperature_K=10, steps=50, max_temperature_K=500)
    assert hot.status == "diverged"
    assert "ran away" in hot.message
    assert "limit 500 K" in hot.message
    assert run_md(cube, EMT(), temperature_K=10, steps=50).status == "completed"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_cell_that_runs_away_stops_the_run(morse, cube):
    wild = {"ensemble": "npt", "temperature_K": 300, "barostat_fs": 30, "steps": 400}
    for cell in ("iso", "full"):
        result = run_md(cube, morse, pressure_GPa=-60, cell=cell, **wild)
        assert result.status == "diverged"
        assert "volume" in result.message
    crushed = run_md(cube, morse, pressure_GPa=1e5, **wild)
    assert crushed.status == "diverged"
    assert crushed.message


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_break_within_a_step_stop_the_run(morse, copper):
    hot = copper.copy()
    hot.set_momenta(_huge(8))
    result = run_md(hot, morse, ensemble="npt", temperature_K=300, steps=5, max_temperature_K=1e300)
    assert result.status == "diverged"


def _huge(n: int) -> np.ndarray:
    momenta = np.full((n, 3), 1e90)
    momenta[::2] *= -1
    return momenta


def test_fusing_atoms_stop_the_run(morse):
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 3.5]])
    atoms.set_velocities([[0, 0, 1.2], [0, 0, -1.2]])  # far more than the core holds
    result = run_md(atoms, morse, steps=200, timestep_fs=0.5, max_temperature_K=1e9)
    assert result.status == "diverged"
    assert "atoms 0 (Cu) and 1 (Cu) collapsed" in result.message


def test_a_full_disk_is_one_clear_error(cube, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MlipError, match="disk is full"):
        run_md(cube, EMT(), steps=4, **ENSEMBLES["nve"], **files(tmp_path))
    monkeypatch.setattr("mlip.simulation.md_files.extxyz_text", full)
    with pytest.raises(MlipError, match=r"run\.extxyz: the disk is full"):
        run_md(cube, EMT(), steps=4, **ENSEMBLES["nve"], **files(tmp_path))
    monkeypatch.undo()
    run_md(cube, EMT(), steps=4, **ENSEMBLES["nve"], **files(tmp_path))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 1, "ensemble": "nvt"}, "nve, nvt-langevin, nvt-bussi, npt"),
        ({"steps": 1, "ensemble": "nvt-bussi"}, "needs a temperature"),
        ({"steps": 1, "ensemble": "nvt-bussi", "temperature_K": 0}, "above 0 K"),
        ({"steps": 1, "temperature_K": -5}, "0 or more"),
        ({"steps": 1, "timestep_fs": 0}, "positive time"),
        ({"steps": 1, "thermostat_fs": float("nan")}, "positive time"),
        ({"steps": 1, "pressure_GPa": 1}, "belong to ensemble 'npt'"),
        ({"steps": 1, "cell": "shape"}, "iso, full"),
        ({"steps": -1}, "0 or more"),
        ({}, "steps or as time"),
        ({"steps": 1, "time_ps": 1.0}, "steps or as time"),
        ({"time_ps": float("inf")}, "finite"),
        ({"steps": 1, "log_interval": 0}, "1 or more"),
        ({"steps": 1, "trajectory": "a.xtc"}, "extxyz or .traj"),
    ],
)
def test_bad_settings(cube, settings, text):
    with pytest.raises(InputError, match=text):
        run_md(cube, EMT(), **settings)


def test_structures_that_npt_cannot_treat(cube):
    npt = ENSEMBLES["npt-iso"]
    cube.set_constraint(FixAtoms([0]))
    with pytest.raises(InputError, match="constraints"):
        run_md(cube, EMT(), steps=1, **npt)
    cube.set_constraint()
    cube.pbc = (True, True, False)
    with pytest.raises(InputError, match="periodic"):
        run_md(cube, EMT(), steps=1, **npt)
    with pytest.raises(InputError, match="no atoms"):
        run_md(Atoms(), EMT(), steps=1)
