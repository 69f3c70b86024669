"""OC20 LMDB files: what the fields of an entry mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mlip.datasets.labels import LabelKeys
from tests.datasets.oc20_entries import N, entry, opened, relaxation


def test_an_entry_field_by_field(tmp_path: Path) -> None:
    dataset = opened(tmp_path / "a.lmdb", entry(), entry(y=None, force=None))
    first = dataset[0]
    assert first.numbers.tolist() == [29, 29, 13, 8, 1]
    assert np.array_equal(first.positions, entry().pos.double().numpy())
    assert first.cell.tolist() == [[9, 0, 0], [1, 8, 0], [0, 0, 20]]
    assert first.pbc.all()
    assert first.energy == -1.5
    assert first.forces is not None
    assert np.array_equal(first.forces, np.full((N, 3), np.float64(np.float32(1 / 3))))
    assert first.tags is not None
    assert first.tags.tolist() == [0, 0, 1, 2, 2]
    assert first.fixed is not None
    assert first.fixed.tolist() == [True, True, False, False, False]
    assert first.info == {"sid": 77, "fid": 3}
    for name in ("positions", "forces", "numbers", "cell"):
        assert not getattr(first, name).flags.writeable
    assert not dataset[1].labelled
    assert dataset.facts.energy_convention == "unstated"
    assert dataset.facts.relaxation_frame is None
    assert dataset.facts.problems == ()
    assert dataset.n_atoms().tolist() == [N, N]
    assert dataset.n_atoms().dtype == np.int64
    assert dataset.name(1) == f"{tmp_path / 'a.lmdb'} entry 1"
    assert dataset.raw(0)["natoms"] == N
    assert dataset.raw(0)["sid"].dtype == np.int64


def test_the_names_types_and_shapes_of_all_years(tmp_path: Path) -> None:
    new = entry(
        y=None, force=None, sid=77, energy=np.float64(-1.5), forces=torch.ones(N, 3) / 3,
        atomic_numbers=torch.tensor([29, 29, 13, 8, 1], dtype=torch.uint8),
        fixed=torch.tensor([1, 1, 0, 0, 0], dtype=torch.int32), natoms=torch.tensor([N]),
        tags=torch.tensor([0, 0, 1, 2, 2], dtype=torch.int32),
        edge_index=torch.tensor([[0, 1], [1, 4]]), cell_offsets=torch.zeros(2, 3).long(),
        distances=torch.ones(2), nads=1, oc22=1, id="0_0", raw_y=-400.5, charge=1, spin=2.0,
        stress=torch.eye(3)[None],
    )  # fmt: skip
    dataset = opened(tmp_path / "a.lmdb", entry(), new, entry(y=torch.tensor(-1.5)), new)
    a, b, c = dataset[0], dataset[1], dataset[2]
    for other in (b, c):
        for name in ("numbers", "positions", "cell", "forces", "tags", "fixed"):
            x, y = getattr(a, name), getattr(other, name)
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)
        assert other.energy == a.energy
    assert (b.charge, b.spin) == (1, 2)
    assert b.stress is not None
    assert np.array_equal(b.stress, np.eye(3))
    extras = {"sid": 77, "fid": 3, "nads": 1, "oc22": 1, "id": "0_0", "raw_y": -400.5}
    assert b.info == extras
    assert json.loads(json.dumps(b.info)) == b.info
    assert [len(s) for s in dataset[1:]] == [N, N, N]


def test_the_energy_convention_is_what_the_user_says(tmp_path: Path) -> None:
    for said in ("adsorption", "total"):
        facts = opened(tmp_path / f"{said}.lmdb", entry(), energy_convention=said).facts
        assert facts.energy_convention == said


@pytest.mark.parametrize("frame", [None, "initial", "relaxed"])
def test_the_frames_of_a_relaxation(tmp_path: Path, frame: str | None) -> None:
    dataset = opened(tmp_path / "a.lmdb", relaxation(), is2re=frame)
    structure = dataset[0]
    relaxed = frame == "relaxed"
    expected = np.full((N, 3), 0.25) if relaxed else relaxation().pos.numpy()
    assert np.array_equal(structure.positions, expected)
    assert structure.energy == (2.0 if frame == "initial" else -0.5)
    assert (structure.forces is None) == relaxed
    assert structure.info["y_init"] == 2.0
    assert structure.info["y_relaxed"] == -0.5
    assert ("pos_relaxed" in structure.info) != relaxed
    if not relaxed:
        assert structure.info["pos_relaxed"] == [[0.25] * 3] * N
    assert dataset.facts.relaxation_frame == (frame or "unstated")
    steps = opened(tmp_path / "b.lmdb", entry(), is2re=frame)
    assert steps.facts.relaxation_frame is None
    assert steps[0].energy == -1.5


def test_a_label_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    mine = entry(my_energy=torch.tensor([-9.0]), my_forces=torch.zeros(N, 3))
    dataset = opened(path, mine, keys=LabelKeys(energy="my_energy", forces="my_forces"))
    structure = dataset[0]
    assert structure.energy == -9
    assert structure.forces is not None
    assert not structure.forces.any()
    assert structure.info["y"] == -1.5
    assert dataset.extract(0).used == {
        "energy": "my_energy (entry)", "forces": "my_forces (entry)",
    }  # fmt: skip


def test_extras_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    odd = entry(
        phase=np.complex128(1j),
        raw=b"bytes",
        big=torch.zeros(200_000),
        nested=[1, {"a": torch.ones(2)}],
    )
    extracted = opened(tmp_path / "a.lmdb", odd).extract(0)
    assert set(extracted.not_kept) == {"phase", "raw", "big"}
    assert extracted.structure.info["nested"] == [1, {"a": [1.0, 1.0]}]
