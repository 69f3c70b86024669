"""Relaxation is ASE's, step by step; bad structures get a status; many survive a kill."""

from __future__ import annotations

import copy
import csv
import json

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import FIRE, LBFGS

from mlip.errors import InputError
from mlip.simulation.calculator import Calculator
from mlip.simulation.relax import RelaxSettings, relax, relax_many


@pytest.fixture
def crystal() -> Atoms:
    """Strained, sheared and rattled copper."""
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True)
    atoms.set_cell(atoms.cell @ np.array([[1.03, 0.02, 0], [0, 0.99, 0.01], [0, 0, 1]]), True)
    atoms.rattle(0.08, seed=5)
    return atoms


def by_hand(atoms, optimizer, cell, pressure, fmax, steps):
    """Write the loop as ASE's documentation does."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    target = atoms
    if cell == "iso":
        target = FrechetCellFilter(atoms, hydrostatic_strain=True, scalar_pressure=pressure)
    elif cell == "shape":
        target = FrechetCellFilter(atoms, constant_volume=True)
    elif cell == "full":
        target = FrechetCellFilter(atoms, scalar_pressure=pressure)
    dynamics = {"fire": FIRE, "lbfgs": LBFGS}[optimizer](target, logfile=None)
    converged = dynamics.run(fmax=fmax, steps=steps)
    return atoms, converged, dynamics.nsteps


@pytest.mark.parametrize("optimizer", ["fire", "lbfgs"])
@pytest.mark.parametrize(
    ("cell", "pressure_GPa"),
    [("fixed", 0), ("iso", 0), ("shape", 0), ("full", 0), ("iso", 20), ("full", 20)],
)
def test_equals_ase_written_by_hand(crystal, optimizer, cell, pressure_GPa):
    expected, converged, steps = by_hand(
        crystal, optimizer, cell, pressure_GPa * units.GPa, 0.01, 200
    )
    result = relax(
        crystal, EMT(), optimizer=optimizer, cell=cell, pressure_GPa=pressure_GPa, steps=200
    )
    assert converged
    assert result.status == "converged"
    assert result.steps == steps
    assert np.array_equal(result.atoms.positions, expected.positions)
    assert np.array_equal(result.atoms.cell, expected.cell)
    assert result.energy == expected.get_potential_energy()


def test_cell_modes_do_what_their_names_say(crystal):
    volume, shape = crystal.cell.volume, crystal.cell.cellpar()
    final = {c: relax(crystal, EMT(), cell=c, optimizer="lbfgs").atoms for c in
             ("fixed", "iso", "shape", "full")}  # fmt: skip
    assert np.array_equal(final["fixed"].cell, crystal.cell)
    assert final["iso"].cell.cellpar()[3:] == pytest.approx(shape[3:], abs=1e-9)
    ratios = final["iso"].cell.cellpar()[:3] / shape[:3]
    assert ratios == pytest.approx(np.full(3, ratios[0]), abs=1e-12)
    assert abs(ratios[0] - 1) > 0.01
    assert final["shape"].cell.volume == pytest.approx(volume, rel=1e-10)
    assert np.abs(final["shape"].cell.cellpar() - shape).max() > 0.1
    lattice = final["full"].cell.volume ** (1 / 3)
    assert lattice == pytest.approx(3.59, abs=0.01)


def test_pressure_is_reached(crystal):
    result = relax(crystal, EMT(), cell="full", pressure_GPa=20, fmax=1e-4, optimizer="lbfgs")
    stress = result.atoms.get_stress() / units.GPa
    assert stress == pytest.approx([-20, -20, -20, 0, 0, 0], abs=0.02)
    assert result.max_stress < 0.02 * units.GPa


def test_reported_forces_and_stress(crystal):
    result = relax(crystal, EMT(), cell="full", steps=3)
    check = result.atoms.copy()
    check.calc = EMT()
    assert result.max_force == pytest.approx(np.linalg.norm(check.get_forces(), axis=1).max())
    assert result.max_stress == pytest.approx(np.abs(check.get_stress()).max())
    assert result.atoms.get_potential_energy() == check.get_potential_energy()
    assert np.isnan(relax(crystal, EMT(), steps=0).max_stress)


def test_too_few_steps_is_not_success(crystal):
    result = relax(crystal, EMT(), steps=3)
    assert (result.status, result.steps, result.converged) == ("max_steps", 3, False)
    assert "3 steps" in result.message


def test_input_is_not_changed_and_constraints_are_kept():
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.rattle(0.1, seed=1)
    slab.set_constraint(FixAtoms(mask=slab.positions[:, 2] < 7))
    slab.info["name"] = "slab"
    before = copy.deepcopy(slab)
    result = relax(slab, EMT(), fmax=0.05)
    assert slab == before
    assert slab.calc is None
    assert slab.constraints[0].index.tolist() == before.constraints[0].index.tolist()
    fixed = slab.constraints[0].index
    assert np.array_equal(result.atoms.positions[fixed], slab.positions[fixed])
    assert not np.array_equal(result.atoms.positions, slab.positions)
    assert result.converged
    assert result.atoms.constraints[0].index.tolist() == fixed.tolist()
    assert result.atoms.info["name"] == "slab"
    assert np.abs(result.atoms.get_forces(apply_constraint=False)[fixed]).max() > 0.05


def test_with_a_potential(morse, copper):
    result = relax(copper, morse, cell="full", fmax=1e-3)
    assert result.converged
    fresh = Calculator(morse)
    assert np.linalg.norm(fresh.get_property("forces", result.atoms), axis=1).max() < 1e-3
    distances = result.atoms.get_all_distances(mic=True)
    assert distances[distances > 0].min() == pytest.approx(
        relax(bulk("Cu", a=3.6), morse, cell="full", fmax=1e-5).atoms.cell.lengths()[0], abs=1e-3
    )


def test_pymatgen_input(morse, copper):
    pytest.importorskip("pymatgen")
    from pymatgen.io.ase import AseAtomsAdaptor

    structure = AseAtomsAdaptor.get_structure(copper)
    expected = relax(copper, morse)
    assert relax(structure, morse).energy == pytest.approx(expected.energy, abs=1e-8)


class Broken(AseCalculator):
    """EMT that gives NaN or raises after some calls."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, calls: int, kind: str) -> None:
        super().__init__()
        self.left, self.kind, self.emt = calls, kind, EMT()

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.left -= 1
        self.results = {
            name: self.emt.get_property(name, atoms) for name in ("energy", "forces", "stress")
        }
        if self.left < 0 and self.kind == "crash":
            raise RuntimeError("boom")
        if self.left < 0:
            self.results[self.kind] = self.results[self.kind] * np.nan


