"""The store: exact, durable across kill -9, honest about damage, safe in workers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader

from mlip.datasets import writer as store_module
from mlip.datasets.lmdb_file import check_lmdb_file
from mlip.datasets.read import find_reader
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, MlipError
from mlip.graph import neighbor_list

Make = Callable[[int], Structure]
InChild = Callable[[Callable[[], Any]], tuple[str, Any]]


def write(path: Path, make: Make, count: int, **options: Any) -> Path:
    with StructureWriter(path, {"theory": "none"}, **options) as writer:
        for i in range(count):
            writer.append(make(i))
    return path


@pytest.fixture
def filled(tmp_path: Path, random_structure: Make) -> Path:
    return write(tmp_path / "data.lmdb", random_structure, 40)


def test_entries_come_back_bit_by_bit(
    filled: Path, random_structure: Make, assert_identical: Callable[..., None]
) -> None:
    store = StructureStore(filled)
    assert len(store) == 40
    assert store.metadata["user"] == {"theory": "none"}
    for i, structure in enumerate(store):
        assert_identical(structure, random_structure(i))
    assert_identical(store[-1], random_structure(39))
    assert [s.info["number"] for s in store[5:9:2]] == [5, 7]
    assert store.n_atoms().tolist() == [len(random_structure(i)) for i in range(40)]
    assert os.listdir(filled.parent) == ["data.lmdb"]
    for outside in (40, -41):
        with pytest.raises(IndexError, match="40 entries"):
            store[outside]


def test_many_batches_and_a_growing_map(
    tmp_path: Path, random_structure: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FIRST_MAP_SIZE", 32 * 1024)
    monkeypatch.setattr(store_module, "BATCH_ENTRIES", 17)
    path = write(tmp_path / "a.lmdb", random_structure, 300)
    assert path.stat().st_size > 10 * 32 * 1024
    assert [s.info["number"] for s in StructureStore(path)] == list(range(300))


def test_a_store_is_never_taken_for_pickles(tmp_path: Path) -> None:
    """The first byte of an entry is that of the length of its header, which may be 0x80."""
    for n, length in itertools.product((1, 10, 100, 1000), (1, 10, 100, 1000)):
        info = {"x": "y" * length}
        structure = Structure(np.full(n, 29), np.full((n, 3), 0.1), energy=1.0, info=info)
        if StructureWriter.encode(structure)[0] == 0x80:
            break
    else:
        pytest.fail("no such header: make other structures")
    write(tmp_path / "a.lmdb", lambda _: structure, 3)
    assert find_reader(tmp_path / "a.lmdb").name == "mlip store (.lmdb)"


def test_an_empty_store_is_possible(tmp_path: Path, random_structure: Make) -> None:
    store = StructureStore(write(tmp_path / "a.lmdb", random_structure, 0))
    assert len(store) == 0
    assert store.n_atoms().shape == (0,)


def test_nothing_has_the_final_name_before_the_end(tmp_path: Path, random_structure: Make) -> None:
    path = tmp_path / "a.lmdb"

    def fail_in_the_middle(error: BaseException, **options: Any) -> None:
        with StructureWriter(path, **options) as writer:
            writer.append(random_structure(0))
            writer.flush()
            assert not path.exists()
            raise error

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle(ZeroDivisionError())
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        fail_in_the_middle(KeyboardInterrupt())
    assert os.listdir(tmp_path) == ["a.lmdb.partial"]
    with pytest.raises(DataError, match=r"unfinished.*--resume"):
        StructureStore(tmp_path / "a.lmdb.partial")
    with pytest.raises(DataError, match=r"left from an interrupted run.*--resume.*--overwrite"):
        StructureWriter(path)
    assert len(StructureStore(write(path, random_structure, 3, overwrite=True))) == 3
    with pytest.raises(DataError, match="exists"):
        StructureWriter(path)
    assert os.listdir(tmp_path) == ["a.lmdb"]


def test_two_writers_cannot_mix(tmp_path: Path, random_structure: Make, in_child: InChild) -> None:
    with StructureWriter(tmp_path / "a.lmdb", overwrite=True) as writer:
        writer.append(random_structure(0))
        writer.flush()
        for options in ({"resume": True}, {"overwrite": True}):
            kind, text = in_child(lambda o=options: StructureWriter(tmp_path / "a.lmdb", **o))
            assert (kind, "written by another process" in text) == ("error", True)
    assert len(StructureStore(tmp_path / "a.lmdb")) == 1


def append_the_rest(path: Path, make: Make, count: int) -> None:
    with StructureWriter(path, resume=True) as writer:
        assert writer.progress.get("next", 0) == len(writer)
        for i in range(len(writer), count):
            writer.append(make(i), {"next": i + 1})


def test_kill_9_loses_repeats_and_tears_nothing(
    tmp_path: Path,
    random_structure: Make,
    assert_identical: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "BATCH_ENTRIES", 8)
    monkeypatch.setattr(store_module, "FIRST_MAP_SIZE", 64 * 1024)
    path, count, kills = tmp_path / "a.lmdb", 5000, 0
    random = np.random.default_rng(0)
    for _ in range(25):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=append_the_rest, args=(path, random_structure, count))
        process.start()
        process.join(random.uniform(0.0, 0.06))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in {0, -signal.SIGKILL}
    assert kills >= 15
    assert not path.exists()
    append_the_rest(path, random_structure, count)
    store = StructureStore(path)
    assert len(store) == count
    for i, structure in enumerate(store):
        assert_identical(structure, random_structure(i))


def limited_write(path: Path, make: Make) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    write(path, make, 500)


def test_full_disk_is_one_clear_error(
    tmp_path: Path, random_structure: Make, in_child: InChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the file size makes writes fail in the middle, as a full disk does."""
    monkeypatch.setattr(store_module, "BATCH_ENTRIES", 20)
    path = tmp_path / "a.lmdb"
    kind, text = in_child(lambda: limited_write(path, random_structure))
    assert kind == "error"
    assert text.startswith(f"MlipError: cannot write {path}: ")
    assert "free space" in text
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MlipError, match="cannot write"):
        StructureWriter(tmp_path / "file" / "a.lmdb")


