"""Conversion: complete, resumable, honest; the report's numbers against independent ones."""

from __future__ import annotations

import io
import json
import lzma
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.geometry import get_distances
from rich.console import Console
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.datasets.convert import convert
from mlip.datasets.labels import LabelKeys
from mlip.datasets.options import ReadOptions
from mlip.datasets.statistics import geometry_hash, nearest_distance
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Structure
from mlip.errors import DataError, InputError

InChild = Callable[[Callable[[], Any]], tuple[str, Any]]


def labelled(symbols: str, energy: float, seed: int, force: float = 1.0) -> Atoms:
    random = np.random.default_rng(seed)
    positions = random.uniform(0, 20, (3, 3)) + np.diag([0, 30, 60])
    atoms = Atoms(symbols, positions=positions)
    forces = np.zeros((3, 3))
    forces[0, 0] = force
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def test_store_holds_what_the_files_hold(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "a.traj", emt_frames[:4])
    ase.io.write(tmp_path / "b.db", emt_frames[4:])
    report = convert([tmp_path / "a.traj", tmp_path / "b.db"], tmp_path / "o.lmdb")
    assert (report.read, report.kept, report.dropped) == (6, 6, 0)
    assert [f.kept for f in report.inputs] == [4, 2]
    store = StructureStore(tmp_path / "o.lmdb")
    for structure, atoms in zip(store, emt_frames, strict=True):
        np.testing.assert_array_equal(structure.positions, atoms.positions)
        np.testing.assert_array_equal(structure.forces, atoms.calc.results["forces"])
    assert store.metadata["user"]["sources"][1] == {"name": "b.db", "structures": 2}
    again = convert(tmp_path / "o.lmdb", tmp_path / "p.extxyz")
    assert again.label_keys["energy"] == {"energy (store)": 6}
    texts = ase.io.read(tmp_path / "p.extxyz", ":")
    assert texts[1].constraints[0].get_indices().tolist() == [0, 1, 2]
    for text, atoms in zip(texts, emt_frames, strict=True):
        raw = text.get_forces(apply_constraint=False)
        np.testing.assert_allclose(raw, atoms.calc.results["forces"], atol=1e-8)
        assert text.get_potential_energy() == pytest.approx(atoms.calc.results["energy"], abs=1e-8)


def test_report_counts_elements_labels_groups_and_ranges(
    tmp_path: Path, emt_frames: list[Atoms]
) -> None:
    path = tmp_path / "a.traj"
    ase.io.write(path, emt_frames)
    report = convert(path, tmp_path / "o.lmdb")
    symbols = [set(a.symbols) for a in emt_frames]
    for symbol in ("Cu", "Al", "C", "H", "O"):
        assert report.elements[symbol] == {
            "frames": sum(symbol in s for s in symbols),
            "atoms": sum(list(a.symbols).count(symbol) for a in emt_frames),
        }
    assert report.label_keys["stress"] == {"stress (calculator)": 4}
    assert report.labelled == {"energy": 6, "forces": 6, "stress": 4}
    assert report.config_types == {"group0": 3, "group1": 3}
    energies = [a.calc.results["energy"] / len(a) for a in emt_frames]
    forces = [np.linalg.norm(a.calc.results["forces"], axis=1).max() for a in emt_frames]
    volumes = [a.get_volume() / len(a) for a in emt_frames if a.pbc.all()]
    closest = []
    for a in emt_frames:
        distances = get_distances(a.positions, cell=a.cell, pbc=a.pbc)[1]
        closest.append(distances[~np.eye(len(a), dtype=bool)].min())
    for name, values in {
        "atoms": [len(a) for a in emt_frames],
        "energy per atom": energies,
        "largest force": forces,
        "volume per atom": volumes,
        "nearest distance": closest,
    }.items():
        expected = [np.min(values), np.median(values), np.max(values)]
        found = [report.ranges[name][x] for x in ("min", "median", "max")]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    assert "2 of 6 frames have no stress" in report.warnings
    parsed = json.loads(report.to_json())
    assert (parsed["read"], parsed["elements"]) == (6, report.elements)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    page = console.export_text()
    assert len(page.splitlines()) < 50
    assert "6 frames read, 6 written, 0 dropped" in page


def test_duplicates_and_overlapping_splits_are_found(tmp_path: Path) -> None:
    train = [labelled("CuAlO", i, i) for i in range(5)]
    test = [labelled("CuAlO", i, i) for i in range(5, 9)]
    ase.io.write(tmp_path / "train.traj", [*train, train[0]])
    ase.io.write(tmp_path / "test.traj", [*test, labelled("CuAlO", 3.5, 3), train[4]])
    report = convert([tmp_path / "train.traj", tmp_path / "test.traj"], tmp_path / "o.lmdb")
    assert report.duplicates == 3
    assert list(report.overlaps.values()) == [2]
    assert "train.traj and " in next(iter(report.overlaps))
    text = " ".join(report.warnings)
    assert "1 geometries occur more than once with different energies" in text
    assert "no independent splits" in text


