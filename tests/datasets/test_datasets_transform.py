"""Merge, split, subset and filter: nothing lost, nothing in two parts, reasons counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from mlip.datasets import open_dataset
from mlip.datasets.split import assign_parts
from mlip.datasets.store import StructureStore
from mlip.datasets.transform import Criteria, filter_structures, merge, split, subset
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, InputError


def frames(n, *, seed=0, symbol="Cu"):
    """Dimers in a box, each with its own length, three frames a molecule."""
    random = np.random.default_rng(seed)
    result = []
    for k in range(n):
        atoms = Atoms([symbol, "O"], [[0, 0, 0], [0, 0, 1.5 + random.random()]], cell=[9] * 3)
        atoms.info.update(molecule=f"m{k // 3}", kind="even" if (k // 3) % 4 else "rare")
        forces = np.zeros((2, 3))
        forces[0, 2] = k
        atoms.calc = SinglePointCalculator(atoms, energy=-float(k), forces=forces)
        result.append(atoms)
    return result


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.extxyz"
    write(path, frames(120))
    return path


def energies(path):
    return [s.energy for s in open_dataset(path)]


@pytest.mark.parametrize("by", ["geometry", "molecule"])
def test_split_loses_nothing_and_shares_no_group(data, tmp_path, by):
    split(data, tmp_path / "parts", [0.8, 0.1, 0.1], by=by, seed=3)
    parts = {n: open_dataset(tmp_path / "parts" / f"{n}.lmdb") for n in ("train", "valid", "test")}
    assert sorted(s.energy for part in parts.values() for s in part) == sorted(
        -float(k) for k in range(120)
    )
    assert [len(part) for part in parts.values()] == [96, 12, 12]
    molecules = [{s.info["molecule"] for s in part} for part in parts.values()]
    shared = (molecules[0] & molecules[1]) | (molecules[0] & molecules[2])
    assert bool(shared) is (by == "geometry")


def test_equal_geometries_stay_together(tmp_path):
    several = frames(30)
    write(tmp_path / "twice.extxyz", several + several)
    split(tmp_path / "twice.extxyz", tmp_path / "parts", [0.5, 0.5])
    sides = [energies(tmp_path / "parts" / f"{name}.lmdb") for name in ("train", "valid")]
    assert not set(sides[0]) & set(sides[1])
    assert all(count == 2 for side in sides for count in Counter(side).values())


def test_split_is_stratified(data, tmp_path):
    split(data, tmp_path / "parts", [0.5, 0.5], by="molecule", stratify="kind", seed=1)
    kinds = [
        Counter(s.info["kind"] for s in open_dataset(tmp_path / "parts" / f"{name}.lmdb"))
        for name in ("train", "valid")
    ]
    assert abs(kinds[0]["rare"] - kinds[1]["rare"]) <= 3
    assert abs(kinds[0]["even"] - kinds[1]["even"]) <= 3


def test_split_depends_on_the_seed_alone(data, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(data, tmp_path / folder, [0.7, 0.3], seed=seed)
    valid = [energies(tmp_path / folder / "valid.lmdb") for folder in "abc"]
    assert valid[0] == valid[1] != valid[2]


def test_bad_frames_are_counted_in_the_first_part(data, tmp_path):
    text = data.read_text().replace("O        0.00000000", "O        nan", 1)
    data.write_text(text)
    reports = split(data, tmp_path / "parts", [0.5, 0.5])
    assert reports["train"].dropped == 1
    assert reports["train"].kept + reports["valid"].kept == 119


def test_a_missing_entry_is_named(data, tmp_path):
    with pytest.raises(DataError, match=r"data\.extxyz frame 0: info has no 'sid'; it has kind"):
        split(data, tmp_path / "parts", [0.5, 0.5], by="sid")


@pytest.mark.parametrize("fractions", [[1.0], [0.5, 0.4], [0.5, 0.6], [1.0, 0.0], [-1, 2]])
def test_fractions_that_make_no_split(fractions):
    with pytest.raises(InputError, match="fractions"):
        assign_parts(np.arange(10), fractions)


def test_no_part_is_empty_with_few_groups():
    parts = assign_parts(np.array([0, 0, 0, 1, 2]), [0.9, 0.05, 0.05])
    assert set(parts) == {0, 1, 2}
    with pytest.raises(InputError, match="2 groups cannot be split into 3 parts"):
        assign_parts(np.array([0, 0, 1]), [0.8, 0.1, 0.1])


def test_merge_keeps_order_and_needs_two(data, tmp_path):
    write(tmp_path / "more.extxyz", frames(5, symbol="Ag"))
    merge([tmp_path / "more.extxyz", data], tmp_path / "all.lmdb")
    assert energies(tmp_path / "all.lmdb") == [-float(k) for k in [*range(5), *range(120)]]
    with pytest.raises(InputError, match="at least two"):
        merge(data, tmp_path / "one.lmdb")


def test_merge_refuses_two_kinds_of_energies(tmp_path):
    structure = open_dataset(_written(tmp_path / "x.extxyz"))[0]
    for kind in ("adsorption", "total"):
        with StructureWriter(tmp_path / f"{kind}.lmdb", {"energy_convention": kind}) as writer:
            writer.append(structure)
    with pytest.raises(DataError, match="cannot be mixed"):
        merge([tmp_path / "adsorption.lmdb", tmp_path / "total.lmdb"], tmp_path / "all.lmdb")
    assert not (tmp_path / "all.lmdb").exists()


def _written(path):
    write(path, frames(1))
    return path


def test_subset_by_number_fraction_and_indices(data, tmp_path):
    subset(data, tmp_path / "n.lmdb", number=7, seed=5)
    drawn = energies(tmp_path / "n.lmdb")
    assert len(set(drawn)) == 7
    assert drawn == sorted(drawn, reverse=True)  # the order of the input
    subset(data, tmp_path / "f.lmdb", fraction=0.25)
    assert len(open_dataset(tmp_path / "f.lmdb")) == 30
    write(tmp_path / "more.extxyz", frames(5))
    subset([data, tmp_path / "more.extxyz"], tmp_path / "i.lmdb", indices=[121, 3])
    assert energies(tmp_path / "i.lmdb") == [-3.0, -1.0]


@pytest.mark.parametrize(
    "choice", [{}, {"number": 1, "fraction": 0.1}, {"number": 121}, {"indices": [120]}]
)
def test_subset_refuses_what_cannot_be(data, tmp_path, choice):
    with pytest.raises(InputError):
        subset(data, tmp_path / "n.lmdb", **choice)


@pytest.mark.parametrize(
    ("criteria", "kept"),
    [
        ({"elements": ("Cu", "O")}, 120),
        ({"elements": ("Cu",)}, 0),
        ({"max_atoms": 1}, 0),
        ({"max_forces": 10.0}, 11),
        ({"where": (("molecule", "m3"),)}, 3),
        ({"has": ("energy", "forces")}, 120),
        ({"has": ("stress",)}, 0),
        ({"min_distance": 2.0}, None),
    ],
)
def test_filter(data, tmp_path, criteria, kept):
    output = tmp_path / "f.lmdb"
    if kept is None:
        kept = sum(a.get_distance(0, 1) >= 2.0 for a in frames(120))
    if kept == 0:
        with pytest.raises(DataError):
            filter_structures(data, output, Criteria(**criteria))
        assert not output.exists()
        return
    report = filter_structures(data, output, Criteria(**criteria))
    assert len(open_dataset(output)) == report.kept == kept
    assert sum(report.left_out.values()) == 120 - kept


def test_criteria_name_what_is_unknown():
    with pytest.raises(InputError, match="Xq"):
        Criteria(elements=("Xq",))
    with pytest.raises(InputError, match="charge"):
        Criteria(has=("charge",))


def test_interrupted_split_goes_on(data, tmp_path, monkeypatch):
    split(data, tmp_path / "whole", [0.6, 0.2, 0.2], seed=4)
    calls = []

    def stop_in_the_second_part(*call):
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("mlip.datasets.chunks.CHUNK_FRAMES", 1000)
    arguments = (data, tmp_path / "parts", [0.6, 0.2, 0.2])
    with pytest.raises(KeyboardInterrupt):
        split(*arguments, seed=4, on_frames=stop_in_the_second_part)
    reports = split(*arguments, seed=4, resume=True)
    assert list(reports) == ["valid", "test"]
    for name in ("train", "valid", "test"):
        whole, resumed = (tmp_path / f / f"{name}.lmdb" for f in ("whole", "parts"))
        assert whole.read_bytes() == resumed.read_bytes()
    assert split(*arguments, seed=4, resume=True) == {}
    with pytest.raises(DataError, match="exists"):
        split(*arguments, seed=5, resume=True)


def test_split_does_not_write_over_its_input(data, tmp_path):
    with StructureWriter(tmp_path / "valid.lmdb") as writer:
        for structure in open_dataset(data):
            writer.append(structure)
    with pytest.raises(DataError, match="both input and output"):
        split(tmp_path / "valid.lmdb", tmp_path, [0.5, 0.5], overwrite=True)
    assert len(open_dataset(tmp_path / "valid.lmdb")) == 120
    assert not (tmp_path / "train.lmdb").exists()


def test_only_selected_frames_of_a_store_are_read(data, tmp_path, monkeypatch):
    subset(data, tmp_path / "all.lmdb", fraction=1.0)
    read = []
    real = StructureStore.__getitem__
    monkeypatch.setattr(
        StructureStore, "__getitem__", lambda self, i: (read.append(i), real(self, i))[1]
    )
    report = subset(tmp_path / "all.lmdb", tmp_path / "few.lmdb", indices=[5, 77])
    assert read == [5, 77]
    assert (report.read, report.kept, report.left_out) == (120, 2, {"not selected": 118})


def test_coincident_atoms_are_bad_also_for_a_filter(tmp_path):
    some = frames(4)
    some[2].positions[1] = some[2].positions[0]
    some[2].calc.atoms = some[2].copy()
    write(tmp_path / "a.traj", some)
    report = filter_structures(tmp_path / "a.traj", tmp_path / "o.lmdb", Criteria(min_distance=0.1))
    assert (report.kept, report.dropped) == (3, 1)
