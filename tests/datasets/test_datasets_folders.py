"""Folders, lists and patterns stand for the right files; size tables are used only if they fit."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip.datasets.collection import open_dataset
from mlip.datasets.formats.aselmdb import AseLmdbDataset
from mlip.datasets.formats.aselmdb_write import AseLmdbWriter
from mlip.datasets.read import expand
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, DataWarning


def shard(path: Path, sizes: list[int], first: int = 0) -> Path:
    """Structures of the given sizes; energies count up from ``first``."""
    writer = AseLmdbWriter(path) if path.suffix == ".aselmdb" else StructureWriter(path)
    with writer:
        for i, n in enumerate(sizes, start=first):
            writer.append(Structure(np.ones(n, int), np.arange(3.0 * n).reshape(n, 3), energy=i))
    return path


def extxyz(path: Path, energies: list[float]) -> Path:
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"1\nenergy={e}\nH 0 0 0\n" for e in energies)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def names(paths: Any) -> list[str]:
    return [path.name for path in expand(paths)]


def test_shards_by_name_and_nothing_else(tmp_path: Path) -> None:
    for i, name in enumerate(("data.10", "data.2", "data.0")):
        shard(tmp_path / f"{name}.aselmdb", [1], i)
    strays = "data.0.aselmdb-lock data.0.log data.0.failed notes.txt a.traj b.extxyz c.db d.json"
    for stray in (*strays.split(), ".data.5.aselmdb", "e.aselmdb.partial"):
        (tmp_path / stray).write_text("x")
    expected = ["data.0.aselmdb", "data.10.aselmdb", "data.2.aselmdb"]
    assert names(tmp_path) == names(str(tmp_path)) == names(tmp_path / "*.aselmdb") == expected
    assert [s.energy for s in open_dataset(tmp_path)] == [2, 0, 1]


KINDS = {
    "text": (["b.xyz", "a.extxyz", "c.extxyz.gz"], ["a.extxyz", "b.xyz", "c.extxyz.gz"]),
    "text and its copy": (["a.extxyz", "a.extxyz.gz", "b.extxyz.gz"], ["a.extxyz", "b.extxyz.gz"]),
    "text and json": (["a.extxyz", "systems.json"], ["a.extxyz"]),
    "trajectories": (["b.traj", "a.traj", "x.log"], ["a.traj", "b.traj"]),
    "databases": (["a.db", "a.db.lock"], ["a.db"]),
    "json": (["a.json"], ["a.json"]),
    "raw": (["0.xyz.xz", "0.txt.xz", "1.xyz.xz", "1.txt.xz"], ["0.xyz.xz", "1.xyz.xz"]),
    "vasp xml": (["INCAR", "OUTCAR", "vasprun.xml"], ["vasprun.xml"]),
    "vasp text": (["INCAR", "OUTCAR.gz"], ["OUTCAR.gz"]),
}


@pytest.mark.parametrize("case", KINDS)
def test_kind_of_a_folder(tmp_path: Path, case: str) -> None:
    present, expected = KINDS[case]
    for name in present:
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == expected


def test_folders_that_are_refused(tmp_path: Path) -> None:
    def refused(make: Callable[[Path], Any], message: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder)
        with pytest.raises(DataError, match=message) as caught:
            expand(folder)
        assert str(folder) in str(caught.value)

    refused(lambda f: f.exists(), "no data files in this folder; it is empty")
    refused(lambda f: (f / "README").touch(), "it holds README")
    refused(
        lambda f: [shard(f / "a.aselmdb", [1]), shard(f / "b.lmdb", [1])],
        r"several kinds of data \(a.aselmdb and b.lmdb\): name the files",
    )
    refused(
        lambda f: [(f / n).touch() for n in ("a.xyz", "b.traj")],
        r"several kinds of data \(a.xyz and b.traj\)",
    )
    refused(
        lambda f: [shard(f / "a.lmdb", [1]), shard(f / "b.aselmdb", [1]).rename(f / "b.lmdb")],
        r"two kinds of LMDB: a.lmdb \(mlip store .*\) and b.lmdb \(ASE LMDB",
    )
    refused(
        lambda f: [(f / n).touch() for n in ("0.extxyz", "0.txt", "1.extxyz")],
        r"1.extxyz has no .txt with its reference energies, 0.extxyz has",
    )
    refused(
        lambda f: [(f / "sub").mkdir(), shard(f / "sub" / "a.aselmdb", [1])],
        r"its subfolders have some: name them as '.*/\*/\*\.aselmdb'",
    )


def test_lists_patterns_home_and_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = extxyz(tmp_path / "one" / "a.xyz", [1]), extxyz(tmp_path / "two" / "b.xyz", [2])
    (tmp_path / "one" / "a.xyz-lock").touch()
    assert expand([b, tmp_path / "one"]) == [b, a]
    assert expand(tmp_path / "*") == [a, b]
    assert expand(tmp_path / "**") == [a, b]
    assert expand(tmp_path / "one" / "*") == [a]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/one/a.xyz") == [a]
    monkeypatch.chdir(tmp_path)
    for twice in ([a, "one/a.xyz"], [a, tmp_path / "one"], [a, tmp_path / "*"]):
        with pytest.raises(DataError, match=r"a\.xyz is given twice"):
            expand(twice)
    os.symlink(a, tmp_path / "link.xyz")
    with pytest.raises(DataError, match=r"link\.xyz is given twice"):
        expand([a, tmp_path / "link.xyz"])
    with pytest.raises(DataError, match="no data files were given"):
        expand([])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 40 and 30 structures of 1 to 9 atoms."""
    (tmp_path / "set").mkdir()
    shard(tmp_path / "set" / "a.aselmdb", [1 + i % 9 for i in range(40)])
    shard(tmp_path / "set" / "b.aselmdb", [1 + i % 5 for i in range(30)])
    return tmp_path / "set"