def read_all(path: Path) -> list[int]:
    return [s.info["number"] for s in StructureStore(path)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.3, 0.5, 0.9, 0.999])
def test_truncated_file_is_an_error_and_no_crash(
    filled: Path, in_child: InChild, share: float
) -> None:
    content = filled.read_bytes()
    filled.write_bytes(content[: int(share * len(content))])
    kind, text = in_child(lambda: read_all(filled))
    assert (kind, text.split(":")[0]) == ("error", "DataError")
    reason = text.partition(f"{filled}: ")[2]
    assert any(word in reason for word in ("truncated", "empty", "no LMDB file"))


def test_file_truncated_while_closed_is_noticed(filled: Path, in_child: InChild) -> None:
    store = StructureStore(filled)
    os.truncate(filled, filled.stat().st_size // 2)
    kind, text = in_child(lambda: [s.info for s in store])
    assert (kind, "the file is truncated" in text) == ("error", True)


def test_damaged_entry_is_named_and_the_others_stay_readable(filled: Path) -> None:
    marker = np.float64(StructureStore(filled)[11].energy).tobytes()
    content = filled.read_bytes()
    assert content.count(marker) == 1
    filled.write_bytes(content.replace(marker, b"\0" * 8))
    store = StructureStore(filled)
    with pytest.raises(DataError, match=r"data.lmdb: entry 11: .*damaged"):
        store[11]
    assert [store[i].info["number"] for i in (10, 12)] == [10, 12]


def test_zeroed_pages_never_crash(filled: Path, in_child: InChild) -> None:
    content = filled.read_bytes()
    for page in range(2, len(content) // 4096, 5):
        broken = bytearray(content)
        broken[page * 4096 : (page + 1) * 4096] = bytes(4096)
        filled.write_bytes(broken)
        kind, text = in_child(lambda: read_all(filled))
        assert kind == "ok" or (kind == "error" and text.startswith("DataError")), (page, text)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.lmdb"
    text.write_bytes(b"hello " * 10_000)
    with pytest.raises(DataError, match=r"text.lmdb: this is no LMDB file"):
        StructureStore(text)
    other = tmp_path / "other.lmdb"
    with lmdb.open(str(other), subdir=False) as environment, environment.begin(write=True) as t:
        t.put(b"0", b"x")
    with pytest.raises(DataError, match=r"other.lmdb: an LMDB file, but no store of this package"):
        StructureStore(other)
    with pytest.raises(DataError, match="no such file"):
        StructureStore(tmp_path / "missing.lmdb")


def change_metadata(path: Path, **changes: Any) -> None:
    with (
        lmdb.open(str(path), subdir=False, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        metadata = json.loads(transaction.get(b"#metadata")) | changes
        transaction.put(b"#metadata", json.dumps(metadata).encode())


def test_newer_version_asks_for_an_upgrade(filled: Path) -> None:
    change_metadata(filled, version=2, written_by="mlip 9.0")
    with pytest.raises(DataError, match=r"version 2, written by mlip 9.0.*upgrade"):
        StructureStore(filled)


def test_counts_that_disagree_are_refused(filled: Path) -> None:
    change_metadata(filled, count=41)
    with pytest.raises(DataError, match="40 entries, but the header says 41"):
        StructureStore(filled)


def test_contradicting_header_is_refused(filled: Path) -> None:
    content = bytearray(filled.read_bytes())
    for offset in (0, 4096):
        struct.pack_into("<Q", content, offset + 128, 10**6)  # root page beyond the end
    filled.write_bytes(content)
    with pytest.raises(DataError, match="header contradicts itself"):
        StructureStore(filled)


def test_header_check_accepts_what_lmdb_writes(shared: Path) -> None:
    files = [p for p in (shared / "samples").glob("*/*.*lmdb") if p.suffix in {".lmdb", ".aselmdb"}]
    assert len(files) > 10
    for path in files:
        meta = check_lmdb_file(path)
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment:
            assert environment.stat()["psize"] == meta.page_size
            assert environment.info()["last_pgno"] == meta.last_page
            assert environment.info()["last_txnid"] == meta.transaction


def test_same_file_opened_twice_and_through_a_link(filled: Path) -> None:
    link = filled.with_name("link.lmdb")
    link.symlink_to(filled)
    first, second = StructureStore(filled), StructureStore(link)
    assert first[3].energy == second[3].energy
    first.close()
    assert second[4].info["number"] == 4
    assert first[5].info["number"] == 5


def test_replaced_file_is_not_mixed_up(filled: Path, random_structure: Make) -> None:
    old = StructureStore(filled)
    opened = StructureStore(filled)
    assert opened[0].info["number"] == 0
    write(filled, lambda i: random_structure(i + 100), 40, overwrite=True)
    assert opened[1].info["number"] == 1
    with pytest.raises(DataError, match="the file was replaced while in use"):
        old[1]
    assert StructureStore(filled)[1].info["number"] == 101


def test_pickles_without_its_handle(filled: Path) -> None:
    store = StructureStore(filled)
    assert store[2].info["number"] == 2
    assert pickle.loads(pickle.dumps(store))[7].info["number"] == 7


def test_forked_child_reads_after_the_parent(filled: Path, in_child: InChild) -> None:
    store, other = StructureStore(filled), StructureStore(filled)
    expected = [s.info["number"] for s in store]
    inherited = store._environment()
    assert in_child(lambda: store._environment() is inherited) == ("ok", False)
    for _ in range(2):
        answer = in_child(lambda: [store[i].info["number"] + 0 * len(other[i]) for i in range(40)])
        assert answer == ("ok", expected)
        assert [s.info["number"] for s in other] == expected


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_read_the_same(
    filled: Path, start: str, assert_identical: Callable[..., None]
) -> None:
    store = StructureStore(filled)
    here = list(store)
    loader = DataLoader(
        store, batch_size=7, num_workers=2, collate_fn=list, multiprocessing_context=start
    )
    for _ in range(2):
        there = [structure for batch in loader for structure in batch]
        assert len(there) == 40
        for a, b in zip(here, there, strict=True):
            assert_identical(a, b)


def test_threads_share_a_store(filled: Path) -> None:
    store = StructureStore(filled)
    sums: list[int] = []

    def work() -> None:
        sums.append(sum(store[i].info["number"] for _ in range(5) for i in range(40)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [5 * sum(range(40))] * 8


def test_edge_counts_are_right_and_remembered(
    filled: Path, random_structure: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = []
    for i in range(40):
        s = random_structure(i)
        edges, _ = neighbor_list(s.positions, s.cell, s.pbc, 4.0)
        expected.append(edges.shape[1])
    assert StructureStore(filled).n_edges(4.0).tolist() == expected
    monkeypatch.setattr("mlip.datasets.sizes.pair_distances", None)
    assert StructureStore(filled).n_edges(4.0).tolist() == expected
    monkeypatch.undo()
    write(filled, lambda i: random_structure(i + 1), 40, overwrite=True)
    assert StructureStore(filled).n_edges(4.0).tolist()[:-1] == expected[1:]


def test_opening_reads_a_small_index_and_no_entry(filled: Path, random_structure: Make) -> None:
    content = filled.read_bytes()
    marker = random_structure(17).forces[0].tobytes()
    assert content.count(marker) == 1
    filled.write_bytes(content.replace(marker, bytes(24)))
    store = StructureStore(filled)
    assert store.n_atoms().tolist() == [len(random_structure(i)) for i in range(40)]
    assert store._index.itemsize <= 16
    with pytest.raises(DataError, match="entry 17"):
        store[17]