@pytest.mark.parametrize("kind", ["energy", "forces", "stress"])
@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("optimizer", ["fire", "lbfgs"])
def test_numbers_that_are_not_finite_stop_the_run(crystal, kind, calls, optimizer):
    calculator = Broken(calls, kind)
    cell = "full" if kind == "stress" else "fixed"
    result = relax(crystal, calculator, optimizer=optimizer, cell=cell, steps=50)
    assert result.status == "diverged"
    assert result.steps == calls
    assert kind.removesuffix("s") in result.message
    assert np.isfinite(result.atoms.positions).all()
    assert np.isfinite(result.energy) == (calls > 0)


def test_a_potential_turning_nan_is_stopped(poisoned):
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 3.4]])
    atoms.positions[1, 2] = 2.31
    assert relax(atoms, poisoned).status == "converged"
    atoms.positions[1, 2] = 2.2
    result = relax(atoms, poisoned)
    assert (result.status, result.steps) == ("diverged", 0)


class Attraction(AseCalculator):
    """Pull all atoms to the origin, without limit."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": (atoms.positions**2).sum(), "forces": -2 * atoms.positions}


def test_atoms_that_fuse_stop_the_run():
    atoms = Atoms("CuSi", [[0, 0, 1.5], [0.1, 0, -1.5]])
    result = relax(atoms, Attraction())
    assert result.status == "diverged"
    for word in ("atoms 0 (Cu) and 1 (Si)", "collapsed"):
        assert word in result.message
    assert 0.9 < result.atoms.get_distance(0, 1) < 1.4


class Swelling(AseCalculator):
    """Prefer ever larger cells."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        pressure = np.array([1.0, 1, 1, 0, 0, 0])
        self.results = {"energy": -atoms.get_volume(), "stress": -pressure}
        self.results["forces"] = np.zeros((len(atoms), 3))


def test_a_cell_that_runs_away_stops_the_run():
    atoms = bulk("Cu", "fcc", a=3.6)
    result = relax(atoms, Swelling(), cell="iso", steps=1000)
    assert result.status == "diverged"
    assert "volume changed by a factor of" in result.message
    assert 1 < result.atoms.get_volume() / atoms.get_volume() < 10


def test_close_atoms_at_the_start_may_part():
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
    atoms.positions[1] = atoms.positions[0] + [0.9, 0.1, 0]
    result = relax(atoms, EMT(), optimizer="fire", steps=500, fmax=0.05)
    assert result.converged


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"optimizer": "adam"}, "fire, lbfgs"),
        ({"cell": "volume"}, "fixed, iso, shape, full"),
        ({"fmax": 0}, "positive"),
        ({"fmax": float("nan")}, "positive"),
        ({"steps": -1}, "0 or more"),
        ({"pressure_GPa": 1.0}, "no effect"),
        ({"pressure_GPa": 1.0, "cell": "shape"}, "no effect"),
        ({"pressure_GPa": float("inf"), "cell": "full"}, "finite"),
        ({"trajectory": "steps.xtc"}, "extxyz"),
    ],
)
def test_bad_settings(crystal, settings, text):
    with pytest.raises(InputError, match=text):
        relax(crystal, EMT(), **settings)


def test_bad_structures(morse):
    with pytest.raises(InputError, match="no atoms"):
        relax(Atoms(), EMT())
    with pytest.raises(InputError, match="not finite"):
        relax(Atoms("Cu", [[np.nan, 0, 0]]), EMT())
    with pytest.raises(InputError, match="periodic"):
        relax(Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]]), EMT(), cell="full")
    with pytest.raises(InputError, match="does not know Ag"):
        relax(Atoms("Ag"), morse)


