"""Evaluation: every number equals one worked out by hand with numpy."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.stress import full_3x3_to_voigt_6_stress

from mlip.datasets import Structure
from mlip.errors import DataError, InputError, MissingExtraError
from mlip.simulation.calculator import Calculator
from mlip.simulation.evaluate import NO_CONFIGURATION, evaluate
from mlip.simulation.parity import MAX_POINTS, ParityPoints

COUNT = 30


@pytest.fixture
def labelled(facet) -> list[Atoms]:
    """Frames whose labels differ from the prediction by known random amounts."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(COUNT):
        atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
        atoms.symbols[1] = "Si"
        atoms.rattle(0.05, seed=k)
        if k % 5 == 4:
            atoms.pbc = (True, True, False)
        calculator = Calculator(facet)
        labels = {
            "energy": calculator.get_property("energy", atoms) - rng.normal(),
            "forces": calculator.get_property("forces", atoms) - 0.1 * rng.normal(size=(4, 3)),
        }
        if atoms.pbc.all():
            noise = 0.01 * rng.normal(size=(3, 3))
            labels["stress"] = calculator.get_property(
                "stress", atoms
            ) - full_3x3_to_voigt_6_stress(noise + noise.T)
        if k % 7 == 3:
            del labels["forces"]
        if k % 2:
            atoms.info["config_type"] = "bulk" if k % 3 else "melt"
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


def errors_by_hand(frames, facet):
    """Return energy (per atom), force and stress (GPa) differences of each frame."""
    found = []
    for atoms in frames:
        calculator, labels = Calculator(facet), atoms.calc.results
        one = {"energy": (calculator.get_property("energy", atoms) - labels["energy"]) / 4}
        if "forces" in labels:
            one["forces"] = calculator.get_property("forces", atoms) - labels["forces"]
        if "stress" in labels:
            voigt = calculator.get_property("stress", atoms) - labels["stress"]
            one["stress"] = voigt[[0, 5, 4, 5, 1, 3, 4, 3, 2]] / units.GPa
        found.append(one)
    return found


def check(errors, differences):
    values = np.concatenate([np.ravel(d) for d in differences])
    assert errors.count == len(values)
    assert errors.mae == pytest.approx(np.abs(values).mean(), rel=1e-4)
    assert errors.rmse == pytest.approx(np.sqrt((values**2).mean()), rel=1e-4)


def test_numbers(facet, labelled):
    report = evaluate([Structure.from_atoms(a) for a in labelled], facet, max_edges=500)
    truth = errors_by_hand(labelled, facet)
    for name in ("energy", "forces", "stress"):
        check(report.overall[name], [t[name] for t in truth if name in t])
    for k, symbol in enumerate(["Cu", "Si"]):
        chosen = [[1], [0, 2, 3]][1 - k]
        check(report.elements[symbol], [t["forces"][chosen] for t in truth if "forces" in t])
    kinds = [atoms.info.get("config_type", NO_CONFIGURATION) for atoms in labelled]
    assert set(report.configurations) == set(kinds) == {"bulk", "melt", NO_CONFIGURATION}
    for kind in set(kinds):
        for name in ("energy", "forces", "stress"):
            mine = [t[name] for t, k in zip(truth, kinds, strict=True) if k == kind and name in t]
            check(report.configurations[kind][name], mine)
    assert report.ok
    assert (report.structures, report.unlabelled) == (COUNT, 0)


def test_worst_frames(facet, labelled, tmp_path):
    write(tmp_path / "data.extxyz", labelled)
    data = read(tmp_path / "data.extxyz", ":")
    report = evaluate(tmp_path / "data.extxyz", facet, out=tmp_path / "out", plots=False)
    badness = [
        np.sqrt((t["forces"] ** 2).mean()) if "forces" in t else abs(t["energy"])
        for t in errors_by_hand(data, facet)
    ]
    order = np.argsort(badness)[::-1][:20]
    assert [frame.index for frame in report.worst] == order.tolist()
    frames = read(tmp_path / "out" / "worst.extxyz", ":")
    assert [frame.info["index"] for frame in frames] == order.tolist()
    for frame in frames:
        source = data[frame.info["index"]]
        assert f"frame {frame.info['index']}" in frame.info["source"]
        assert frame.info["reference_energy"] == pytest.approx(source.get_potential_energy())
        expected = Calculator(facet).get_property("energy", source)
        assert frame.get_potential_energy() == pytest.approx(expected, abs=1e-5)
        if "forces" in source.calc.results:
            assert frame.arrays["reference_forces"] == pytest.approx(source.get_forces())


def test_report_file_and_plots(facet, labelled, tmp_path):
    write(tmp_path / "data.extxyz", labelled)
    before = {name for name in sys.modules if "pyplot" in name}
    report = evaluate(tmp_path / "data.extxyz", facet, out=tmp_path / "out")
    assert {name for name in sys.modules if "pyplot" in name} == before
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert stored["overall"]["forces"]["rmse"] == report.overall["forces"].rmse
    assert stored["units"]["stress"] == "GPa"
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "parity.png", "report.json", "worst.extxyz",
    ]  # fmt: skip


def test_bad_and_unlabelled_frames_are_counted(facet, labelled, tmp_path):
    bare = bulk("Cu")
    unknown = Atoms("U2", [[0, 0, 0], [0, 0, 2]])
    unknown.calc = SinglePointCalculator(unknown, energy=1.0)
    write(tmp_path / "data.extxyz", [*labelled[:3], unknown, bare])
    report = evaluate(tmp_path / "data.extxyz", facet)
    assert (report.structures, report.unlabelled) == (5, 1)
    assert not report.ok
    assert [name.rpartition(" ")[2] for name, _ in report.failed] == ["3"]
    assert "does not know U" in report.failed[0][1]
    assert report.overall["energy"].count == 3


def test_no_labels_at_all(facet, tmp_path):
    write(tmp_path / "data.extxyz", [bulk("Cu")])
    with pytest.raises(InputError, match="no structure has energy"):
        evaluate(tmp_path / "data.extxyz", facet)
    with pytest.raises(DataError, match="no such file"):
        evaluate([tmp_path / "data.extxyz", tmp_path / "missing"], facet)


def test_plots_without_matplotlib_name_the_extra(facet, labelled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data = [Structure.from_atoms(a) for a in labelled[:2]]
    with pytest.raises(MissingExtraError, match=r"mlip\[train\]"):
        evaluate(data, facet, out=tmp_path)
    evaluate(data, facet, out=tmp_path, plots=False)


def test_points_are_thinned_evenly():
    points = ParityPoints()
    total = 7 * MAX_POINTS
    values = np.arange(float(total))
    for piece in np.split(values, 70):
        points.add(piece, -piece)
    kept = points.array()
    assert MAX_POINTS / 4 < len(kept) <= MAX_POINTS
    assert np.array_equal(kept[:, 0], -kept[:, 1])
    assert np.histogram(kept[:, 0], 7, (0, total))[0].std() < 0.01 * len(kept)


def test_single_points_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr("mlip.simulation.parity.MAX_POINTS", 100)
    points = ParityPoints()
    for x in np.arange(1000.0):
        points.add(np.array([x]), np.array([x]))
    gaps = np.diff(points.array()[:, 0])
    assert gaps.max() <= 16
    assert gaps.min() >= 4


def test_pairs_without_label_are_left_out():
    few = ParityPoints()
    few.add(np.array([1.0, np.nan, 3.0]), np.array([1.0, 2.0, np.nan]))
    assert few.array().tolist() == [[1.0, 1.0]]
