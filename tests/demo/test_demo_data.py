"""The data demo: labels against EMT, tags and fixed atoms, the tutorial, kills and repeats."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
import pytest
import typer
from ase import Atoms
from ase.calculators.emt import EMT
from rich.console import Console

from mlip.cli.app import app
from mlip.datasets import open_dataset
from mlip.demo import data_set
from mlip.demo.data_set import MARKER, Size, held_out_errors, run_data_demo
from mlip.demo.data_slabs import ADSORBATES, choose_recipes, system_frames, write_raw_files
from mlip.errors import InputError
from mlip.potential import load_potential

TINY = Size(systems=6, frames=3, files=2, epochs=1)


class Demo(NamedTuple):
    folder: Path
    errors: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(record=True, width=200)
    errors = run_data_demo(folder, console, size=TINY)
    return Demo(folder, errors, console.export_text())


def emt(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Label a geometry anew, constraints ignored."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, calculator=EMT())
    return bare.get_potential_energy(), bare.get_forces()


@pytest.fixture(scope="module")
def raw(demo: Demo) -> list[tuple[Atoms, str]]:
    """Frames of the raw files, with their line of the text file."""
    found: list[tuple[Atoms, str]] = []
    for path in sorted((demo.folder / "raw").glob("*.extxyz")):
        lines = path.with_suffix(".txt").read_text().splitlines()
        found += list(zip(ase.io.read(path, ":"), lines, strict=True))
    return found


def test_raw_labels_are_those_of_emt(raw: list[tuple[Atoms, str]]) -> None:
    assert len(raw) == TINY.systems * TINY.frames
    for atoms, _ in raw:
        energy, forces = emt(atoms)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-5)
        found = atoms.get_forces(apply_constraint=False)
        np.testing.assert_allclose(found, forces, atol=2e-6)
        assert np.abs(found[atoms.get_tags() == 0]).max() > 1e-3  # raw, also on fixed atoms


def test_tags_and_fixed_atoms_are_those_of_oc20(raw: list[tuple[Atoms, str]]) -> None:
    for atoms, _ in raw:
        tags = atoms.get_tags()
        heights = [atoms.positions[tags == tag, 2] for tag in (0, 1, 2)]
        assert heights[0].max() < heights[1].min()
        assert heights[1].mean() < heights[2].min()
        assert atoms.constraints[0].index.tolist() == np.flatnonzero(tags == 0).tolist()
        assert atoms.symbols[tags == 2].get_chemical_formula(mode="reduce") in ADSORBATES
        assert len(set(atoms.symbols[tags < 2])) == 1


def test_text_files_name_system_and_frame_once(raw: list[tuple[Atoms, str]]) -> None:
    parsed = [re.fullmatch(r"random(\d+),frame(\d+),(-?\d+\.\d{8})", line) for _, line in raw]
    assert all(parsed)
    places = {(match[1], match[2]) for match in parsed if match}
    assert len(places) == len(raw)
    assert len({sid for sid, _ in places}) == TINY.systems


def test_reference_energy_is_that_of_slab_and_adsorbate_apart() -> None:
    """Carried far away, slab and adsorbate have the reference energy but for the relaxation."""
    (recipe,) = choose_recipes(1, seed=5)
    frame = system_frames(recipe, 7, 2, np.random.default_rng(0))[0]
    slab = frame.atoms[frame.atoms.get_tags() < 2]
    adsorbate = frame.atoms[frame.atoms.get_tags() == 2]
    apart = emt(slab)[0] + emt(adsorbate)[0]
    assert frame.reference_energy == pytest.approx(apart, abs=1.0)
    assert frame.reference_energy < apart + 1e-6  # the clean slab is relaxed


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_raw_files(tmp_path / name, systems=2, frames=2, files=2, seed=seed)
    files = ["0.extxyz", "0.txt", "1.extxyz", "1.txt"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == files
    texts = {n: [(tmp_path / n / f).read_bytes() for f in files] for n in "abc"}
    assert texts["a"] == texts["b"]
    assert texts["a"] != texts["c"]


def test_the_store_holds_what_the_raw_files_do(demo: Demo, raw: list[tuple[Atoms, str]]) -> None:
    store = open_dataset(demo.folder / "all.lmdb")
    assert len(store) == len(raw)
    assert store.facts.energy_convention == "total"
    for i, (atoms, line) in enumerate(raw):
        structure = store[i]
        sid, fid, reference = line.removeprefix("random").split(",")
        assert structure.info["sid"] == int(sid)
        assert structure.info["fid"] == int(fid.removeprefix("frame"))
        assert structure.info["reference_energy"] == pytest.approx(float(reference))
        assert structure.energy == pytest.approx(atoms.get_potential_energy())
        assert structure.tags is not None
        assert structure.fixed is not None
        np.testing.assert_array_equal(structure.tags, atoms.get_tags())
        np.testing.assert_array_equal(structure.fixed, atoms.get_tags() == 0)
        np.testing.assert_allclose(
            np.asarray(structure.forces), atoms.get_forces(apply_constraint=False)
        )


def test_no_system_is_on_two_sides(demo: Demo) -> None:
    sids = {}
    for part in ("train", "valid", "test"):
        dataset = open_dataset(demo.folder / "split" / f"{part}.lmdb")
        sids[part] = {dataset[i].info["sid"] for i in range(len(dataset))}
    assert sum(map(len, sids.values())) == TINY.systems
    assert len(set.union(*sids.values())) == TINY.systems


def test_errors_are_those_of_the_potential(demo: Demo) -> None:
    """Compared with the ASE calculator, structure by structure."""
    import mlip

    path = demo.folder / "run" / "potential.safetensors"
    test = open_dataset(demo.folder / "split" / "test.lmdb")
    energy, free, labels = [], [], []
    calculator = mlip.Calculator(path, dtype="float64")
    for i in range(len(test)):
        atoms = test[i].to_atoms()
        known = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
        atoms.calc = calculator
        energy.append((atoms.get_potential_energy() - known[0]) / len(atoms))
        moving = atoms.get_tags() > 0
        free.append((atoms.get_forces(apply_constraint=False) - known[1])[moving])
        labels.append(known[1][moving])
    errors = held_out_errors(test, load_potential(path, dtype="float64"))
    assert errors["energy"]["mae"] == pytest.approx(np.abs(energy).mean())
    found = errors["forces on free atoms"]
    assert found["mae"] == pytest.approx(np.abs(np.concatenate(free)).mean())
    assert found["baseline"] == pytest.approx(np.abs(np.concatenate(labels)).mean())
    assert json.loads((demo.folder / "errors.json").read_text()) == demo.errors
    assert demo.errors["energy"]["mae"] == pytest.approx(errors["energy"]["mae"], rel=1e-3)


def test_every_command_that_is_shown_exists(demo: Demo) -> None:
    shown = [line[2:] for line in demo.text.splitlines() if line.startswith("$ ")]
    assert len(shown) >= 7
    group = typer.main.get_command(app)
    for line in shown:
        name, *words = shlex.split(line)[1:]
        with group.make_context("mlip", [name, *words], resilient_parsing=False) as context:
            context.meta["mlip.load"] = True
            command: Any = group.get_command(context, name)
            command.make_context(name, words, parent=context).close()


def test_it_leaves_a_plot_and_settings(demo: Demo) -> None:
    assert (demo.folder / "evaluation" / "parity.png").stat().st_size > 1000
    assert (demo.folder / "train.yaml").is_file()


def test_a_finished_demo_is_kept_and_measured_again(demo: Demo) -> None:
    before = (demo.folder / "run" / "potential.safetensors").stat().st_mtime_ns
    console = Console(record=True, width=200)
    assert run_data_demo(demo.folder, console, size=TINY) == demo.errors
    assert console.export_text().count("is kept") == 4
    assert (demo.folder / "run" / "potential.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_demo_goes_on(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the split, it keeps files and store, and ends with the same data."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_set._Tutorial, "split", stop)
        with pytest.raises(KeyboardInterrupt):
            run_data_demo(tmp_path / "out", Console(quiet=True), size=TINY)
    written = (tmp_path / "out" / "raw" / "0.extxyz").stat().st_mtime_ns
    monkeypatch.setattr(data_set, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run_data_demo(tmp_path / "out", Console(quiet=True), size=TINY)
    assert (tmp_path / "out" / "raw" / "0.extxyz").stat().st_mtime_ns == written
    for part in ("train", "valid", "test"):
        name = f"split/{part}.lmdb"
        one, other = open_dataset(tmp_path / "out" / name), open_dataset(demo.folder / name)
        assert [s.info["sid"] for s in one[:]] == [s.info["sid"] for s in other[:]]


def test_it_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="was not made by this demo"):
        run_data_demo(tmp_path, Console(quiet=True), size=TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_it_does_not_mix_sizes(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"size": TINY._asdict(), "done": ["files"]}))
    with pytest.raises(InputError, match="another size of demo"):
        run_data_demo(tmp_path, Console(quiet=True), size=TINY._replace(seed=1))
