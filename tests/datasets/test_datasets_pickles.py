"""The restricted pickle reader: equal to plain pickle on real data, refuses the rest."""

from __future__ import annotations

import collections
import functools
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from mlip.datasets.formats.pickles import loads
from mlip.errors import DataError

PROTOCOLS = (2, 3, 4, 5)


def example(n: int = 14) -> Data:
    return Data(
        pos=torch.rand(n, 3),
        cell=torch.eye(3)[None] * 9,
        atomic_numbers=torch.randint(1, 100, (n,), dtype=torch.uint8),
        natoms=n,
        tags=torch.randint(0, 3, (n,)),
        forces=torch.randn(n, 3),
        energy=np.float64(-1.25),
        y_init=-3.5,
        sid=1000003,
        id="0_7",
        edge_index=torch.randint(0, n, (2, 300)),
        x=None,
    )


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.float().numpy() if theirs.dtype == torch.bfloat16 else theirs.numpy()
    assert type(ours) is type(theirs)
    if isinstance(theirs, np.ndarray | np.generic):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)
    else:
        assert ours == theirs


def field(value: Any, protocol: int = 4) -> Any:
    return loads(pickle.dumps(Data(field=value), protocol))["field"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_entry_is_what_plain_pickle_gives(protocol: int) -> None:
    data = pickle.dumps(example(), protocol)
    ours, theirs = loads(data), pickle.loads(data)
    assert set(ours) == set(theirs.keys())
    for name, value in ours.items():
        assert_same(value, theirs[name])
    assert set(loads(data, {"edge_index", "pos"})) == set(ours) - {"edge_index", "pos"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "dtype",
    [
        "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
        "uint16", "uint32", "uint64", "bool", "complex64", "complex128",
    ],
)  # fmt: skip
def test_tensors_of_every_type(dtype: str, protocol: int) -> None:
    values = torch.tensor([0, 1, 2, 100, 1]).to(getattr(torch, dtype))
    for tensor in (values, values[1:4], values[3], values[:0], values.reshape(5, 1)):
        assert_same(field(tensor, protocol), tensor)


def test_tensors_that_are_views() -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = (
        base.transpose(0, 2), base[:, 1:3, ::2], base[2, 3], base[None, :, None],
        torch.ones(1).expand(80, 3), torch.zeros(0, 3), base.reshape(60)[7:],
    )  # fmt: skip
    for view in views:
        assert_same(field(view), view)
    many = torch.rand(20_000)
    assert_same(field(many), many)  # its size takes four bytes in the header


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_and_plain_values(protocol: int) -> None:
    values: list[Any] = [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(9)[::2], np.array(3.0), np.zeros((0, 3)), np.array(["a", "bcd"]),
        np.arange(3, dtype=">f4"), np.array([True, False]), np.float32(0.1), np.int64(-5),
        np.bool_(True), np.str_("text"), np.complex128(1j), 1, -1, 300, 70_000, 2**40, -(2**40),
        0.5, True, "Å", b"bytes", b"", (1, 2), [1, [2.5, "x"]], {"a": 1, 2: None}, torch.Size([2]),
    ]  # fmt: skip
    for value in values:
        ours = field(value, protocol)
        assert_same(ours, tuple(value) if isinstance(value, torch.Size) else value)
    nested = field([torch.ones(2), {"k": np.float64(2)}], protocol)
    assert nested[0].tolist() == [1, 1]
    assert type(nested[1]["k"]) is np.float64
    assert loads(pickle.dumps(7, protocol)) == 7


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_is_read_like_an_entry(protocol: int) -> None:
    batch = Batch.from_data_list([Data(pos=torch.rand(2, 3)), Data(pos=torch.rand(1, 3))])
    ours = loads(pickle.dumps(batch, protocol))
    assert_same(ours["pos"], batch.pos)
    assert_same(ours["ptr"], batch.ptr)


def test_numpy_1_names_and_the_state_of_pyg_1() -> None:
    data = pickle.dumps(np.float64(2.5), 4)
    old = data.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
    assert old != data
    assert_same(loads(old), np.float64(2.5))
    new = Data(pos=torch.rand(2, 3), natoms=2)
    state = pickle.dumps({"pos": new.pos, "natoms": 2, "x": None, "__num_nodes__": 2}, 4)
    legacy = b"\x80\x04ctorch_geometric.data.data\nData\n)\x81" + state[11:-1] + b"b."
    ours = loads(legacy)
    assert_same(ours["pos"], new.pos)
    assert set(ours) == {"pos", "natoms"}


class Evil:
    """Does something when unpickled plainly."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def payloads() -> list[Any]:
    marker = "os.mkdir('mlip_pwned_test')"
    return [
        Evil(os.mkdir, "mlip_pwned_test"),
        Evil(os.system, "mkdir mlip_pwned_test"),
        Evil(eval, f"__import__('os') and {marker}"),
        Evil(exec, f"import os; {marker}"),
        Evil(functools.partial, os.mkdir, "mlip_pwned_test"),
        Evil(getattr, "text", "upper"),
        Evil(__import__, "os"),
        Evil(torch.load, "file"),
        Evil(np.load, "file"),
        Evil(open, "mlip_pwned_test", "w"),
        Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.mkdir, "mlip_pwned_test"))),
        np.array([Evil(os.mkdir, "mlip_pwned_test")], dtype=object),
        Evil(collections.Counter, "abc"),
        Evil(type, "X", (), {}),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_hostile_entries_are_refused_and_nothing_runs(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for evil in payloads():
        for content in (evil, Data(pos=torch.zeros(2, 3), field=evil), [evil]):
            with pytest.raises(DataError):
                loads(pickle.dumps(content, protocol))
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"posix\.mkdir"):
        loads(pickle.dumps(Evil(os.mkdir, "mlip_pwned_test"), protocol))
    pickle.loads(pickle.dumps(Evil(os.mkdir, "mlip_pwned_test"), protocol))
    assert [p.name for p in tmp_path.iterdir()] == ["mlip_pwned_test"]  # the payloads do work


def tensor_call(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    class Claim:
        def __reduce__(self) -> Any:
            storage = torch.arange(4.0)._typed_storage()
            hooks: Any = collections.OrderedDict()
            args = (storage, offset, size, stride, False, hooks)
            return torch._utils._rebuild_tensor_v2, args  # type: ignore[attr-defined]

    return pickle.dumps(Data(pos=Claim()), 4)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((10**9, 3), (3, 1), 0), ((4,), (1,), 1), ((2, 3), (3, 1), 0), ((-1,), (1,), 0),
        ((2,), (-1,), 3), ((4,), (1,), -1), ((10**9,), (0,), 0), ((2**62, 2**62), (0, 0), 0),
        ((0, 2**63), (1, 1), 0), ((0, 2**39, 2**39, 2**39), (1, 1, 1, 1), 0), ((4,), (1, 1), 0),
        ((1,) * 100, (1,) * 100, 0), ((2.0,), (1,), 0), ((True,), (1,), 0), (([4],), (1,), 0),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_their_storage(size: Any, stride: Any, offset: int) -> None:
    tracemalloc.start()
    with pytest.raises(DataError, match="pos: "):
        loads(tensor_call(size, stride, offset))
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_storage_with_contradicting_counts_or_more_bytes() -> None:
    data = pickle.dumps(Data(pos=torch.arange(14.0)), 4)
    start = data.index(struct.pack("<q", 14))
    for count in (0, 13, 15, 2**40, -1):
        bad = data[:start] + struct.pack("<q", count) + data[start + 8 :]
        with pytest.raises(DataError, match="storage"):
            loads(bad)
    head = data.index(b"K\x0eNtq\x04Q")
    with pytest.raises(DataError, match="storage"):
        loads(data[:head] + b"K\x0d" + data[head + 2 :])
    with pytest.raises(DataError):
        loads(data.replace(b"\nFloatStorage", b"\nStoogStorage"))
    with pytest.raises(DataError, match="zip"):
        loads(data.replace(b"\x80\x02\x8a\nl\xfc", b"PK\x8a\nl\xfc"))
    unusual = data.replace(b"\x03\x00\x00\x00cpu", b"\x03\x00\x00\x00gpu")
    assert_same(loads(unusual)["pos"], torch.arange(14.0))


def test_a_storage_with_bytes_too_few_or_too_many() -> None:
    payload = torch.arange(4.0)._typed_storage().__reduce__()[1][0]

    class Storage:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (self.content,)

    class Tensor:
        def __init__(self, content: bytes) -> None:
            hooks: Any = collections.OrderedDict()
            self.args = (Storage(content), 0, (4,), (1,), False, hooks)

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, self.args  # type: ignore[attr-defined]

    assert loads(pickle.dumps(Tensor(payload), 4)).tolist() == [0, 1, 2, 3]
    unusual = payload.replace(b"\x03\x00\x00\x00cpu", b"\x03\x00\x00\x00gpu")
    for whole in (payload, unusual):
        for content in (whole[:-1], whole[:-4], whole + b"\0", whole + b"\0" * 4, whole[:100], b""):
            with pytest.raises(DataError):
                loads(pickle.dumps(Tensor(content), 4))


def test_a_shape_whose_count_disagrees_with_its_numbers() -> None:
    data = pickle.dumps([torch.zeros(1), torch.zeros(14, 3)], 4)
    assert loads(data)[1].shape == (14, 3)
    with pytest.raises(DataError):
        loads(data.replace(b"K\x0eK\x03\x86", b"K\x0eK\x03\x85"))


BOMBS = {
    "declared length of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "text of 2^31": b"\x80\x04X" + struct.pack("<I", 2**31) + b"x.",
    "memo of 2^31": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "textual memo": b"\x80\x02Np999999999\n.",
    "frame beyond the end": b"\x80\x04\x95" + b"\xff" * 8 + b"." * 3,
    "deep tuples as a key": b"\x80\x04})" + b"\x85" * 100_000 + b"Ns.",
    "deep tuples in a set": b"\x80\x04\x8f()" + b"\x85" * 100_000 + b"\x90.",
    "deep lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "laughs": b"\x80\x04]\x94(" + b"N" * 10 + b"e" + (b"\x94](" + b"h\x01" * 10 + b"e") * 9 + b".",
    "repeated lists": b"\x80\x04]\x94"
    + b"".join(b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60))
    + b".",
    "a list in itself": b"\x80\x04]\x94h\x00a.",
    "chain of calls": b"\x80\x04ccollections\nOrderedDict\n" + b")R\x94" * 20_000 + b".",
    "two million operations": b"\x80\x04" + b"N0" * 1_000_000 + b"N.",
    "many lists": b"\x80\x04" + b"]" * 1_000_100 + b".",
    "huge integer": b"\x80\x04\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b".",
    "integer of 255 bytes": b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",
    "decimal integer": b"\x80\x04I" + b"9" * 100_000 + b"\n.",
    "extension": b"\x80\x04\x82\x01.",
    "instance": b"\x80\x02(ios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\no.",
    "object with keywords": b"\x80\x04ctorch_geometric.data.data\nData\n)}\x92.",
    "persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "next buffer": b"\x80\x05\x97.",
    "state of a class": b"\x80\x04ctorch_geometric.data.data\nData\n}b.",
    "state with slots": b"\x80\x04ctorch_geometric.data.data\nData\n)\x81N}\x86b.",
    "state of a list": b"\x80\x04]}b.",
    "state twice": b"\x80\x04ctorch_geometric.data.data\nData\n)\x81}b}b.",
    "a number called": b"\x80\x04K\x01)R.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x0bSize.__init\x93.",
    "a name without end": b"\x80\x02c" + b"a" * 5000,
    "items without mark": b"\x80\x04}u.",
    "odd items": b"\x80\x04}(Nu.",
    "an empty stack": b"\x80\x04.",
    "two values": b"\x80\x04NN.",
    "text that is none": b"\x80\x04\x8c\x02\xff\xfe.",
    "bytes after the end": b"\x80\x04N.N",
    "nothing": b"",
    "protocol 0": b"I1\n.",
    "protocol 9": b"\x80\x09N.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_and_nonsense_are_errors_in_little_memory(case: str) -> None:
    data = BOMBS[case]
    tracemalloc.start()
    with pytest.raises(DataError):
        loads(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 + 150 * len(data)


def test_every_cut_is_an_error() -> None:
    data = pickle.dumps(example(2), 4)
    for end in range(len(data) - 1):
        with pytest.raises(DataError):
            loads(data[:end])


def test_integers_as_keys_cannot_be_made_to_collide() -> None:
    step = 2**61 - 1
    pushes = b"".join(
        b"\x8a\x0a" + (i * step).to_bytes(10, "little", signed=True) + b"N" for i in range(1, 9)
    )
    with pytest.raises(DataError, match="keys"):
        loads(b"\x80\x04}(" + pushes + b"u.")


def test_all_samples_equal_plain_pickle(shared: Path) -> None:
    from mlip.datasets.lmdb_reader import LmdbReader

    count = 0
    for path in sorted((shared / "samples").glob("*/*.lmdb")):
        reader = LmdbReader(path) if path.is_file() else None
        for key in reader.keys() if reader is not None else ():
            assert reader is not None
            data = reader.get(key)
            assert data is not None
            ours, theirs = loads(data), pickle.loads(data)
            if isinstance(theirs, int):
                assert ours == theirs
                continue
            state = vars(theirs).get("_store")
            fields = vars(theirs) if state is None else state._mapping
            fields = {k: v for k, v in fields.items() if v is not None and not k.startswith("_")}
            assert ours.keys() == fields.keys()
            for name, value in fields.items():
                assert_same(ours[name], value)
            count += 1
    assert count > 190
