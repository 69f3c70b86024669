"""Random damage to entries and random pickles: a value or a DataError, nothing else, nothing run.

The files in corpus/ are what the coverage-guided fuzzer (scripts/fuzz_dataset.py) found worth
keeping; names begin with the target they belong to.
"""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data

from mlip.datasets.formats.oc20 import is_oc20, open_oc20
from mlip.datasets.formats.oc20_entry import extract_entry
from mlip.datasets.formats.pickles import loads
from mlip.datasets.lmdb_reader import LmdbReader
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import Structure
from mlip.errors import DataError

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
MARKER = "mlip_pwned_fuzz"
MKDIR = b"cos\nmkdir\n(X" + struct.pack("<I", len(MARKER)) + MARKER.encode() + b"tR"
SYSTEM = MKDIR.replace(b"os\nmkdir", b"os\nsystem").replace(b"X\x0f", b"X\x15").replace(
    MARKER.encode(), b"mkdir " + MARKER.encode()
)  # fmt: skip


def entry(n: int) -> Data:
    torch.manual_seed(n)
    return Data(
        pos=torch.rand(n, 3), cell=torch.eye(3)[None] * 8, atomic_numbers=torch.full((n,), 6.0),
        natoms=n, tags=torch.zeros(n).long(), fixed=torch.zeros(n, dtype=torch.int32),
        force=torch.rand(n, 3), y=np.float64(-2), sid=5, extra=[1, {"k": np.arange(3)}],
        edge_index=torch.zeros(2, 4).long(), cell_offsets=torch.zeros(4, 3).long(),
    )  # fmt: skip


SEEDS = [pickle.dumps(entry(n), protocol) for n in (1, 3) for protocol in (2, 4, 5)]
OPCODES = (
    b"\x94", b"0", b"2", b"N", b"(", b"t", b")R", b")\x81", b"}b", b"b", b"u", b"s", b"a", b"e",
    b"\x85", b"\x86", b"\x87", b"\x93", b"Q", b"h\x00", b"h\x01", b"q\x00", b"r\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x96" + b"\x7f" * 8, b"\x82\x01",
    b"\x95" + b"\xff" * 8, b"]", b"}", b"\x8f", b"\x90", b"\x91", b"K\x03", b"J\xff\xff\xff\xff",
    b"X\x03\x00\x00\x00pos", b"C\x01x", b".", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\nscalar\n", b"ctorch_geometric.data.data\nData\n",
    b"cbuiltins\neval\n",
)  # fmt: skip
SNIPPETS = st.sampled_from([MKDIR, SYSTEM, MKDIR + b"0", *OPCODES])


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder and find it without markers at the end."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.glob(f"{MARKER}*"))


def take(data: bytes) -> str:
    """Read one entry; give what became of it."""
    try:
        fields = loads(data)
    except DataError:
        return "refused"
    if not isinstance(fields, dict):
        return "value"
    try:
        structure = extract_entry(fields, ReadOptions()).structure
    except DataError:
        return "checked"
    assert isinstance(structure, Structure)
    assert np.isfinite(structure.positions).all()
    assert 1 <= structure.numbers.min() <= structure.numbers.max() <= 118
    return "structure"


def bounded(examples: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks
    )


def test_the_seeds_are_whole_and_the_payloads_work() -> None:
    assert {take(seed) for seed in SEEDS} == {"structure"}
    for payload in (MKDIR, SYSTEM):
        pickle.loads(b"\x80\x04" + payload + b".")
        Path(MARKER).rmdir()
        assert take(b"\x80\x04" + payload + b".") == "refused"


@bounded(400)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_changed_bytes(seed: bytes, changes: list[tuple[int, int]]) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    take(bytes(data))


@bounded(300)
@given(
    seed=st.sampled_from(SEEDS),
    other=st.sampled_from(SEEDS),
    cuts=st.tuples(*[st.integers(0, 2**20)] * 3),
    snippets=st.lists(SNIPPETS, max_size=5),
)
def test_spliced_entries(
    seed: bytes, other: bytes, cuts: tuple[int, int, int], snippets: list[bytes]
) -> None:
    first, second, third = (cut % len(seed) for cut in cuts)
    take(seed[:first] + b"".join(snippets) + other[second : second + third])
    take(seed[:first] + b"".join(snippets) + seed[first:])


@bounded(400)
@given(program=st.lists(SNIPPETS, max_size=40))
def test_programs_of_opcodes(program: list[bytes]) -> None:
    tracemalloc.start()
    take(b"\x80\x04" + b"".join(program) + b".")
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


@bounded(200)
@given(
    size=st.lists(st.integers(-1, 2**63), max_size=4),
    stride=st.lists(st.integers(-1, 2**63), max_size=4),
    offset=st.integers(-1, 40),
)
def test_shapes_of_tensors(size: list[int], stride: list[int], offset: int) -> None:
    whole = pickle.dumps(torch.arange(12.0), 2)  # ... 0, (12,), (1,), False, ...
    head, tail = whole.split(b"K\x00K\x0c\x85")
    rest = tail[tail.index(b"\x89") :]
    shape = b"".join(b"(" + b"".join(map(integer, part)) + b"t" for part in (size, stride))
    data = head + integer(offset) + shape + rest
    try:
        array = loads(data)
    except DataError:
        return
    assert array.shape == tuple(size)
    plain = pickle.loads(data)
    assert np.array_equal(array, plain.numpy())


def integer(value: int) -> bytes:
    """Write an integer of up to 9 bytes."""
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def try_file(path: Path) -> None:
    for action in (LmdbReader, is_oc20):
        try:
            action(path)
        except DataError:
            continue
    try:
        reader = LmdbReader(path)
        keys = list(reader.keys())
    except DataError:
        keys = []
    for key in keys:
        try:
            reader.get(key)
        except DataError:
            continue
    try:
        dataset = open_oc20(path, ReadOptions())
    except DataError:
        return
    for i in range(min(len(dataset), 20)):
        try:
            dataset[i]
        except DataError:
            continue


@pytest.mark.parametrize("case", CORPUS, ids=lambda path: path.name)
def test_what_the_fuzzer_kept(case: Path) -> None:
    if case.name.startswith("entry"):
        take(case.read_bytes())
    else:
        try_file(case)