@pytest.mark.parametrize("ending", ["traj", "extxyz"])
def test_trajectory_reads_back(crystal, tmp_path, ending):
    path = tmp_path / f"steps.{ending}"
    for _ in range(2):  # the second run replaces the first
        result = relax(crystal, EMT(), cell="full", steps=5, trajectory=path)
    frames = read(path, ":")
    assert len(frames) == 6
    check = crystal.copy()
    check.calc = EMT()
    assert frames[0].get_potential_energy() == pytest.approx(check.get_potential_energy())
    assert frames[0].get_forces() == pytest.approx(check.get_forces(), abs=1e-7)
    assert frames[0].get_stress() == pytest.approx(check.get_stress(), abs=1e-7)
    assert frames[-1].positions == pytest.approx(result.atoms.positions, abs=1e-7)


def many() -> list:
    good = [bulk("Cu", a=3.5 + 0.05 * k) * (2, 1, 1) for k in range(4)]
    for k, atoms in enumerate(good):
        atoms.rattle(0.05, seed=k)
    bad = Atoms("U2", [[0, 0, 0], [0, 0, 2]])
    empty = Atoms()
    return [good[0], bad, good[1], empty, ("far", good[2]), ValueError("torn page"), good[3]]


def named():
    for k, item in enumerate(many()):
        yield item if isinstance(item, tuple) else (f"s{k}", item)


def test_many_with_bad_ones(morse, tmp_path):
    output = tmp_path / "out" / "relaxed.extxyz"
    seen = []
    rows = relax_many(named(), morse, output, on_structure=seen.append)
    assert seen == rows
    assert [row.status for row in rows] == [
        "converged", "error", "converged", "error", "converged", "error", "converged",
    ]  # fmt: skip
    assert "does not know U" in rows[1].message
    assert "no atoms" in rows[3].message
    assert "torn page" in rows[5].message
    assert rows[4].name == "far"
    frames = read(output, ":")
    assert [frame.info["index"] for frame in frames] == [0, 2, 4, 6]
    for frame in frames:
        row = rows[frame.info["index"]]
        assert frame.get_potential_energy() == pytest.approx(row.energy)
        assert frame.info["status"] == row.status == "converged"
        again = relax(many()[row.index][1] if row.index == 4 else many()[row.index], morse)
        assert frame.positions == pytest.approx(again.atoms.positions, abs=1e-7)
    with output.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["status"] for row in table] == [row.status for row in rows]
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["finished"]
    assert record["settings"]["fmax"] == 0.01
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "relaxed.csv", "relaxed.extxyz", "relaxed.json",
    ]  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("when", range(7))
def test_many_resumes_where_it_was_killed(morse, tmp_path, when):
    whole = tmp_path / "whole.extxyz"
    rows = relax_many(named(), morse, whole)
    output = tmp_path / "part.extxyz"

    def kill(row):
        if row.index == when:
            raise Killed

    with pytest.raises(Killed):
        relax_many(named(), morse, output, on_structure=kill)
    assert not output.exists()
    with (tmp_path / "part.extxyz.part").open("a") as file:
        file.write("4\ntorn")
    computed = []
    again = relax_many(named(), morse, output, resume=True, on_step=lambda *_: computed.append(1))
    assert [str(row) for row in again] == [str(row) for row in rows]
    assert output.read_bytes() == whole.read_bytes()
    assert output.with_suffix(".csv").read_bytes() == whole.with_suffix(".csv").read_bytes()
    assert bool(computed) == (when < 6)
    computed.clear()
    relax_many(named(), morse, output, resume=True, on_step=lambda *_: computed.append(1))
    assert not computed


def test_killed_while_the_files_are_renamed(morse, tmp_path):
    output = tmp_path / "a.extxyz"
    rows = relax_many(named(), morse, output)
    record = output.with_suffix(".json")
    state = json.loads(record.read_text())
    state["finished"] = False
    record.write_text(json.dumps(state))
    summary = output.with_suffix(".csv")
    summary.rename(summary.with_name(summary.name + ".part"))
    content = output.read_bytes()
    again = relax_many(named(), morse, output, resume=True)
    assert [str(row) for row in again] == [str(row) for row in rows]
    assert output.read_bytes() == content


def test_resume_refuses_other_settings_and_structures(morse, tmp_path):
    output = tmp_path / "a.extxyz"
    relax_many(named(), morse, output)
    with pytest.raises(InputError, match=r"fmax was 0\.01 and is 0\.02"):
        relax_many(named(), morse, output, resume=True, settings=RelaxSettings(fmax=0.02))
    with pytest.raises(InputError, match="fix was None and is '0'"):
        relax_many(named(), morse, output, resume=True, facts={"fix": "0"})
    with pytest.raises(InputError, match="structure 1 was U2"):
        relax_many(reversed(list(named())), morse, output, resume=True)
    output.with_suffix(".json").write_text("{}")
    with pytest.raises(InputError, match="not the record of a run"):
        relax_many(named(), morse, output, resume=True)
