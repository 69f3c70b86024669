"""LMDB files from anywhere: read exactly as liblmdb does, damage is an error and never a crash."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from mlip.datasets.lmdb_file import check_lmdb_file
from mlip.datasets.lmdb_reader import LmdbReader
from mlip.errors import DataError

InChild = Callable[[Callable[[], Any]], tuple[str, Any]]
PAGE = 4096


def write(path: Path, items: dict[bytes, bytes]) -> Path:
    environment = lmdb.open(str(path), subdir=False, map_size=2**28, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return path


def items(count: int, seed: int = 0) -> dict[bytes, bytes]:
    """Make values of none to 20 kB, so that some are on pages of their own."""
    source = random.Random(seed)
    return {
        b"%d" % i: source.randbytes(source.choice([0, 9, 300, 5000, 20_000])) for i in range(count)
    }


@pytest.mark.parametrize("count", [0, 1, 7, 300, 3000])
def test_the_reader_gives_what_was_written(tmp_path: Path, count: int) -> None:
    content = items(count) | {b"length": b"x", b"#": b"y", b"zz": b""}
    path = write(tmp_path / "a.lmdb", content)
    with lmdb.open(str(path), subdir=False, map_size=2**28, lock=False) as environment:
        for key in [b"3", b"5", b"12"]:
            with environment.begin(write=True) as transaction:
                if transaction.delete(key):
                    del content[key]
    reader = LmdbReader(path)
    assert reader.entries == len(content)
    assert list(reader.keys()) == sorted(content)
    assert {key: reader.get(key) for key in content} == content
    for start in (b"0", b"17", b":", b"zz", b"zzz", b"29999"):
        assert list(reader.keys(start)) == sorted(k for k in content if k >= start)
        assert reader.get(start + b"!") is None
    assert check_lmdb_file(path) == reader.meta


def test_no_entries(tmp_path: Path) -> None:
    reader = LmdbReader(write(tmp_path / "a.lmdb", {}))
    assert list(reader.keys()) == []
    assert reader.get(b"0") is None


def test_forks_threads_copies_links_and_a_second_reader(tmp_path: Path, in_child: InChild) -> None:
    content = items(200)
    path = write(tmp_path / "a.lmdb", content)
    link = tmp_path / "link.lmdb"
    link.symlink_to(path)
    reader, second = LmdbReader(path), LmdbReader(link)
    assert reader.get(b"7") == second.get(b"7") == content[b"7"]

    def all_equal() -> bool:
        return all(reader.get(key) == value for key, value in content.items())

    assert in_child(all_equal) == ("ok", True)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.get(b"9") == content[b"9"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(copy.get, (b"9",)) == content[b"9"]
    verdicts: list[bool] = []
    threads = [threading.Thread(target=lambda: verdicts.append(all_equal())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 4
    write(path, {b"7": b"new"})
    assert reader.get(b"7") == content[b"7"]  # the state it was opened on


def test_a_file_that_shrinks_or_is_replaced_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", items(300))
    reader = LmdbReader(path)
    os.truncate(path, 3 * PAGE)
    with pytest.raises(DataError, match="cut short while in use"):
        assert [reader.get(key) for key in items(300)]
    reader.close()
    write(tmp_path / "b.lmdb", items(20, seed=2)).replace(path)
    with pytest.raises(DataError, match="replaced while in use"):
        reader.get(b"1")
    like = {key: value[::-1] for key, value in items(20, seed=2).items()}
    reader = LmdbReader(path)
    write(tmp_path / "c.lmdb", like).replace(path)
    assert LmdbReader(path).meta == reader.meta
    reader.close()
    with pytest.raises(DataError, match="replaced while in use"):
        reader.get(b"1")
    reader.close()
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        reader.get(b"1")


def damage(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def newest_meta(path: Path) -> int:
    """Give the offset of the newer meta page."""
    head = path.read_bytes()
    return PAGE * (head[PAGE + 144 : PAGE + 152] > head[144:152])


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (16, b"\0\0\0\0", "no LMDB file"),
        (20, struct.pack("<I", 2), "format 2"),
        (40, struct.pack("<I", 4095), "pages of 4095 bytes"),
        (40, struct.pack("<I", 8192), "damaged|truncated|no LMDB|disagree"),
        (92, struct.pack("<H", 4), "unusual kind"),
        (94, struct.pack("<H", 33), "unusual kind"),
        (128, struct.pack("<Q", 10**6), "contradicts itself"),
        (128, struct.pack("<Q", 1), "contradicts itself"),
        (136, struct.pack("<Q", 10**6), "truncated"),
    ],
)
def test_headers_that_lie(tmp_path: Path, offset: int, content: bytes, message: str) -> None:
    path = write(tmp_path / "a.lmdb", items(300))
    damage(path, newest_meta(path) + offset, content)
    for read in (check_lmdb_file, LmdbReader):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    good = write(tmp_path / "a.lmdb", items(300)).read_bytes()
    for content in (b"", b"x", b"\0" * 100_000, good[:5000], good[: len(good) // 2], good[:-PAGE]):
        path = tmp_path / "bad.lmdb"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.lmdb: "):
            LmdbReader(path)
    os.mkfifo(tmp_path / "pipe")
    for name, text in (("pipe", "regular"), ("none", "no such"), (".", "regular")):
        with pytest.raises(DataError, match=text):
            LmdbReader(tmp_path / name)


def test_a_table_within_the_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=2) as environment:
        environment.open_db(b"5")
    with pytest.raises(DataError, match="table of its own"):
        LmdbReader(path).get(b"5")


def test_pages_that_lead_in_a_circle_or_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", {b"%d" % i: b"" for i in range(3000)})
    root = check_lmdb_file(path).root
    page = path.read_bytes()[root * PAGE :][:PAGE]
    place = struct.unpack_from("<H", page, 18)[0]  # second child
    damage(path, root * PAGE + place, struct.pack("<IH", root, 0))
    reader = LmdbReader(path)
    first = next(reader.keys())
    assert reader.get(first) == b""
    with pytest.raises(DataError, match="circle"):
        list(reader.keys())
    with pytest.raises(DataError, match="damaged"):
        assert [reader.get(b"%d" % i) for i in range(3000)]
    damage(path, root * PAGE + place, struct.pack("<IH", 10**6, 0))
    with pytest.raises(DataError, match=r"page 1000000 .* damaged"):
        list(LmdbReader(path).keys())


def test_a_value_that_declares_more_than_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lmdb", {b"0": b"x" * 9000, b"1": b"y" * 10})
    root = check_lmdb_file(path).root
    page = path.read_bytes()[root * PAGE :][:PAGE]
    for node, sizes in ((0, (2**31, 10**9, 10**5)), (1, (5000,))):
        place = struct.unpack_from("<H", page, 16 + 2 * node)[0]
        for size in sizes:
            damage(path, root * PAGE + place, struct.pack("<I", size))
            with pytest.raises(DataError, match=r"declares|damaged"):
                LmdbReader(path).get(b"%d" % node)


def test_random_damage_costs_entries_only(tmp_path: Path) -> None:
    content = {b"%d" % i: b"v" * (i % 3000) for i in range(400)}
    good = write(tmp_path / "a.lmdb", content).read_bytes()
    path, source, bad = tmp_path / "bad.lmdb", random.Random(1), 0
    for _ in range(400):
        broken = bytearray(good)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(2, len(good) // PAGE) * PAGE + source.randrange(64)
            broken[at] = source.choice([0, 1, 2, 0xFF, broken[at] ^ 1 << source.randrange(8)])
        path.write_bytes(broken)
        reader = LmdbReader(path)
        for key in source.sample(sorted(content), 20):
            try:
                reader.get(key)
            except DataError:
                bad += 1
        try:
            list(reader.keys())
        except DataError:
            bad += 1
    assert bad > 100
