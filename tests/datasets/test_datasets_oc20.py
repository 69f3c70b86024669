"""OC20 LMDB files: what an entry means, what a file with odd keys gives, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from mlip.datasets.formats.oc20 import Oc20Dataset, is_oc20, open_oc20
from mlip.datasets.formats.reader import by_index
from mlip.datasets.labels import LabelKeys
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import find_reader, iterate_file
from mlip.errors import DataError

InChild = Callable[[Callable[[], Any]], tuple[str, Any]]
N = 5


def entry(**changes: Any) -> Data:
    """Make an S2EF entry; a change to None takes the field away."""
    fields: dict[str, Any] = {
        "pos": torch.arange(3.0 * N).reshape(N, 3) / 7,
        "cell": torch.tensor([[[9.0, 0, 0], [1, 8, 0], [0, 0, 20]]]),
        "atomic_numbers": torch.tensor([29.0, 29, 13, 8, 1]),
        "natoms": N,
        "tags": torch.tensor([0, 0, 1, 2, 2]),
        "fixed": torch.tensor([1.0, 1, 0, 0, 0]),
        "y": -1.5,
        "force": torch.ones(N, 3) / 3,
        "sid": torch.tensor([77]),
        "fid": 3,
    }
    fields |= changes
    return Data(**{k: v for k, v in fields.items() if v is not None})


def relaxation(**changes: Any) -> Data:
    """Make an IS2RE entry."""
    fields = {
        "y": None, "y_init": 2.0, "y_relaxed": -0.5, "pos_relaxed": torch.full((N, 3), 0.25),
        "fid": None,
    } | changes  # fmt: skip
    return entry(**fields)


def write(path: Path, entries: dict[Any, Any], length: Any = None) -> Path:
    environment = lmdb.open(str(path), subdir=False, map_size=2**28, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            name = key if isinstance(key, bytes) else b"%d" % key
            transaction.put(name, value if isinstance(value, bytes) else pickle.dumps(value, 4))
        if length is not None:
            transaction.put(b"length", pickle.dumps(length, 4))
    return path


def opened(path: Path, *entries: Any, **options: Any) -> Oc20Dataset:
    write(path, dict(enumerate(entries)), len(entries))
    return open_oc20(path, ReadOptions(**options))


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


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no positions": ({"pos": None}, "pos is missing"),
    "positions transposed": ({"pos": torch.ones(3, N)}, r"pos has shape \(3, 5\)"),
    "no atoms": ({"pos": torch.ones(0, 3), "natoms": 0}, "no atoms"),
    "natoms lies": ({"natoms": 4}, "natoms is 4, but pos has 5 rows"),
    "natoms of several": ({"natoms": torch.tensor([2, 3])}, "natoms has shape"),
    "pos is text": ({"pos": "text"}, "pos has shape"),
    "pos is nan": ({"pos": torch.full((N, 3), torch.nan)}, r"pos\[0, 0\] is nan"),
    "pos is complex": ({"pos": torch.ones(N, 3, dtype=torch.complex64)}, "pos holds complex64"),
    "no numbers": ({"atomic_numbers": None}, "atomic_numbers is missing"),
    "numbers too few": ({"atomic_numbers": torch.ones(N - 1)}, r"atomic_numbers has shape \(4,\)"),
    "number 0": ({"atomic_numbers": torch.arange(float(N))}, "atomic_numbers holds 0"),
    "number 119": ({"atomic_numbers": torch.full((N,), 119)}, "atomic_numbers holds 119"),
    "number 1.5": ({"atomic_numbers": torch.full((N,), 1.5)}, "atomic_numbers holds 1.5"),
    "number nan": ({"atomic_numbers": torch.full((N,), torch.nan)}, "atomic_numbers holds nan"),
    "no cell": ({"cell": None}, "cell is missing"),
    "flat cell": ({"cell": torch.zeros(1, 3, 3)}, "cell has no volume"),
    "coplanar cell": ({"cell": torch.ones(1, 3, 3)}, "cell has no volume"),
    "cell of two": ({"cell": torch.ones(2, 3, 3)}, r"cell has shape \(2, 3, 3\)"),
    "cell inf": ({"cell": torch.full((3, 3), torch.inf)}, r"cell\[0, 0\] is inf"),
    "energy inf": ({"y": float("inf")}, "y is inf"),
    "energy text": ({"y": "-1.5"}, "y is '-1.5', expected a number"),
    "energy true": ({"y": True}, "y is True"),
    "energy huge": ({"y": 2**60}, ""),
    "energies": ({"y": torch.ones(2)}, r"y has shape \(2,\)"),
    "two energies": ({"energy": -2.0}, "y is -1.5, but energy is -2.0"),
    "forces short": ({"force": torch.ones(N - 1, 3)}, r"force has shape \(4, 3\)"),
    "forces transposed": ({"force": torch.ones(3, N)}, r"force has shape \(3, 5\)"),
    "forces nan": ({"force": torch.full((N, 3), torch.nan)}, r"force\[0, 0\] is nan"),
    "two forces": ({"forces": torch.zeros(N, 3)}, "force and forces differ"),
    "tags half": ({"tags": torch.full((N,), 0.5)}, "tags holds 0.5"),
    "tags short": ({"tags": torch.zeros(N - 1)}, "tags has shape"),
    "fixed two": ({"fixed": torch.full((N,), 2)}, "fixed holds 2"),
    "edges out of range": ({"edge_index": torch.full((2, 3), N)}, "edge_index names atom 5"),
    "edges negative": ({"edge_index": torch.full((2, 3), -1)}, "edge_index names atom -1"),
    "edges transposed": ({"edge_index": torch.zeros(7, 2)}, r"edge_index has shape \(7, 2\)"),
    "edges real": ({"edge_index": torch.zeros(2, 7)}, "edge_index is of type float32"),
    "offsets short": (
        {"edge_index": torch.zeros(2, 7).long(), "cell_offsets": torch.zeros(6, 3).long()},
        r"cell_offsets has shape \(6, 3\), expected \(7, 3\)",
    ),
    "stress skew": ({"stress": torch.arange(9.0).reshape(3, 3)}, "stress is not symmetric"),
    "spin text": ({"spin": "up"}, "spin is 'up'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_entries_name_file_entry_and_field(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    path = tmp_path / "a.lmdb"
    dataset = opened(path, entry(), entry(**changes), entry())
    if not message:
        assert dataset[1].energy == 2.0**60
        return
    with pytest.raises(DataError, match=message) as caught:
        dataset[1]
    assert str(caught.value).startswith(f"{path}: entry 1: ")
    assert dataset[0].energy == dataset[2].energy == -1.5
    frames = list(by_index(open_oc20)(path, 0, ReadOptions()))
    assert [isinstance(frame, DataError) for _, frame in frames] == [False, True, False]
    found = list(iterate_file(path))
    assert [e.problem is None for e in found] == [True, False, True]
    assert found[1].problem is not None
    assert found[1].problem.count(str(path)) == 1


def test_bad_entries_of_a_relaxation(tmp_path: Path) -> None:
    cases = [
        ({"pos_relaxed": torch.ones(N - 1, 3)}, None, "pos_relaxed has shape"),
        ({"pos_relaxed": None}, "relaxed", "pos_relaxed is missing"),
        ({"y_relaxed": float("nan")}, "relaxed", "y_relaxed is nan"),
        ({"y_init": float("nan")}, None, "y_init is nan"),
    ]
    for i, (changes, frame, message) in enumerate(cases):
        dataset = opened(tmp_path / f"{i}.lmdb", relaxation(), relaxation(**changes), is2re=frame)
        with pytest.raises(DataError, match=message):
            dataset[1]


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


def test_the_length_key_is_only_a_hint(tmp_path: Path) -> None:
    three = dict.fromkeys(range(3), entry())
    for number, length in enumerate((None, 3, 2, 9)):
        path = write(tmp_path / f"{number}.lmdb", three, length)
        dataset = open_oc20(path, ReadOptions())
        assert len(dataset) == 3
        assert len(list(dataset)) == 3
        problems = dataset.facts.problems
        if length in {None, 3}:
            assert problems == ()
        else:
            assert problems == (
                f"{path}: the length key says {length}, 3 entries are there: all of them are read",
            )


@pytest.mark.parametrize("length", ["3", 3.0, True, -1, [3], None, np.int64(3), entry()])
def test_a_length_that_is_no_number_is_refused(tmp_path: Path, length: Any) -> None:
    path = write(tmp_path / "a.lmdb", {0: entry(), b"length": pickle.dumps(length, 4)})
    with pytest.raises(DataError, match=r"a\.lmdb: key 'length': "):
        open_oc20(path, ReadOptions())


def test_a_gap_is_an_error_of_its_entry_if_the_length_counts_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", {i: entry(fid=i) for i in (0, 1, 3, 4)}, 5)
    dataset = open_oc20(path, ReadOptions())
    assert len(dataset) == 5
    assert "says 5, 4 entries are there; missing: 2" in dataset.facts.problems[0]
    assert [dataset[i].info["fid"] for i in (0, 1, 3, -1)] == [0, 1, 3, 4]
    with pytest.raises(DataError, match="entry 2: the entry is missing"):
        dataset[2]


def test_keys_with_holes_are_read_in_their_order(tmp_path: Path) -> None:
    keys = (7, 100, 23, 10**17)
    path = write(tmp_path / "a.lmdb", {i: entry(fid=i) for i in keys}, 4)
    dataset = open_oc20(path, ReadOptions())
    assert [s.info["fid"] for s in dataset] == sorted(keys)
    assert dataset.name(2) == f"{path} entry 100"
    assert "the keys are not 0 to 3" in dataset.facts.problems[0]


def test_foreign_keys_are_told_and_left_alone(tmp_path: Path) -> None:
    odd = {b"metadata": b"x", b"!": b"", b"01": b"y", b"3a": b"z", b"9" * 30: b"w"}
    path = write(tmp_path / "a.lmdb", {0: entry(), 1: entry()} | odd)
    dataset = open_oc20(path, ReadOptions())
    assert len(dataset) == 2
    (problem,) = dataset.facts.problems
    assert "5 keys are no entries" in problem
    assert "b'metadata'" in problem


def test_large_files_open_without_a_look_at_all_keys(tmp_path: Path) -> None:
    n = 30_000
    value = pickle.dumps(entry(), 4)
    path = write(tmp_path / "a.lmdb", dict.fromkeys(range(n), value), n)
    began = time.perf_counter()
    dataset = open_oc20(path, ReadOptions())
    assert time.perf_counter() - began < 0.1
    assert len(dataset) == n
    assert isinstance(dataset._keys, range)
    assert dataset[n - 1].energy == -1.5
    with lmdb.open(str(path), subdir=False, map_size=2**28, lock=False) as environment:
        for change in ((b"7", None), (b"length", pickle.dumps(n + 5))):
            with environment.begin(write=True) as transaction:
                if change[1] is None:
                    transaction.delete(change[0])
                else:
                    transaction.put(*change)
            assert open_oc20(path, ReadOptions()).facts.problems
    dataset = open_oc20(path, ReadOptions())
    assert len(dataset) == n - 1
    assert dataset.name(7) == f"{path} entry 8"


def test_what_is_recognised(tmp_path: Path) -> None:
    good = write(tmp_path / "a.lmdb", {0: b"", 1: entry()})
    other = write(tmp_path / "b.lmdb", {0: b"{}", b"zz": entry()})
    assert is_oc20(good)
    assert find_reader(good).name.startswith("OC20")
    assert not is_oc20(other)
    (tmp_path / "c.lmdb").write_bytes(b"text")
    assert not is_oc20(tmp_path / "c.lmdb")
    with pytest.raises(DataError, match=r"b\.lmdb: an LMDB file of no known layout: 2 entries.*zz"):
        list(iterate_file(other))
    with pytest.raises(DataError, match="no structures"):
        open_oc20(write(tmp_path / "d.lmdb", {b"zz": b""}, 0), ReadOptions())
    with pytest.raises(DataError, match="no such file"):
        open_oc20(tmp_path / "none.lmdb", ReadOptions())
    with pytest.raises(DataError, match="entry 0: the entry is empty"):
        open_oc20(good, ReadOptions())[0]
    plain = write(tmp_path / "e.lmdb", {0: {"pos": 1}, 1: 5, 2: [entry()]})
    for index in range(3):
        with pytest.raises(DataError, match=f"entry {index}: "):
            open_oc20(plain, ReadOptions())[index]


def test_processes_and_pickling(tmp_path: Path, in_child: InChild) -> None:
    dataset = opened(tmp_path / "a.lmdb", *(entry(fid=i) for i in range(9)))

    def numbers() -> list[int]:
        return [s.info["fid"] for s in dataset]

    assert in_child(numbers) == ("ok", list(range(9)))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[4].info["fid"] == 4
    assert copy.fingerprint() == dataset.fingerprint()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(copy.fingerprint) == dataset.fingerprint()
    second = open_oc20(tmp_path / "a.lmdb", ReadOptions())
    assert second[8].info["fid"] == dataset[8].info["fid"] == 8


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = opened(tmp_path / "a.lmdb", entry(), entry()).fingerprint()
    assert first == opened(tmp_path / "b.lmdb", entry(), entry()).fingerprint() or first
    assert first != opened(tmp_path / "c.lmdb", entry(), entry(y=-1.25)).fingerprint()
    assert first != opened(tmp_path / "d.lmdb", entry(), entry(), entry()).fingerprint()


SAMPLES = (
    "is2re_legacy", "is2re_oct2020", "is2re_pyg2", "oc20_numpy1", "oc20_s2ef_fc1",
    "oc20_s2ef_legacy",
)  # fmt: skip


def described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return value.dtype.name if isinstance(value, np.generic) else type(value).__name__


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_as_expected(shared: Path, name: str) -> None:
    expected = json.loads((shared / "samples" / "expected.json").read_text())[name]
    files = sorted((shared / "samples" / name).glob("*.lmdb"))
    parts = [open_oc20(path, ReadOptions()) for path in files]
    structures = [structure for part in parts for structure in part]
    first = structures[0]
    assert len(structures) == expected["structures"]
    assert sum(int(part.n_atoms().sum()) for part in parts) == expected["natoms_total"]
    assert sum(int(s.numbers.sum()) for s in structures) == expected["numbers_sum"]
    assert first.energy == expected["first_energy"]
    energies = [s.energy for s in structures if s.energy is not None]
    assert sum(energies) == pytest.approx(expected["energy_sum"], rel=1e-14)
    squares = sum(float((s.forces**2).sum()) for s in structures if s.forces is not None)
    assert squares == pytest.approx(expected["force_sumsq"], rel=1e-14)
    assert first.forces is not None
    assert first.forces[0].tolist() == expected["first_force"]
    assert sum(int(s.tags.sum()) for s in structures if s.tags is not None) == expected["tags_sum"]
    fixed = [s.fixed for s in structures if s.fixed is not None]
    assert sum(int(f.sum()) for f in fixed) == expected["fixed_sum"]
    assert first.info.get("sid") == expected.get("first_sid")
    assert first.info.get("fid") == expected.get("first_fid")
    raw = parts[0].raw(0)
    assert {key: described(value) for key, value in raw.items()} == expected["fields"]
    assert all(part.facts.problems == () for part in parts)
    if "y_relaxed_sum" in expected:
        total = sum(s.info["y_init"] for s in structures)
        assert total == pytest.approx(expected["y_init_sum"], rel=1e-14)
    if "pos_relaxed_sum" in expected:
        total = sum(float(np.sum(s.info["pos_relaxed"])) for s in structures)
        assert total == pytest.approx(expected["pos_relaxed_sum"], rel=1e-6)


def test_bad_samples(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shared / "samples" / "bad"
    refused = {"truncated_half", "truncated_meta", "empty_file", "not_lmdb", "evil_length_key"}
    seen = 0
    for case in json.loads((folder / "CASES.json").read_text()):
        path = folder / case["case"] / "data.0000.lmdb"
        if not path.exists():
            continue
        seen += 1
        if case["case"] in refused:
            with pytest.raises(DataError, match=str(path)):
                open_oc20(path, ReadOptions())
            continue
        dataset = open_oc20(path, ReadOptions())
        frames = by_index(open_oc20)(path, 0, ReadOptions())
        problems = {i: e for i, e in frames if isinstance(e, DataError)}
        assert all(str(e).startswith(f"{path}: entry {i}: ") for i, e in problems.items())
        bad = list(problems)
        wanted = [case["bad_index"]] if "bad_index" in case else []
        wanted = case.get("missing", wanted)
        if case["case"] == "missing_forces":
            assert dataset[0].forces is None
            wanted = []
        elif case["case"] == "page_zeroed":
            wanted = bad[:1]
            assert len(bad) == 1
        assert bad == wanted, case["case"]
    assert seen > 25
    assert list(tmp_path.iterdir()) == []
    for place in (folder, Path.cwd(), folder.parent):
        assert not list(place.rglob("mlip_pwned*"))
