"""ASE LMDB files: both dialects, damaged rows and counters; what is written others can read."""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import orjson
import pytest
from ase import Atoms
from ase.io.jsonio import encode

from mlip.datasets.collection import open_dataset
from mlip.datasets.formats.ase_row import MAX_ROW_BYTES
from mlip.datasets.formats.aselmdb import is_aselmdb
from mlip.datasets.formats.aselmdb_write import AseLmdbWriter
from mlip.datasets.labels import LabelKeys
from mlip.datasets.read import find_reader, iterate_file
from mlip.datasets.structure import Structure
from mlip.errors import DataError, DataWarning

Row = dict[str, Any]
N = 4


def row(seed: int = 0, **changes: Any) -> Row:
    """A row as plain numpy values; a change to ... leaves a field out."""
    random = np.random.default_rng(seed)
    fields: Row = {
        "numbers": random.integers(1, 90, N),
        "positions": random.normal(size=(N, 3)),
        "cell": np.eye(3) * 5 + 0.1 * random.normal(size=(3, 3)),
        "pbc": np.array([True, True, False]),
        "energy": float(random.normal()),
        "forces": random.normal(size=(N, 3)),
        "stress": random.normal(size=6),
        "calculator": "unknown",
        "unique_id": "0" * 32,
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not ...}


def tagged(fields: Row) -> bytes:
    return encode(fields).encode()


def nested(fields: Row) -> bytes:
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def write(path: Path, rows: list[bytes | Row], **reserved: Any) -> Path:
    """Write rows (bytes as they are) with ids from 1 on; a reserved key of None is left out."""
    reserved = {"nextid": len(rows) + 1, **reserved}
    opened = lmdb.open(str(path), subdir=False, lock=False, map_size=2**28)
    with opened as environment, environment.begin(write=True) as transaction:
        for i, content in enumerate(rows, start=1):
            data = content if isinstance(content, bytes) else zlib.compress(tagged(content))
            transaction.put(b"%d" % i, data)
        for key, value in reserved.items():
            if value is not None:
                transaction.put(key.encode(), zlib.compress(json.dumps(value).encode()))
    return path


def change(path: Path, function: Callable[[Any], Any]) -> None:
    opened = lmdb.open(str(path), subdir=False, lock=False, map_size=2**28)
    with opened as environment, environment.begin(write=True) as transaction:
        function(transaction)