SIZES = np.array([1 + i % 9 for i in range(40)] + [1 + i % 5 for i in range(30)])


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Counting atoms by reading rows is an error."""

    def fail(dataset: AseLmdbDataset) -> None:
        raise AssertionError(f"the rows of {dataset.path} were read")

    monkeypatch.setattr(AseLmdbDataset, "n_atoms", fail)
    return


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", ">i4"])
def test_fitting_size_table_is_used(folder: Path, dtype: str) -> None:
    np.savez_compressed(folder / "metadata.npz", natoms=SIZES.astype(dtype), data_ids=["x"] * 70)
    for paths in (folder, folder / "*.aselmdb", sorted(folder.glob("*.aselmdb"))):
        data = open_dataset(paths)
        assert data.n_atoms().tolist() == SIZES.tolist()
        assert data.n_atoms().dtype == np.int64
        assert data.facts.problems == ()
    assert [len(s) for s in data] == SIZES.tolist()


def test_table_is_not_used_for_a_part_of_the_folder(folder: Path) -> None:
    np.savez(folder / "metadata.npz", natoms=SIZES)
    data = open_dataset(folder / "b.aselmdb")
    assert data.n_atoms().tolist() == SIZES[40:].tolist()
    assert data.facts.problems == ()
    turned = open_dataset([folder / "b.aselmdb", folder / "a.aselmdb"])
    assert turned.n_atoms().tolist() == [*SIZES[40:], *SIZES[:40]]


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def saved(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<i8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


UNUSABLE = {
    "one too many": (saved(natoms=[*SIZES, 1]), "natoms has 71 entries, the data 70"),
    "edge counts": (saved(natoms=SIZES * 40), r"row 0: 40 vs 1 atoms \(edge counts"),
    "another order": (saved(natoms=SIZES[::-1]), r"row \d+: \d vs \d atoms .*another order"),
    "no natoms": (saved(other=SIZES), "there is no natoms, only other"),
    "floats": (saved(natoms=SIZES * 1.0), "natoms is float64"),
    "two axes": (saved(natoms=SIZES[:, None]), r"shape \(70, 1\)"),
    "no zip": (b"what is this", "cannot be read"),
    "no array": (zipped(natoms=b"text"), "natoms.npy is no numpy array"),
    "huge": (zipped(natoms=header("(10**12,)")), "natoms.npy is no numpy array"),
    "odd header": (zipped(natoms=header("((((")), "natoms.npy is no numpy array"),
    "a lot": (zipped(natoms=header("(100000000000,)")), "natoms has 100000000000 entries"),
    "cut": (zipped(natoms=header("(70,)") + b"\x01" * 100), "natoms is cut short"),
    "damaged": (saved(natoms=SIZES).replace(b"\x05\0\0\0", b"\x06\0\0\0"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_size_table_that_does_not_fit_is_reported(folder: Path, case: str) -> None:
    content, message = UNUSABLE[case]
    (folder / "metadata.npz").write_bytes(content)
    with pytest.warns(DataWarning, match=message) as caught:
        data = open_dataset(folder)
    assert len(caught) == 1
    assert len(data.facts.problems) == 1
    assert str(folder / "metadata.npz") in data.facts.problems[0]
    assert data.n_atoms().tolist() == SIZES.tolist()


class Hostile:
    """Makes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["natoms", "extra"])
def test_python_objects_in_the_size_table_are_refused(folder: Path, name: str) -> None:
    marker = folder / "ran"
    arrays = {"natoms": SIZES, name: np.array([Hostile(marker)] * 70, dtype=object)}
    np.savez(folder / "metadata.npz", **arrays)
    with pytest.raises(DataError, match=rf"metadata\.npz: {name}\.npy holds Python objects"):
        open_dataset(folder)
    (folder / "metadata.npz").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.warns(DataWarning, match="cannot be read"):
        open_dataset(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ase_metadata_mismatch", "natoms has 7 entries, the data 6"),
        ("ase_metadata_edges_as_natoms", r"row 0: 613 vs 16 atoms \(edge counts"),
    ],
)
def test_bad_samples(shared: Path, name: str, message: str) -> None:
    folder = shared / "samples" / "bad" / name
    with pytest.warns(DataWarning, match=message):
        data = open_dataset(folder)
    assert data.n_atoms().tolist() == [len(s) for s in data]


def test_hostile_sample(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="holds Python objects"):
        open_dataset(shared / "samples" / "bad" / "ase_metadata_pickle")
    assert list(tmp_path.iterdir()) == []


def test_sample_folders(shared: Path) -> None:
    samples = shared / "samples"
    expected = json.loads((samples / "expected.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("omat_fc2", "omat_orjson", "omol", "edited"):
            data = open_dataset(samples / name)
            assert len(data) == expected[name]["structures"]
            assert data.n_atoms().sum() == expected[name]["natoms_total"]
            files = [f"{name}/{path.name}" for path in expand(samples / name)]
            assert files == list(expected[name]["files"])
    assert [p.name for p in expand(samples / "oc20_raw")] == ["0.extxyz", "1.extxyz"]
