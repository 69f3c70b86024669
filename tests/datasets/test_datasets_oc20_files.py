"""OC20 LMDB files: keys and lengths, what is recognised, processes and fingerprints."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from mlip.datasets.formats.oc20 import is_oc20, open_oc20
from mlip.datasets.lmdb_reader import LmdbReader
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import find_reader, iterate_file
from mlip.errors import DataError
from tests.datasets.oc20_entries import entry, opened, write

InChild = Callable[[Callable[[], Any]], tuple[str, Any]]


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


def test_large_files_open_without_a_look_at_all_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 30_000
    value = pickle.dumps(entry(), 4)
    path = write(tmp_path / "a.lmdb", dict.fromkeys(range(n), value), n)
    pages: list[int] = []
    read = LmdbReader._read

    def counted(file: LmdbReader, number: int, size: int) -> bytes:
        pages.append(number)
        return read(file, number, size)

    with monkeypatch.context() as patch:
        patch.setattr(LmdbReader, "_read", counted)
        dataset = open_oc20(path, ReadOptions())
    assert 64 < len(set(pages)) < 150  # of some 325 with keys and 30,000 with values
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