def test_outliers_are_named_by_file_and_frame(tmp_path: Path) -> None:
    frames = [labelled("CuAlO", -10 + 0.001 * i, i) for i in range(30)]
    frames[7] = labelled("CuAlO", +5, 7)
    frames[11] = labelled("CuAlO", -10, 11, force=60.0)
    frames[20].positions[1] = frames[20].positions[0] + [0, 0, 0.5]
    frames[20].calc.atoms.positions = frames[20].positions
    frames[3].positions[0, 0] = np.nan
    frames[3].calc.atoms.positions = frames[3].positions
    ase.io.write(tmp_path / "a.traj", frames)
    report = convert(tmp_path / "a.traj", tmp_path / "o.lmdb")
    names = {name.rpartition("frame ")[2]: why for name, why in report.outliers.items()}
    assert list(names) == ["7", "11", "20"]
    assert "eV/atom from the median" in names["7"]
    assert names["11"] == "force of 60 eV/Å"
    assert names["20"] == "two atoms 0.5 Å apart"
    assert report.inputs[0].dropped == [3]


def test_wrong_units_and_constrained_forces_are_suspected(tmp_path: Path) -> None:
    frames = []
    for i in range(4):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.set_constraint(FixAtoms([0]))
        forces = np.full((4, 3), 30.0)
        forces[0] = 0
        labels = {"energy": -1.0, "forces": forces, "stress": np.full(6, 5.0)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(tmp_path / "a.traj", frames)
    text = " ".join(convert(tmp_path / "a.traj", tmp_path / "o.lmdb").warnings)
    for part in ("GPa or kbar", "forces above 10 eV/Å", "exactly zero in 4 frames"):
        assert part in text


def test_nearest_distance_counts_images() -> None:
    atom = Structure([29], np.zeros((1, 3)), np.diag([3.0, 5, 9]), [1, 1, 0])
    assert nearest_distance(atom)[0] == pytest.approx(3.0)
    assert np.isnan(nearest_distance(Structure([29], np.zeros((1, 3))))[0])


def test_geometry_hash_is_exact_and_blind_to_labels() -> None:
    base = Structure([29, 8], [[0, 0, 0], [1, 1, 1]])
    same = Structure([29, 8], [[0, -0.0, 0], [1, 1, 1]], energy=3.0)
    moved = Structure([29, 8], [[0, 0, 0], [1, 1, np.nextafter(1, 2)]])
    swapped = Structure([8, 29], [[0, 0, 0], [1, 1, 1]])
    assert geometry_hash(base) == geometry_hash(same)
    assert len({geometry_hash(s) for s in (base, moved, swapped)}) == 3


def test_bad_frames_are_dropped_counted_and_explained(tmp_path: Path) -> None:
    frames = [labelled("CuAlO", -1, i) for i in range(5)]
    ase.io.write(tmp_path / "a.extxyz", frames)
    lines = (tmp_path / "a.extxyz").read_text().splitlines(keepends=True)
    lines[5 + 1] = lines[5 + 1].replace("energy=-1", "energy=nan")
    lines[15 + 3] = lines[15 + 2].replace("Cu", "Al")
    (tmp_path / "a.extxyz").write_text("".join(lines))
    report = convert(tmp_path / "a.extxyz", tmp_path / "o.lmdb")
    assert (report.read, report.kept, report.inputs[0].dropped) == (5, 3, [1, 3])
    assert "frame 1: energy (calculator) is nan" in report.problems[0]
    assert "frame 3: atoms 0 and 1 coincide" in report.problems[1]
    assert "2 of 5 frames were dropped" in report.warnings
    assert len(StructureStore(tmp_path / "o.lmdb")) == 3


def failing(tmp_path: Path, message: str, **options: Any) -> None:
    before = set(os.listdir(tmp_path))
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "a.extxyz", tmp_path / "o.lmdb", **options)
    assert set(os.listdir(tmp_path)) == before


def test_no_labels_at_all_is_an_error_with_a_hint(tmp_path: Path) -> None:
    frames = [Atoms("H", info={"my_E": -1.0}) for _ in range(3)]
    ase.io.write(tmp_path / "a.extxyz", frames)
    failing(tmp_path, r"none of the 3 frames has.*my_E \(info\).*--energy-key")
    report = convert(
        tmp_path / "a.extxyz", tmp_path / "o.lmdb", options=ReadOptions(LabelKeys(energy="my_E"))
    )
    assert report.label_keys == {"energy": {"my_E (info)": 3}}
    convert(tmp_path / "a.extxyz", tmp_path / "p.lmdb", allow_unlabelled=True)
    assert StructureStore(tmp_path / "p.lmdb")[0].energy is None


def test_unusable_inputs_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    failing(tmp_path, "no such file")
    path.touch()
    failing(tmp_path, "empty")
    path.write_text("0\nenergy=1\n")
    failing(tmp_path, "no frame of the input is usable; the first problem: .*no atoms")
    path.write_text("1\nenergy=1\nH 0 0 0\n")
    failing(tmp_path, "no frame has the forces key 'F'", options=ReadOptions(LabelKeys(forces="F")))
    path.write_text("some text\n")
    failing(tmp_path, "no frame of the input is usable")
    with pytest.raises(DataError, match="both input and output"):
        convert(path, path)