def error_of(path: Path, index: int = 0, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(path, **options)[index]
    return str(caught.value)


def test_both_dialects_in_one_file(tmp_path: Path) -> None:
    rows = [row(i) for i in range(6)]
    dialects = [tagged, nested]
    path = write(
        tmp_path / "a.aselmdb", [zlib.compress(dialects[i % 2](rows[i])) for i in range(6)]
    )
    data = open_dataset(path)
    assert len(data) == 6
    assert data.facts.problems == ()
    assert data.n_atoms().tolist() == [N] * 6
    for structure, fields in zip(data, rows, strict=True):
        for name in ("numbers", "positions", "cell", "pbc", "forces"):
            assert getattr(structure, name).tolist() == fields[name].tolist(), name
        assert structure.energy == fields["energy"]
        xx, yy, zz, yz, xz, xy = fields["stress"]
        assert structure.stress.tolist() == [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]
    assert data.name(3) == f"{path} id 4"
    assert data.raw(1)["positions"] == rows[1]["positions"].tolist()


def test_extras(tmp_path: Path) -> None:
    data = {
        "sid": "a1", "charge": -1, "spin": 3, "matrix": np.arange(4).reshape(2, 2),
        "z": 1 + 2j, "zs": np.array([1j, 2.0]), "names": np.array(["a", "b"]), "inner": {"x": [1]},
    }  # fmt: skip
    path = write(
        tmp_path / "a.aselmdb",
        [row(data=data, key_value_pairs={"sid": "no", "flag": True}, tags=np.array([0, 1, 2, 2]))],
    )
    s = open_dataset(path)[0]
    assert (s.charge, s.spin) == (-1.0, 3.0)
    assert s.tags.tolist() == [0, 1, 2, 2]
    assert s.info == {
        "sid": "a1", "flag": True, "matrix": [[0, 1], [2, 3]], "z": [1.0, 2.0],
        "zs": [[0.0, 1.0], [2.0, 0.0]], "names": ["a", "b"], "inner": {"x": [1]},
    }  # fmt: skip


def test_molecule_without_cell_and_labels(tmp_path: Path) -> None:
    gone = dict.fromkeys(("cell", "pbc", "energy", "forces", "stress"), ...)
    s = open_dataset(write(tmp_path / "a.aselmdb", [row(**gone)]))[0]
    assert not s.cell.any()
    assert not s.pbc.any()
    assert not s.labelled


CONSTRAINTS = {
    "indices": ([{"name": "FixAtoms", "kwargs": {"indices": [0, 3]}}], [0, 3]),
    "tagged": ([{"name": "FixAtoms", "kwargs": {"indices": np.array([2])}}], [2]),
    "mask": ([{"name": "FixAtoms", "kwargs": {"mask": [False, True, False, True]}}], [1, 3]),
    "two": ([{"name": "FixAtoms", "kwargs": {"indices": [i]}} for i in (1, 2)], [1, 2]),
    "other": ([{"name": "FixBondLength", "kwargs": {"pairs": [[0, 1]]}}], None),
}


@pytest.mark.parametrize("case", CONSTRAINTS)
def test_constraints(tmp_path: Path, case: str) -> None:
    constraints, fixed = CONSTRAINTS[case]
    path = write(tmp_path / "a.aselmdb", [row(constraints=constraints)])
    found = open_dataset(path)[0].fixed
    assert (None if found is None else np.flatnonzero(found).tolist()) == fixed
    entry = next(iter(iterate_file(path)))
    assert ("constraint FixBondLength" in entry.not_kept) == (case == "other")


@pytest.mark.parametrize("shape", [(9,), (3, 3)])
def test_full_stress(tmp_path: Path, shape: tuple[int, ...]) -> None:
    matrix = np.array([[1.0, 6, 5], [6, 2, 4], [5, 4, 3]])
    path = write(tmp_path / "a.aselmdb", [row(stress=matrix.reshape(shape))])
    assert open_dataset(path)[0].stress.tolist() == matrix.tolist()


def test_labels_in_data(tmp_path: Path) -> None:
    """A label only in data is used; one that agrees is no matter; one that differs is refused."""
    own = row()
    only = row(energy=..., forces=..., data={"energy": -7.5, "forces": own["forces"]})
    same = row(data={"energy": own["energy"], "stress": own["stress"].tolist()})
    other = row(data={"energy": own["energy"] + 1})
    path = write(tmp_path / "a.aselmdb", [only, same, other, row(energy=..., free_energy=-9.0)])
    entries = list(iterate_file(path))
    assert entries[0].structure.energy == -7.5
    assert entries[0].used["energy"] == "energy (data)"
    assert entries[1].used["energy"] == "energy (row)"
    assert entries[1].structure.info == {}
    assert "id 3: conflicting energy: energy of the row and energy in data" in entries[2].problem
    assert entries[3].structure.energy is None
    assert "free_energy (row)" in entries[3].not_kept


def test_named_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.aselmdb", [row(data={"corrected": -3.0}), row()])
    keys = LabelKeys(energy="corrected")
    assert open_dataset(path, keys=keys)[0].energy == -3.0
    assert "id 2: corrected is missing" in error_of(path, 1, keys=keys)


DEEP = tagged(row())[:-1] + b', "data": {"a": ' + b"[" * 1010 + b"]" * 1010 + b"}}"
LYING = {"a": {"__ndarray__": [[5], "int64", [1]]}}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no zlib": (b"{}", "damaged"),
    "cut": (zlib.compress(tagged(row()))[:-40], "ends early"),
    "no json": (zlib.compress(b'{"numbers": [1'), "no JSON"),
    "a list": (zlib.compress(b"[1]"), "is a JSON list"),
    "empty": (b"", "ends early"),
    "nan": (row(energy=float("nan")), "energy holds NaN"),
    "infinite force": (row(forces=np.full((N, 3), np.inf)), "forces holds Infinity"),
    "null energy": (row(energy=None), "energy is null"),
    "null force": (zlib.compress(nested(row(forces=np.full((N, 3), np.nan)))), r"forces\[0, 0\]"),
    "short forces": (row(forces=np.zeros((N - 1, 3))), r"forces has shape \(3, 3\)"),
    "turned forces": (row(forces=np.zeros((3, N))), r"forces has shape \(3, 4\), expected"),
    "stress of 5": (row(stress=np.zeros(5)), r"stress has shape \(5,\)"),
    "no positions": (row(positions=...), "positions is missing"),
    "no atoms": (row(numbers=np.zeros(0, int), positions=np.zeros((0, 3))), "no atoms"),
    "element 0": (row(numbers=np.array([1, 1, 0, 1])), "atomic number 0"),
    "half an element": (row(numbers=np.array([1, 1.5, 1, 1])), "whole numbers"),
    "flat cell": (row(cell=np.zeros((3, 3))), "no volume"),
    "text": (row(positions=[["a", "b", "c"]] * N), "positions holds text"),
    "ragged": (row(positions=[[1, 2, 3], [1, 2]]), "positions does not hold numbers"),
    "lying shape": (row(positions={"__ndarray__": [[10**9, 3], "float64", [0.0]]}), "positions"),
    "no shape": (row(positions={"__ndarray__": [4, "float64", [0.0]]}), "positions is no array"),
    "atom 4 fixed": (row(constraints=[{"name": "FixAtoms", "kwargs": {"indices": [4]}}]), "atom 4"),
    "data is text": (row(data="x"), "data is a JSON str"),
    "big array in data": (row(data=LYING), "claims the shape"),
    "deep": (zlib.compress(DEEP), "nested too deeply|no JSON"),
    "bomb": (zlib.compress(b" " * (MAX_ROW_BYTES + 1)), "inflates to more than 64 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_costs_only_itself(tmp_path: Path, case: str) -> None:
    content, message = BAD_ROWS[case]
    path = write(tmp_path / "a.aselmdb", [row(0), content, row(2)])
    data = open_dataset(path)
    assert [len(data[0]), len(data[2])] == [N, N]
    with pytest.raises(DataError, match=message) as caught:
        data[1]
    assert str(caught.value).startswith(f"{path} id 2: ")
    problems = [entry.problem for entry in iterate_file(path)]
    assert [problem is None for problem in problems] == [True, False, True]
    assert problems[1] == str(caught.value)


COUNTERS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"nextid": None}, "nextid is missing"),
    "too big": ({"nextid": 9}, "nextid is 9, which promises 8 rows; 4 rows are there"),
    "too small": ({"nextid": 3}, "nextid is 3, which promises 2 rows; 4 rows are there"),
    "huge": ({"nextid": 10**17}, "nextid is 100000000000000000"),
    "text": ({"nextid": "5"}, "nextid is '5'"),
    "deleted but there": ({"deleted_ids": [77]}, ""),
    "no list": ({"deleted_ids": 7}, "deleted_ids is no list"),
}


