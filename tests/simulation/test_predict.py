"""Prediction: batches equal single structures, bad ones are named, kills lose nothing."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from mlip.errors import DataError, InputError, MlipError
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator
from mlip.simulation.inputs import iter_structures
from mlip.simulation.predict import predict, predict_batch, predict_stream


@pytest.fixture
def structures() -> list[Atoms]:
    """Crystals, a slab, a cluster, a lone atom: different sizes and periodicities."""
    slab = bulk("Cu", "fcc", a=3.6, cubic=True)
    slab.center(vacuum=5, axis=2)
    slab.pbc = (True, True, False)
    cluster = Atoms("CuSi2", [[0, 0, 0], [2.3, 0, 0.2], [0, 2.4, 0.1]])
    items = [bulk("Cu"), bulk("Si") * (2, 1, 1), slab, cluster, Atoms("Cu"), bulk("Cu", a=3.4)]
    for k, atoms in enumerate(items):
        atoms.rattle(0.05, seed=k)
    return items


@pytest.mark.parametrize("max_edges", [1, 150, 100_000])
def test_batches_equal_single_structures(facet, structures, max_edges):
    potential = Calculator(facet, dtype="float64").potential
    results = predict_batch(structures, potential, max_edges=max_edges)
    for atoms, result in zip(structures, results, strict=True):
        single = Calculator(potential)
        assert result.error is None
        for name, value in result.results().items():
            expected = single.get_property(name, atoms)
            assert value == pytest.approx(expected, abs=1e-10), name
        assert (result.stress is None) == (not atoms.pbc.all())


def test_bad_structures_do_not_harm_the_batch(facet, structures):
    flat = bulk("Cu")
    flat.set_cell(np.ones((3, 3)))
    broken = bulk("Cu")
    broken.positions[0, 1] = np.inf
    bad = {1: Atoms("U"), 3: flat, 4: broken, 7: Atoms()}
    items = list(structures)
    for k, atoms in bad.items():
        items.insert(k, atoms)
    results = predict_batch(items, facet)
    assert [k for k, result in enumerate(results) if result.error] == list(bad)
    for k, text in {1: "does not know U", 3: "cell", 4: "finite", 7: "no atoms"}.items():
        assert text in results[k].error
        assert np.isnan(results[k].energy)
    good = [result.energy for result in results if result.error is None]
    assert good == pytest.approx([r.energy for r in predict_batch(structures, facet)], abs=1e-5)


def test_what_does_not_fit_is_halved(facet, structures, monkeypatch):
    original, sizes = Potential.forward, []

    def forward(self, graph, **options):
        sizes.append(graph.num_graphs)
        if graph.num_graphs > 2 or len(graph.positions) == 3:
            raise torch.OutOfMemoryError("too large")
        return original(self, graph, **options)

    monkeypatch.setattr(Potential, "forward", forward)
    results = predict_batch(structures, facet)
    assert [k for k, result in enumerate(results) if result.error] == [3]
    assert "too large" in results[3].error
    assert sizes[0] == 6


def test_numbers_that_are_not_finite_are_errors(poisoned):
    near = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.0]])
    results = predict_batch([bulk("Cu"), near, bulk("Cu")], poisoned)
    assert [result.error is None for result in results] == [True, False, True]
    assert "not finite" in results[1].error


def test_batches_keep_to_the_budget(facet, structures):
    sizes = []
    original = Potential.forward

    def forward(self, graph, **options):
        sizes.append((graph.num_graphs, graph.edge_index.shape[1]))
        return original(self, graph, **options)

    from mlip.graph import atoms_to_graph

    Potential.forward = forward
    try:
        batches = list(
            predict_stream(
                structures * 3, lambda atoms: atoms_to_graph(atoms, 4.0), facet, max_edges=150
            )
        )
    finally:
        Potential.forward = original
    assert all(count == 1 or edges <= 150 for count, edges in sizes)
    assert len(sizes) == len(batches) < 18
    assert [item for batch in batches for item, _ in batch] == structures * 3
    with pytest.raises(InputError, match="max_edges"):
        predict_batch(structures, facet, max_edges=0)


def test_streams_without_reading_ahead(morse):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield bulk("Cu")

    from mlip.graph import atoms_to_graph

    stream = predict_stream(endless(), lambda a: atoms_to_graph(a, 6.0), morse, max_edges=2000)
    assert len(next(stream)) == len(taken) - 1 < 40


@pytest.fixture
def inputs(tmp_path, structures) -> list:
    """Two good files and one that is torn, with elements the potential does not know."""
    labelled = structures[0].copy()
    labelled.info["energy"] = "old"
    labelled.calc = SinglePointCalculator(labelled, energy=1.0, forces=np.ones((1, 3)))
    write(tmp_path / "a.extxyz", [*structures, Atoms("U")])
    torn = tmp_path / "b.extxyz"
    write(torn, structures[:2])
    torn.write_text(torn.read_text() + "3\nProperties=species:S:1:pos:R:3\nCu 0 0 0\n")
    del labelled.info["energy"]
    write(tmp_path / "c.traj", [labelled, structures[1]])
    return [tmp_path / name for name in ("a.extxyz", "b.extxyz", "c.traj")]


def test_files_in_file_out(facet, inputs, tmp_path):
    output = tmp_path / "out" / "predicted.extxyz"
    summary = predict(inputs, output, facet, max_edges=300)
    assert (summary.structures, summary.failed) == (12, 2)
    with summary.errors_file.open(newline="") as file:
        errors = list(csv.reader(file))
    assert [int(line[0]) for line in errors] == [6, 9]
    assert "a.extxyz frame 6" in errors[0][1]
    assert "does not know U" in errors[0][2]
    assert "b.extxyz" in errors[1][1]
    frames = {frame.info["index"]: frame for frame in read(output, ":")}
    assert list(frames) == [0, 1, 2, 3, 4, 5, 7, 8, 10, 11]
    source = [atoms for _, atoms in iter_structures(inputs)]
    for index, frame in frames.items():
        check = Calculator(facet)
        assert len(frame) == len(source[index])
        assert frame.get_potential_energy() == pytest.approx(
            check.get_property("energy", source[index]), abs=1e-5
        )
        assert frame.get_forces() == pytest.approx(
            check.get_property("forces", source[index]), abs=1e-4
        )
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["settings"]["potential"] == facet.model_hash()
    assert not list(output.parent.glob("*.part"))


def test_a_file_that_breaks_off_is_named_once(facet, tmp_path):
    rng = np.random.default_rng(0)
    frames = [bulk("Cu") * (2, 2, 1) for _ in range(300)]
    for atoms in frames:
        atoms.positions += 0.1 * rng.normal(size=(4, 3))
    torn, good = tmp_path / "torn.extxyz.xz", tmp_path / "good.extxyz"
    write(torn, frames, format="extxyz")
    write(good, frames[:2])
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    items = list(iter_structures([torn, good]))
    errors = [k for k, (_, item) in enumerate(items) if isinstance(item, Exception)]
    assert errors == [len(items) - 3]
    assert "torn" in items[errors[0]][0]
    assert len(items) < 300
    summary = predict([torn, good], tmp_path / "o.extxyz", facet)
    assert (summary.structures, summary.failed) == (len(items), 1)


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("when", [1, 5, 9])
def test_resume_gives_the_same_files(facet, inputs, tmp_path, when):
    whole, output = tmp_path / "whole.extxyz", tmp_path / "part.extxyz"
    expected = predict(inputs, whole, facet, max_edges=1)

    def kill(done, _failed):
        if done >= when:
            raise Killed

    with pytest.raises(Killed):
        predict(inputs, output, facet, max_edges=1, on_progress=kill)
    assert not output.exists()
    with (tmp_path / "part.extxyz.part").open("a") as file:
        file.write("1\nhalf a fra")
    steps = []
    summary = predict(
        inputs, output, facet, max_edges=1, resume=True, on_progress=lambda *a: steps.append(a[0])
    )
    assert steps == list(range(when + 1, 13))
    assert (summary.structures, summary.failed) == (expected.structures, expected.failed)
    assert output.read_bytes() == whole.read_bytes()
    assert summary.errors_file.read_bytes() == expected.errors_file.read_bytes()
    again = predict(inputs, output, facet, resume=True, on_progress=lambda *_: steps.append(None))
    assert None not in steps
    assert (again.structures, again.failed) == (12, 2)


def test_refusals(facet, inputs, tmp_path):
    with pytest.raises(InputError, match="is an input"):
        predict(inputs, inputs[0], facet)
    with pytest.raises(DataError, match="no such file"):
        predict([*inputs, tmp_path / "missing.cif"], tmp_path / "o.extxyz", facet)
    assert not (tmp_path / "o.json").exists()
    predict(inputs, tmp_path / "o.extxyz", facet)
    with pytest.raises(InputError, match="inputs was"):
        predict(inputs[:1], tmp_path / "o.extxyz", facet, resume=True)


def test_a_full_disk_is_one_clear_error(facet, inputs, tmp_path, monkeypatch):
    import errno
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MlipError, match="disk is full"):
        predict(inputs, tmp_path / "o.extxyz", facet)
    assert not (tmp_path / "o.extxyz").exists()
    monkeypatch.undo()
    assert predict(inputs, tmp_path / "o.extxyz", facet, resume=True).structures == 12
