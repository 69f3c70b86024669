"""Bad entries: raised, skipped, or skipped and listed; never lost without a word."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest

from mlip.datasets.collection import open_dataset
from mlip.datasets.policy import BadEntries
from mlip.errors import DataError, DataWarning, InputError


def shard(path: Path, energies: list[float]) -> Path:
    """Rows of one to five atoms; an energy of NaN makes a bad row."""
    opened = lmdb.open(str(path), subdir=False, lock=False, map_size=2**24)
    with opened as environment, environment.begin(write=True) as transaction:
        for i, energy in enumerate(energies):
            n = 1 + i % 5
            row = {"numbers": [1] * n, "positions": np.eye(n, 3).tolist(), "energy": energy}
            transaction.put(b"%d" % (i + 1), zlib.compress(json.dumps(row).encode()))
        transaction.put(b"nextid", zlib.compress(b"%d" % (len(energies) + 1)))
    return path


def text(path: Path, energies: list[float]) -> Path:
    path.write_text(
        "".join(f"1\nProperties=species:S:1:pos:R:3 energy={e}\nH 0 0 0\n" for e in energies)
    )
    return path


NAN = float("nan")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        shard(tmp_path / "a.aselmdb", [0, 1, NAN, 3, 4, NAN]),
        text(tmp_path / "b.xyz", [10, NAN, 12]),
        shard(tmp_path / "c.aselmdb", [20, 21]),
    ]


def test_raise(files: list[Path]) -> None:
    """Entries that are read one by one raise when read; files that are read whole, at once."""
    with pytest.raises(DataError, match=r"b\.xyz frame 1: energy .* is nan.*policy='skip'"):
        open_dataset(files)
    data = open_dataset([files[0], files[2]])
    assert len(data) == 8
    assert data.facts.problems == ()
    assert data[3].energy == 3
    with pytest.raises(DataError, match=r"a\.aselmdb id 3: energy holds NaN"):
        data[2]


def test_skip(files: list[Path]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = open_dataset(files, policy="skip")
    assert [s.energy for s in data] == [0, 1, 3, 4, 10, 12, 20, 21]
    assert data.n_atoms().tolist() == [len(s) for s in data] == [1, 2, 4, 5, 1, 1, 1, 2]
    assert data.name(2) == f"{files[0]} id 4"
    assert len(data.facts.problems) == 1
    problem = data.facts.problems[0]
    assert problem.startswith("3 of 11 entries were dropped: ")
    for name in ("b.xyz frame 1: energy", "a.aselmdb id 3: energy", "a.aselmdb id 6: energy"):
        assert name in problem
    assert [(w.category, w.filename) for w in caught] == [(DataWarning, __file__)]
    assert str(caught[0].message) == problem


def test_quarantine(files: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "lists" / "bad.tsv"
    with pytest.warns(DataWarning, match=rf"all are listed in {table}"):
        data = open_dataset(files, policy="quarantine", quarantine=table)
    assert len(data) == 8
    lines = [line.split("\t") for line in table.read_text().splitlines()]
    assert lines[0] == ["file", "entry", "reason"]
    assert {tuple(line[:2]) for line in lines[1:]} == {
        (str(files[0]), "id 3"),
        (str(files[0]), "id 6"),
        (str(files[1]), "frame 1"),
    }
    assert all("energy" in line[2] for line in lines[1:])
    assert [p.name for p in table.parent.iterdir()] == ["bad.tsv"]


def test_nothing_bad(files: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "bad.tsv"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_dataset(files[2], policy="quarantine", quarantine=table)
    assert len(data) == 2
    assert table.read_text() == "file\tentry\treason\n"


def test_nothing_good(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.aselmdb", [NAN, NAN])
    with pytest.raises(DataError, match=r"nothing is left of the data: 2 of 2 entries"):
        open_dataset(path, policy="skip")
    path = text(tmp_path / "a.xyz", [NAN])
    with pytest.raises(DataError, match=r"nothing is left of the data: 1 of 1 entries"):
        open_dataset(path, policy="skip")


def test_all_problems_are_in_one_warning(tmp_path: Path) -> None:
    for i in range(13):
        shard(tmp_path / f"{i:02}.aselmdb", [1.0, 2.0])
        opened = lmdb.open(str(tmp_path / f"{i:02}.aselmdb"), subdir=False, lock=False)
        with opened as environment, environment.begin(write=True) as transaction:
            transaction.delete(b"nextid")
    with pytest.warns(DataWarning) as caught:
        data = open_dataset(tmp_path)
    assert len(data.facts.problems) == 13
    assert len(caught) == 1
    lines = str(caught[0].message).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 3 more"


def test_choices_are_checked(tmp_path: Path) -> None:
    for policy, path, message in [
        ("ignore", None, "policy is 'ignore', expected raise, skip, quarantine"),
        ("quarantine", None, "name a file for the list"),
        ("skip", tmp_path / "bad.tsv", "name a file for the list"),
    ]:
        with pytest.raises(InputError, match=message):
            BadEntries(policy, path)


def test_names_with_blanks_and_reasons_with_breaks(tmp_path: Path) -> None:
    bad = BadEntries("quarantine", tmp_path / "bad.tsv")
    bad.add("/a b/c d.lmdb entry 7", "/a b/c d.lmdb entry 7: forces\thas\nshape 2")
    bad.add("x.xyz frame 1", DataError("energy is nan"))
    bad.save()
    assert (tmp_path / "bad.tsv").read_text().splitlines()[1:] == [
        "/a b/c d.lmdb\tentry 7\tforces has shape 2",
        "x.xyz\tframe 1\tenergy is nan",
    ]
    assert bad.summary(9)[0].startswith("2 of 9 entries were dropped")


def test_samples(shared: Path) -> None:
    for name in ("ase_bad_zlib", "ase_bad_json", "ase_forces_short", "ase_zip_bomb"):
        with pytest.warns(DataWarning, match="1 of 6 entries were dropped"):
            data = open_dataset(shared / "samples" / "bad" / name, policy="skip")
        assert len(data) == len(list(data)) == 5