@pytest.mark.parametrize("case", COUNTERS)
def test_wrong_counters_are_reported(tmp_path: Path, case: str) -> None:
    reserved, message = COUNTERS[case]
    path = write(tmp_path / "a.aselmdb", [row(i) for i in range(4)], **reserved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = open_dataset(path)
    assert [s.energy for s in data] == [row(i)["energy"] for i in range(4)]
    if message:
        assert message in data.facts.problems[0]
        assert data.facts.problems[0].startswith(str(path))
        assert [w.category for w in caught] == [DataWarning]
    else:
        assert (data.facts.problems, caught) == ((), [])


def test_gaps_deletions_and_foreign_keys(tmp_path: Path) -> None:
    rows = [row(i) for i in range(12)]
    path = write(tmp_path / "a.aselmdb", rows, deleted_ids=[2, 12])
    change(path, lambda t: [t.delete(b"2"), t.delete(b"12")])
    data = open_dataset(path)
    expected = [rows[i]["energy"] for i in range(12) if i not in {1, 11}]
    assert data.facts.problems == ()
    assert [s.energy for s in data] == expected
    assert data.name(-1) == f"{path} id 11"

    change(path, lambda t: [t.delete(b"5"), t.put(b"notes", b"x"), t.put(b"007", b"x")])
    with pytest.warns(DataWarning):
        data = open_dataset(path)
    del expected[3]
    assert [s.energy for s in data] == expected
    text = "\n".join(data.facts.problems)
    assert "2 keys are no rows: b'007', b'notes'" in text
    assert "nextid is 13, which promises 10 rows; 9 rows are there (last id 11)" in text


def test_row_that_is_listed_as_deleted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.aselmdb", [row(i) for i in range(3)], deleted_ids=[2])
    with pytest.warns(DataWarning, match="1 rows are there but listed as deleted"):
        assert [s.energy for s in open_dataset(path)] == [row(0)["energy"], row(2)["energy"]]


def test_recognised_by_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", [row()], nextid=None)
    assert is_aselmdb(path)
    assert "ASE LMDB" in find_reader(path).name
    other = tmp_path / "b.lmdb"
    change(other, lambda t: t.put(b"1", b"\x80\x04N."))
    assert not is_aselmdb(other)
    empty = write(tmp_path / "c.aselmdb", [])
    with pytest.raises(DataError, match=r"c\.aselmdb: there are no structures"):
        open_dataset(empty)
    (tmp_path / "d.aselmdb").write_bytes(b"no database at all" * 1000)
    with pytest.raises(DataError, match=r"d\.aselmdb.*no LMDB file"):
        open_dataset(tmp_path / "d.aselmdb")


def test_fork_pickle_and_fingerprint(
    tmp_path: Path, in_child: Callable[[Callable[[], Any]], tuple[str, Any]]
) -> None:
    path = write(tmp_path / "a.aselmdb", [row(i) for i in range(3)])
    data = open_dataset(path)
    energies = [s.energy for s in data]
    assert in_child(lambda: [s.energy for s in data]) == ("ok", energies)
    copy = pickle.loads(pickle.dumps(data))
    assert [s.energy for s in copy] == energies
    before = data.fingerprint()
    assert copy.fingerprint() == open_dataset(path).fingerprint() == before
    change(path, lambda t: t.put(b"2", zlib.compress(tagged(row(9)))))
    assert open_dataset(path).fingerprint() != before


def test_written_files_read_back(
    tmp_path: Path, emt_frames: list[Atoms], assert_identical: Callable[..., None]
) -> None:
    structures = [Structure.from_atoms(atoms) for atoms in emt_frames]
    extra = Structure(
        [1, 8], [[0, 0, 0], [0, 0, 1]], charge=-1.0, spin=2.0, info={"big": 2**70, "sid": 5}
    )
    path = tmp_path / "a.aselmdb"
    with AseLmdbWriter(path, {"source": "test"}) as writer:
        for structure in [*structures, extra]:
            writer.append(structure)
        assert len(writer) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["a.aselmdb"]
    data = open_dataset(path)
    assert data.metadata == {"source": "test"}
    assert data.facts.problems == ()
    for found, expected in zip(data, structures, strict=False):
        assert_identical(found, expected)
    assert data[-1].info["sid"] == 5
    assert (data[-1].charge, data[-1].spin) == (-1.0, 2.0)
    assert data.raw(-1)["data"]["spin"] == 2


def test_written_files_are_read_by_ase(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    """The reader of ase-db-backends, which fairchem uses, gives the same numbers."""
    pytest.importorskip("ase_db_backends", reason="ase-db-backends is not installed")
    import ase.db

    path = tmp_path / "a.aselmdb"
    with AseLmdbWriter(path, {"source": "test"}) as writer:
        for atoms in emt_frames:
            writer.append(Structure.from_atoms(atoms))
    with ase.db.connect(path, type="aselmdb", readonly=True, use_lock_file=False) as database:
        assert database.metadata == {"source": "test"}
        rows = list(database.select())
    assert [r.id for r in rows] == [1, 2, 3, 4, 5, 6]
    assert len({r.unique_id for r in rows}) == 6
    for found, atoms in zip((r.toatoms() for r in rows), emt_frames, strict=True):
        assert (found.positions == atoms.positions).all()
        assert (found.numbers == atoms.numbers).all()
        assert (found.cell.array == atoms.cell.array).all()
        assert (found.pbc == atoms.pbc).all()
        assert (found.get_tags() == atoms.get_tags()).all()
        assert found.calc.results.keys() == atoms.calc.results.keys()
        for name, value in atoms.calc.results.items():
            assert np.array_equal(found.calc.results[name], value), name
        fixed = [c.index.tolist() for c in atoms.constraints]
        assert [c.index.tolist() for c in found.constraints] == fixed
    assert rows[0].data["config_type"] == "group0"


def test_writing_goes_on_after_a_kill(tmp_path: Path, random_structure: Callable[..., Any]) -> None:
    path = tmp_path / "a.aselmdb"
    writer = AseLmdbWriter(path, {"source": "x"})
    for i in range(3):
        writer.append(random_structure(i), {"done": i + 1})
    writer.flush()
    writer.append(random_structure(3), {"done": 4})
    writer.abort(keep_partial=True)  # what was not committed is lost, as after a kill
    with pytest.raises(DataError, match="--resume"):
        AseLmdbWriter(path)
    with AseLmdbWriter(path, resume=True) as writer:
        assert (len(writer), writer.progress) == (3, {"done": 3})
        for i in range(3, 6):
            writer.append(random_structure(i))
    data = open_dataset(path)
    assert [s.info["number"] for s in data] == list(range(6))
    assert data.facts.problems == ()  # no key of ours is left
    assert data.metadata == {"source": "x"}


def test_label_in_info_is_not_written() -> None:
    with pytest.raises(DataError, match="info holds energy"):
        AseLmdbWriter.encode(Structure([1], [[0, 0, 0]], info={"energy": 1.0}))


SAMPLES = ("edited", "mptrj_json", "omat_fc2", "omat_orjson", "omol")


@pytest.mark.filterwarnings("ignore::mlip.errors.DataWarning")
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_match_what_is_known_of_them(shared: Path, name: str) -> None:
    expected = json.loads((shared / "samples" / "expected.json").read_text())[name]
    data = open_dataset([shared / "samples" / file for file in expected["files"]])
    structures = list(data)
    assert len(data) == expected["structures"]
    assert data.n_atoms().sum() == expected["natoms_total"]
    assert sum(int(s.numbers.sum()) for s in structures) == expected["numbers_sum"]
    energies = [s.energy for s in structures if s.energy is not None]
    assert len(energies) == expected["energies"]
    assert sum(energies) == pytest.approx(expected["energy_sum"], abs=1e-9)
    squares = sum((s.forces**2).sum() for s in structures if s.forces is not None)
    assert squares == pytest.approx(expected["force_sumsq"], rel=1e-12)
    stresses = [s.stress for s in structures if s.stress is not None]
    assert len(stresses) == expected.get("stressed", len(stresses))
    if stresses and len(expected["stress_first"]) == 9:
        assert stresses[0].ravel().tolist() == expected["stress_first"]
    elif stresses:
        voigt = stresses[0][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        assert voigt.tolist() == expected["stress_first"]
    tags = sum(int(s.tags.sum()) for s in structures if s.tags is not None)
    fixed = sum(int(s.fixed.sum()) for s in structures if s.fixed is not None)
    assert (tags, fixed) == (expected["tags_sum"], expected["fixed_sum"])
    assert data[0].info.get("sid") == expected.get("first_sid")
    for label in ("charge", "spin"):
        if label in expected:
            assert [getattr(s, label) for s in structures] == expected[label]


BAD_SAMPLES = {
    "ase_bad_zlib": "id 3: the compressed row",
    "ase_bad_json": "id 2: the row is no JSON",
    "ase_nan_energy": "id 1: energy holds NaN",
    "ase_forces_short": "id 4: forces has shape",
    "ase_forces_3xN": "id 4: forces has shape",
    "ase_zero_atoms": "id 1: there are no atoms",
    "ase_zip_bomb": "id 1: the row inflates",
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples(shared: Path, name: str) -> None:
    data = open_dataset(shared / "samples" / "bad" / name)
    errors = []
    for i in range(len(data)):
        try:
            data[i]
        except DataError as error:
            errors.append(str(error))
    assert len(data) == 6
    assert len(errors) == 1
    assert BAD_SAMPLES[name] in errors[0]
