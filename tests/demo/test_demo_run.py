"""The demo, shortened: every stage runs and leaves what it promises."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from rich.console import Console
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.datasets import open_dataset
from mlip.demo.crystals import reference_crystals, structures_to_relax, supercell
from mlip.demo.learning import emt_frames
from mlip.demo.run import QUICK, run_demo
from mlip.errors import InputError
from mlip.potential import Potential, shipped_potentials

PLOTS = {
    "energy-temperature",
    "energy-volume",
    "learning-curve",
    "parity",
    "radial-distribution",
}


class Demo:
    """A finished quick demo with EMT as the potential."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = io.StringIO()
        console = Console(file=text, width=100)
        self.values = run_demo(
            os.path.relpath(folder), EMT(), quick=True, crystals=["Cu", "Ni"], console=console
        )
        self.printed = text.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("demo") / "out")


def test_nothing_went_wrong(demo: Demo) -> None:
    assert demo.values["problems"] == []
    assert set(demo.values["seconds"]) == {"relax", "crystals", "dynamics", "learn"}


def test_summary_is_on_disk_and_lists_every_file(demo: Demo) -> None:
    assert json.loads((demo.folder / "summary.json").read_text()) == json.loads(
        json.dumps(demo.values)
    )
    text = (demo.folder / "summary.md").read_text()
    for name in demo.values["files"]:
        assert (demo.folder / name).is_file()
        assert f"`{name}`" in text
        assert name in demo.printed
    for ending in ("extxyz", "csv", "png", "lmdb"):
        made = {str(p.relative_to(demo.folder)) for p in demo.folder.rglob(f"*.{ending}")}
        assert made <= set(demo.values["files"])
    assert {path.stem for path in (demo.folder / "plots").iterdir()} == PLOTS


def test_relaxations_start_high_and_end_at_rest(demo: Demo) -> None:
    for row in demo.values["relaxations"]:
        frames = ase.io.read(demo.folder / "relax" / f"{row['name']}.extxyz", ":")
        assert np.linalg.norm(frames[0].get_forces(), axis=1).max() > 0.1
        assert np.linalg.norm(frames[-1].get_forces(), axis=1).max() < 0.01
        assert row["energy"] < row["energy_start"] - 0.01
        assert frames[-1].get_potential_energy() / len(frames[-1]) == pytest.approx(row["energy"])
    nickel = ase.io.read(demo.folder / "relax" / "ni-strained.extxyz", -1)
    assert nickel.cell.angles() == pytest.approx([90, 90, 90], abs=0.5)


def test_copper_has_the_constants_of_emt(demo: Demo) -> None:
    copper = demo.values["crystals"]["Cu"]
    assert copper["potential"]["a"] == pytest.approx(3.59, abs=0.005)
    assert copper["potential"]["B"] == pytest.approx(
        (copper["potential"]["C11"] + 2 * copper["potential"]["C12"]) / 3, rel=0.01
    )
    assert copper["dft"]["a"] == 3.6327
    assert "3.6327" in demo.printed


def test_trajectories_are_those_of_the_log(demo: Demo) -> None:
    thermal = ase.io.read(demo.folder / "md" / "nvt.extxyz", ":")
    free = ase.io.read(demo.folder / "md" / "nve.extxyz", ":")
    np.testing.assert_allclose(thermal[-1].positions, free[0].positions, atol=1e-6)
    np.testing.assert_allclose(thermal[-1].get_velocities(), free[0].get_velocities(), atol=1e-6)
    totals = [atoms.get_total_energy() / len(atoms) for atoms in free]
    assert np.ptp(totals) < 1e-3
    assert demo.values["dynamics"]["nve"]["time_ps"] == 0.1
    assert abs(demo.values["dynamics"]["nve"]["drift_meV_per_atom_per_ps"]) < 1


def test_the_small_training_leaves_data_and_a_potential(demo: Demo) -> None:
    learned = demo.values["learning"]
    potential = Potential.load(demo.folder / learned["potential"])
    assert set(potential.elements) == {29, 79}
    stored = open_dataset(demo.folder / "training" / "test.lmdb")
    assert len(stored) == learned["test"]["energy"]["count"] == 3
    atoms = stored[0].to_atoms()
    labels = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = EMT()
    assert labels[0] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(labels[1], atoms.get_forces(), atol=1e-6)


def test_it_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="was not made by the demo"):
        run_demo(tmp_path, EMT(), quick=True, crystals=["Cu"])
    assert (tmp_path / "thesis.txt").exists()


def test_it_says_which_crystals_it_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Mo, not Xe"):
        run_demo(tmp_path / "new", EMT(), crystals=["Cu", "Xe"])
    assert not (tmp_path / "new").exists()


def test_what_fails_is_a_problem_and_exit_code_one(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one step nothing relaxes; the potential of the demo knows copper alone."""
    monkeypatch.setattr("mlip.demo.run.QUICK", QUICK._replace(relax_steps=1))
    path = demo.folder / demo.values["learning"]["potential"]
    arguments = ["demo", "--out", str(tmp_path / "out"), "--potential", str(path), "--quick"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    values = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(values["crystals"]) == ["Cu"]
    relaxation, lattice = values["problems"]
    assert relaxation.startswith("relaxation of cu-rattled: max_steps")
    assert lattice.startswith("Cu: Cu4 did not relax")
    assert lattice[:20] in result.output
    assert values["dynamics"] is None


@pytest.mark.skipif("mlearn-facet" not in shipped_potentials(), reason="no potential is shipped")
@pytest.mark.slow
def test_shipped_potential_on_all_crystals(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--quick"])
    values = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert values["problems"] == []
    assert result.exit_code == 0
    assert set(values["crystals"]) == {"Li", "Si", "Ni", "Cu", "Ge", "Mo"}
    vacancy = next(row for row in values["relaxations"] if row["name"] == "si-vacancy")
    assert vacancy["atoms"] == 63
    for row in values["crystals"].values():
        assert row["potential"]["a"] == pytest.approx(row["dft"]["a"], rel=0.02)


def get(crystals: dict[str, Any], name: str) -> Any:
    return next(item for item in structures_to_relax(crystals) if item.name == name)


def test_structures_are_what_their_names_say() -> None:
    crystals = reference_crystals()
    assert len(get(crystals, "si-vacancy").atoms) == 63
    assert len(get(crystals, "cu-rattled").atoms) == 108
    assert get(crystals, "mo-strained").cell == "full"
    for crystal in crystals.values():
        atoms = supercell(crystal, crystal.a)
        assert len(atoms) >= 32
        assert crystal.dft.volume == pytest.approx(atoms.get_volume() / len(atoms))
        # B is rounded or read from another curve than C11 and C12.
        modulus = (crystal.C11 + 2 * crystal.C12) / 3
        assert modulus == pytest.approx(crystal.B, rel=0.02)


def test_emt_frames_are_labelled_alloys() -> None:
    frames = emt_frames(6, seed=3)
    assert {symbol for atoms in frames for symbol in atoms.symbols} == {"Cu", "Au"}
    again = emt_frames(6, seed=3)
    np.testing.assert_array_equal(frames[5].positions, again[5].positions)
    for atoms in frames:
        energy, stress = atoms.get_potential_energy(), atoms.get_stress()
        atoms.calc = EMT()
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(stress, atoms.get_stress(), atol=1e-12)