def test_interrupted_download_costs_what_is_behind_the_break(
    tmp_path: Path, emt_frames: list[Atoms]
) -> None:
    ase.io.write(tmp_path / "b.extxyz", emt_frames)
    packed = lzma.compress((tmp_path / "b.extxyz").read_bytes())
    cut, empty, whole = (tmp_path / name for name in ("a.extxyz.xz", "e.traj", "b.extxyz"))
    cut.write_bytes(packed[: len(packed) // 2])
    empty.touch()
    report = convert([cut, empty, whole], tmp_path / "o.lmdb")
    assert 0 < report.inputs[0].kept < 6
    assert report.inputs[2].kept == 6
    assert (report.damaged, report.dropped) == (1, 1)
    assert "the file ends early" in report.problems[0]
    assert report.inputs[1].damage == report.problems[1]
    assert "e.traj: the file is empty" in report.problems[1]
    assert "1 of 3 inputs could not be read to their end" in report.warnings
    assert len(StructureStore(tmp_path / "o.lmdb")) == report.kept
    for bad, message in ((cut, "the file ends early.*fetch it again"), (empty, "empty")):
        with pytest.raises(DataError, match=message):
            convert([whole, bad], tmp_path / "p.lmdb", policy="raise")
    assert not (tmp_path / "p.lmdb").exists()


def test_full_disk_leaves_nothing(tmp_path: Path, in_child: InChild) -> None:
    ase.io.write(tmp_path / "a.traj", [labelled("CuAlO", -1, i) for i in range(400)])

    def limited(name: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        convert(tmp_path / "a.traj", tmp_path / name)

    for name in ("o.lmdb", "o.extxyz"):
        kind, text = in_child(lambda n=name: limited(n))
        assert kind == "error"
        assert f"cannot write {tmp_path / name}" in text
        assert os.listdir(tmp_path) == ["a.traj"]


def test_resume_of_another_job_is_refused(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "a.traj", emt_frames)
    ase.io.write(tmp_path / "b.traj", emt_frames[:3])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.traj", tmp_path / "o.lmdb", on_frames=stop)
    with pytest.raises(DataError, match="begun with other inputs or options"):
        convert(tmp_path / "b.traj", tmp_path / "o.lmdb", resume=True)
    (tmp_path / "o.lmdb.partial").unlink()
    with pytest.raises(DataError, match="left from an interrupted run"):
        convert(tmp_path / "a.traj", tmp_path / "o.lmdb")
    with pytest.raises(InputError, match="text cannot be resumed"):
        convert(tmp_path / "b.traj", tmp_path / "o.extxyz", resume=True)
    convert(tmp_path / "b.traj", tmp_path / "o.lmdb", overwrite=True)
    assert len(StructureStore(tmp_path / "o.lmdb")) == 3


def test_command(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "a.extxyz", emt_frames)
    ase.io.write(tmp_path / "b.extxyz", emt_frames)
    run = CliRunner().invoke
    pattern, output = str(tmp_path / "?.extxyz"), str(tmp_path / "o.lmdb")
    report = tmp_path / "report.json"
    done = run(app, ["convert", pattern, output, "--report", str(report)])
    assert done.exit_code == 0, done.output
    assert "12 frames read, 12 written, 0 dropped" in done.stdout
    assert json.loads(report.read_text())["duplicates"] == 6
    again = run(app, ["convert", pattern, output])
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    both = [str(tmp_path / "a.extxyz"), str(tmp_path / "b.extxyz"), output, "--overwrite"]
    assert run(app, ["convert", *both]).exit_code == 0
    missing = run(app, ["convert", *both, "--energy-key", "E0"])
    assert (missing.exit_code, "no frame has the energy key 'E0'" in missing.stderr) == (2, True)
    assert len(StructureStore(output)) == 12


def test_command_says_so_when_frames_were_dropped(tmp_path: Path) -> None:
    text = "1\nenergy=1\nH 0 0 0\n1\nenergy=nan\nH 0 0 0\n"
    (tmp_path / "a.xyz").write_text(text)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "a.xyz"), str(tmp_path / "o.lmdb")])
    assert done.exit_code == 1
    assert "energy (calculator) is nan" in " ".join(done.stdout.split())
    assert len(StructureStore(tmp_path / "o.lmdb")) == 1


def test_mlearn_splits_are_whole_and_independent(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "mlearn_Mo"
    files = [folder / "train.extxyz.xz", folder / "test.extxyz.xz"]
    report = convert(files, tmp_path / "mo.lmdb")
    assert [f.kept for f in report.inputs] == [194, 23]
    assert (report.overlaps, report.dropped) == ({}, 0)
    assert list(report.elements) == ["Mo"]
    assert report.label_keys["stress"] == {"stress (calculator)": 217}
