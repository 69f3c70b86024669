"""The report of a check: complete, in spite of bad entries, and right."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.datasets.check import check
from mlip.datasets.check_report import CheckReport
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, InputError


def write_store(path: Path, structures: list[Structure]) -> Path:
    with StructureWriter(path) as writer:
        for structure in structures:
            writer.append(structure)
    return path


def page(report: CheckReport, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


def copper(seed: int, **labels: Any) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    random = np.random.default_rng(seed)
    forces = random.normal(size=(4, 3))
    usual = {"energy": -14.0 - 0.01 * seed, "forces": forces - forces.mean(axis=0)}
    atoms.calc = SinglePointCalculator(atoms, **{**usual, **labels})
    atoms.info["sid"] = f"cu-{seed}"
    return atoms


def test_report_counts_what_is_there(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    path = tmp_path / "a.traj"
    ase.io.write(path, emt_frames)
    report = check(path, cutoff=3.0)
    assert (report.structures, report.checked, report.bad, report.passed) == (6, 6, 0, True)
    assert report.labels["stress"]["present"] == 4
    assert report.labels["stress"]["missing"] == 2
    assert report.labels["stress"]["keys"] == {"stress (calculator)": 4}
    assert [n.rpartition(" ")[2] for n in report.labels["stress"]["first_missing"]] == ["2", "5"]
    assert report.pbc == {"TTT": 4, "FFF": 2}
    assert sum(report.sizes.values()) == 6
    assert report.sizes["8-15"] == sum(8 <= len(a) <= 15 for a in emt_frames)
    tags = np.concatenate([a.get_tags() for a in emt_frames])
    assert report.values["tags"] == {str(t): int((tags == t).sum()) for t in np.unique(tags)}
    assert report.values["fixed"]["True"] == 6
    assert report.extras == {"config_type": 6}
    assert report.elements["Cu"] == {
        "structures": sum("Cu" in a.symbols for a in emt_frames),
        "atoms": sum(list(a.symbols).count("Cu") for a in emt_frames),
    }
    neighbors = [len(ase.neighborlist.neighbor_list("i", a, 3.0)) / len(a) for a in emt_frames]
    assert report.neighbors is not None
    assert report.neighbors["per_atom"]["max"] == pytest.approx(max(neighbors), rel=1e-6)
    assert report.neighbors["per_atom"]["median"] == pytest.approx(np.median(neighbors), rel=1e-6)
    assert "2 of 6 structures have no stress" in report.warnings


def test_bad_entries_and_files_do_not_end_it(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", [copper(i) for i in range(4)])
    lines = (tmp_path / "a.extxyz").read_text().splitlines(keepends=True)
    lines[7] = lines[7].replace("energy=-14.01", "energy=nan")
    lines[15] = lines[14].replace("Cu", "Al")
    (tmp_path / "a.extxyz").write_text("".join(lines))
    (tmp_path / "b.extxyz").touch()
    ase.io.write(tmp_path / "c.traj", [copper(7)])
    whole = write_store(tmp_path / "d.lmdb", [Structure.from_atoms(copper(8))]).read_bytes()
    (tmp_path / "d.lmdb").write_bytes(whole[: len(whole) // 2])
    report = check([tmp_path / name for name in ("a.extxyz", "b.extxyz", "c.traj", "d.lmdb")])
    assert (report.checked, report.bad, report.passed) == (5, 2, False)
    assert "a.extxyz frame 1" in report.bad_entries[0]
    assert "nan" in report.bad_entries[0]
    assert "a.extxyz frame 2" in report.bad_entries[1]
    assert "coincide" in report.bad_entries[1]
    assert [Path(f.path).name for f in report.files if f.unreadable] == ["b.extxyz", "d.lmdb"]
    assert [f.bad for f in report.files] == [2, 0, 0, 0]
    assert "2 unreadable files, 2 bad entries" in page(report)
    with pytest.raises(DataError, match="no file matches"):
        check(tmp_path / "nothing-*.traj")


def test_crystals_too_dense_for_the_cutoff_are_bad_entries(tmp_path: Path) -> None:
    dense = Structure([1], np.zeros((1, 3)), np.eye(3) * 0.2, [True] * 3, energy=1.0)
    store = write_store(tmp_path / "o.lmdb", [Structure.from_atoms(copper(0)), dense])
    report = check(store, cutoff=6.0)
    assert (report.checked, report.bad, report.elements["Cu"]["structures"]) == (2, 1, 1)
    assert "lengths are in Å" in report.bad_entries[0]


def test_repeated_names_and_geometries_are_named(tmp_path: Path) -> None:
    frames = [copper(i) for i in range(6)]
    frames[4] = copper(1, energy=-13.0)
    frames[5].info["sid"] = "cu-0"
    store = write_store(tmp_path / "o.lmdb", [Structure.from_atoms(a) for a in frames])
    report = check(store)
    assert report.names["named"] == 6
    assert report.names["repeated"] == 2
    assert report.names["first_repeated"] == [f"{store} entry 4", f"{store} entry 5"]
    assert report.duplicates["repeated"] == 1
    assert report.duplicates["different_energies"] == 1
    assert report.duplicates["first"] == [[f"{store} entry 1", f"{store} entry 4"]]
    text = " ".join(report.warnings)
    assert "2 structures have the name (sid) of one before" in text
    assert "more than once with different energies" in text


def test_frames_of_one_system_are_no_repetition(tmp_path: Path) -> None:
    frames = [copper(i) for i in range(3)]
    for i, atoms in enumerate(frames):
        atoms.info.update(sid=7, fid=i)
    ase.io.write(tmp_path / "a.traj", frames)
    store = write_store(tmp_path / "o.lmdb", [Structure.from_atoms(a) for a in frames])
    assert check(store).names == {"named": 3, "repeated": 0, "first_repeated": []}


def test_limit_takes_a_seeded_sample_across_files(
    tmp_path: Path, random_structure: Callable[[int], Structure]
) -> None:
    paths = [
        write_store(tmp_path / f"{k}.lmdb", [random_structure(20 * k + i) for i in range(20)])
        for k in range(3)
    ]
    report = check(paths, limit=25)
    assert (report.structures, report.checked) == (60, 25)
    assert "25 entries: a random sample (seed 0)" in report.sample
    again, other = check(paths, limit=25), check(paths, limit=25, seed=1)
    assert again.ranges == report.ranges
    assert other.ranges != report.ranges
    assert all(0 < file.checked < 20 for file in report.files)
    assert check(paths, limit=60).sample == ""
    ase.io.write(tmp_path / "a.traj", [copper(i) for i in range(8)])
    streamed = check(tmp_path / "a.traj", limit=3)
    assert (streamed.checked, "the first of each file" in streamed.sample) == (3, True)
    with pytest.raises(InputError, match="limit is 0"):
        check(paths, limit=0)


def test_suspicions_of_units_and_nets(tmp_path: Path) -> None:
    pushed = np.tile([1.0, 0, 0], (4, 1))
    frames = [copper(i, stress=np.full(6, 5.0), forces=pushed) for i in range(4)]
    ase.io.write(tmp_path / "a.traj", frames)
    text = " ".join(check(tmp_path / "a.traj").warnings)
    assert "GPa or kbar" in text
    assert "do not cancel (median net force 4 eV/Å)" in text


def test_energy_convention_is_stated_or_argued(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.traj", [copper(i) for i in range(4)])
    energy = check(tmp_path / "a.traj").energy
    assert (energy["convention"], energy["looks_like"]) == (None, "total")
    small = [copper(i, energy=-0.5) for i in range(4)]
    ase.io.write(tmp_path / "b.traj", small)
    energy = check(tmp_path / "b.traj").energy
    assert (energy["looks_like"], energy["within_10_eV"]) == ("adsorption", 1.0)


def test_json_and_page_tell_the_same(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    path = tmp_path / "a.extxyz"
    ase.io.write(path, emt_frames)
    report = check(path)
    content = json.loads(report.to_json())
    assert content["passed"] is True
    assert content["elements"] == report.elements
    assert content["files"][0]["checked"] == 6
    text = page(report)
    assert len(text.splitlines()) < 50
    assert "6 entries in 1 file: nothing wrong" in text


def test_exit_codes_of_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    ase.io.write(tmp_path / "good.extxyz", [copper(0)])
    (tmp_path / "bad.extxyz").write_text("1\nenergy=1\nH 0 0 0\n1\nenergy=nan\nH 0 0 0\n")
    target = tmp_path / "r.json"
    good = run(app, ["check", str(tmp_path / "good.extxyz"), "--json", str(target)])
    assert (good.exit_code, "nothing wrong" in good.stdout) == (0, True), good.output
    assert json.loads(target.read_text())["checked"] == 1
    bad = run(app, ["check", str(tmp_path / "bad.extxyz"), "--cutoff", "3"])
    assert (bad.exit_code, "1 bad entry" in bad.stdout) == (1, True)
    (tmp_path / "empty.extxyz").touch()
    everything = [str(tmp_path / f"{name}.extxyz") for name in ("good", "bad", "empty")]
    assert run(app, ["check", *everything]).exit_code == 2
    assert run(app, ["check", str(tmp_path / "none.db")]).exit_code == 2


SAMPLES = {
    "edited": 12, "is2re_legacy": 9, "oc20_numpy1": 6, "oc20_s2ef_legacy": 81, "omat_orjson": 60,
    "omol": 4, "mptrj.extxyz": 60, "oxides.db": 60, "oc20_raw": 81,
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_pass_on_one_page(shared: Path, name: str) -> None:
    report = check(shared / "samples" / name)
    assert (report.checked, report.bad, report.problems) == (SAMPLES[name], 0, [])
    assert len(page(report).splitlines()) <= 50


def test_oc20_samples_leave_energies_open_until_stated(shared: Path) -> None:
    folder = shared / "samples" / "oc20_s2ef_legacy"
    report = check(folder)
    assert report.energy["convention"] == "unstated"
    assert "--energy-convention" in " ".join(report.warnings)
    assert report.files[0].fields["force"] == "float32[14, 3]"
    stated = check(folder, ReadOptions(energy_convention="adsorption"))
    assert stated.energy["convention"] == "adsorption"
    assert "--energy-convention" not in " ".join(stated.warnings)
    frames = check(shared / "samples" / "is2re_legacy")
    assert frames.relaxation_frame == "unstated"
    assert "--is2re" in " ".join(frames.warnings)


@pytest.mark.parametrize(
    ("case", "finding"),
    [
        ("ase_metadata_edges_as_natoms", "natoms is wrong for 6 of 6 entries"),
        ("ase_metadata_mismatch", "7 entries, the data 6"),
        ("ase_metadata_pickle", "Python objects"),
        ("length_too_big", "says 9, 6 entries"),
        ("gap_in_keys", "entry 2"),
        ("missing_forces", "1 of 6 structures have no forces"),
        ("txt_short", "38 lines for the 41 frames"),
        ("evil_partial", "functools.partial"),
    ],
)
def test_bad_samples_are_found_out(shared: Path, case: str, finding: str) -> None:
    report = check(shared / "samples" / "bad" / case)
    assert finding in " ".join(report.findings)
    assert report.passed == (case == "missing_forces")
