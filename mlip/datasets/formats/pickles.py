"""Read the pickled entries of OC20-style files: plain data out, nothing run, imported or called.

The pickle machine gives inert pieces; the few calls that data files hold (a PyG ``Data`` object,
torch tensors, numpy arrays and scalars) are understood here by their names, and numpy arrays are
made from their bytes by hand. Neither torch nor torch_geometric is used, so the versions that
wrote the file do not matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from mlip.datasets.formats.pickle_machine import PERSISTENT, Call, Name, run
from mlip.datasets.structure import Array
from mlip.errors import DataError

MAX_DEPTH = 50  # lists within lists
MAX_DIMENSIONS = 16
MAX_SIZE = 2**40  # elements along one dimension, of an empty tensor
# Bytes and values that come out, by bytes read and at least: more means the same list, bytes or
# number (a tensor of stride 0) repeated over and over.
MAX_REPEATS, MIN_BUDGET = 8, 100_000

_STORAGES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "<i1", "Byte": "<u1", "Bool": "|b1", "ComplexFloat": "<c8", "ComplexDouble": "<c16",
    "BFloat16": "bfloat16",
}  # fmt: skip
_UNTYPED = {
    "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "int8": "<i1", "int16": "<i2",
    "int32": "<i4", "int64": "<i8", "uint8": "<u1", "bool": "|b1", "float16": "<f2",
    "float32": "<f4", "float64": "<f8", "complex64": "<c8", "complex128": "<c16",
    "bfloat16": "bfloat16",
}  # fmt: skip
_PLAIN_DTYPE = re.compile(r"[<>|=]?(?:f[248]|[iu][1248]|b1|c8|c16|[US][1-9]\d{0,5})")


def _names() -> dict[tuple[str, str], Name]:
    table = {
        ("torch_geometric.data.data", "Data"): "object",
        ("torch_geometric.data.data", "DataEdgeAttr"): "class",
        ("torch_geometric.data.data", "DataTensorAttr"): "class",
        ("torch_geometric.data.batch", "Batch"): "object",
        ("torch_geometric.data.batch", "DynamicInheritanceGetter"): "batch class",
        ("torch_geometric.data.storage", "GlobalStorage"): "object",
        ("torch._utils", "_rebuild_tensor_v2"): "tensor",
        ("torch._utils", "_rebuild_tensor_v3"): "typed tensor",
        ("torch.storage", "_load_from_bytes"): "storage",
        ("torch", "Size"): "size",
        ("collections", "OrderedDict"): "ordered",
        ("collections", "defaultdict"): "ordered",
        ("_codecs", "encode"): "encoded",
        ("numpy", "dtype"): "dtype",
        ("numpy", "ndarray"): "class",
    }
    for builtins in ("builtins", "__builtin__"):
        table[builtins, "bytes"] = table[builtins, "bytearray"] = "bytes"
        table[builtins, "dict"] = "class"
    for module in ("numpy.core", "numpy._core"):
        table[f"{module}.multiarray", "scalar"] = "scalar"
        table[f"{module}.multiarray", "_reconstruct"] = "array"
        table[f"{module}.numeric", "_frombuffer"] = "buffer array"
    table |= {("torch", dtype): f"torch.{dtype}" for dtype in _UNTYPED}
    return {place: Name(text) for place, text in table.items()}


def _storage_names() -> dict[tuple[str, str], Name]:
    table = {("torch", f"{kind}Storage"): dtype for kind, dtype in _STORAGES.items()}
    table["torch.storage", "UntypedStorage"] = "untyped"
    return {place: Name(text) for place, text in table.items()}


_NAMES = _names()
_STORAGE_NAMES = _storage_names()


def loads(data: bytes, skip: Collection[str] = ()) -> Any:
    """Read one pickled entry.

    Args:
        data: the pickle, protocol 2 to 5.
        skip: fields of an entry to leave out, for instance edges that nobody will look at.

    Returns:
        For a torch_geometric ``Data`` object (of any version) a dict of its fields: numpy arrays
        for tensors (bfloat16 as float32), numpy scalars, Python numbers, text, lists, dicts;
        fields that are None are left out. For plain values just those.

    Raises:
        DataError: damaged, cut short, or it asks for anything beyond such data.
    """
    value, end = run(data, 0, _NAMES)
    if end != len(data):
        raise DataError(f"{len(data) - end} bytes follow the end of the pickle")
    budget = _Budget(max(MIN_BUDGET, MAX_REPEATS * len(data)))
    fields = _fields(value)
    if fields is None:
        return _unfold(value, budget)
    entry: dict[str, Any] = {}
    for name, content in fields.items():
        if content is None or name in skip:
            continue
        if type(name) is not str:
            raise DataError("the entry has a field whose name is no text")
        if name.startswith("_"):
            continue
        try:
            entry[name] = _unfold(content, budget)
        except DataError as error:
            raise DataError(f"{name[:100]}: {error}") from None
    return entry


_OBJECTS = frozenset({"object", "batch class()"})


def _fields(value: Any) -> dict[Any, Any] | None:
    """Find the table of fields of a ``Data`` object, None if it is none."""
    if type(value) is not Call or value.name not in _OBJECTS:
        return None
    state = value.state
    if type(state) is dict and "_store" in state:
        store = state["_store"]
        inner = store.state if type(store) is Call and store.name in _OBJECTS else None
        state = inner.get("_mapping") if type(inner) is dict else None
    if type(state) is not dict:
        raise DataError("the Data object of the entry has no table of fields")
    return state


class _Budget:
    """How much may still come out of one entry."""

    def __init__(self, size: int) -> None:
        self.left = size

    def charge(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise DataError("refused: the pickle repeats the same content over and over")


def _unfold(value: Any, budget: _Budget, depth: int = 0) -> Any:
    """Turn a piece of a pickle into plain values."""
    kind = type(value)
    if kind is Call:
        meaning = _MEANINGS.get(value.name)
        if meaning is None:
            raise DataError(f"the pickle has a {value.name[:100]} where data is expected")
        return meaning(value, budget)
    if kind in _ATOMS:
        if kind is int and value.bit_length() > 64:
            raise DataError("an integer of more than 64 bits")
        return value
    if kind is memoryview:
        return bytes(_content(value, budget))
    if kind is Name:
        raise DataError("the pickle has a class where data is expected")
    if depth > MAX_DEPTH:
        raise DataError(f"refused: lists are nested more than {MAX_DEPTH} deep")
    budget.charge(1 + len(value))
    if kind is dict:
        return {key: _unfold(item, budget, depth + 1) for key, item in value.items()}
    return kind([_unfold(item, budget, depth + 1) for item in value])


_ATOMS = frozenset({int, float, str, bool, type(None)})


def _tensor(call: Call, budget: _Budget) -> Array:
    args = _arguments(call, 6, 7)
    return _strided(_storage(args[0], budget), args[1:4], budget)


def _typed_tensor(call: Call, budget: _Budget) -> Array:
    args = _arguments(call, 7, 8)
    dtype = args[6]
    if type(dtype) is not Name or not dtype.text.startswith("torch."):
        raise DataError("the tensor has no known type")
    raw = memoryview(_storage(args[0], budget).tobytes())
    name = _UNTYPED[dtype.text.removeprefix("torch.")]
    if len(raw) % _width(name):
        raise DataError("the tensor does not fit its storage")
    return _strided(_typed(raw, name), args[1:4], budget)


def _strided(elements: Array, geometry: tuple[Any, ...], budget: _Budget) -> Array:
    """Give the view of a storage that a tensor is, after checking that it lies within."""
    offset, size, stride = geometry
    shapes_ok = type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not shapes_ok or len(size) > MAX_DIMENSIONS or type(offset) is not int or offset < 0:
        raise DataError("the shape of a tensor is damaged")
    count, last, dense = 1, offset, True
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if type(n) is not int or type(step) is not int or not 0 <= n <= MAX_SIZE or step < 0:
            raise DataError("the shape of a tensor is damaged")
        if step != count and n != 1:
            dense = False
        last += (n - 1) * step
        count *= n
    if count == 0:
        return _empty(size, elements.dtype)
    have = len(elements)
    if last >= have:
        raise DataError(f"refused: a tensor of shape {size} does not fit its {have} stored numbers")
    budget.charge(count)
    if dense:
        return elements[offset : offset + count].reshape(size)
    steps = [step * elements.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(elements[offset:], size, steps, writeable=False)


def _empty(size: tuple[int, ...], dtype: Any) -> Array:
    try:
        return np.zeros(size, dtype)
    except (ValueError, MemoryError):
        raise DataError("the shape of a tensor is damaged") from None


# What torch.save writes around the bytes of a storage in its legacy format, with the type, the
# place of the storage in the memory of the writer (twice) and the number of elements (twice).
_LEGACY_START = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00(X\x10\x00\x00\x00"
    b"protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88X\n\x00\x00\x00type_sizesq"
    b"\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04X\x04\x00\x00\x00"
    b"longq\x07K\x04uu."
)
_LEGACY = re.compile(
    re.escape(_LEGACY_START)
    + rb"\x80\x02\(X\x07\x00\x00\x00storageq\x00ctorch\n(\w{1,20})Storage\nq\x01X.\x00\x00\x00"
    + rb"(\d{1,20})q\x02X\x03\x00\x00\x00cpuq\x03(?:K(.)|M(..)|J(....))Ntq\x04Q."
    + rb"\x80\x02\]q\x00X.\x00\x00\x00\2q\x01a.(.{8})",
    re.DOTALL,
).match
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def _storage(call: Any, budget: _Budget) -> Array:
    """Read the elements of a torch storage from the bytes that torch.save made of it."""
    if type(call) is not Call or call.name != "storage":
        raise DataError("a tensor has no storage")
    (content,) = _arguments(call, 1)
    content = _content(content, budget)
    head = _LEGACY(content)
    if head is None:
        return _storage_slowly(bytes(content))
    kind, _, k, m, j, count = head.groups()
    dtype = _STORAGES.get(kind.decode())
    elements = int.from_bytes(count, "little", signed=True)
    declared = int.from_bytes(k or m or j, "little", signed=j is not None)
    if dtype is None or elements != declared:
        raise DataError("a tensor storage is damaged or of an unknown type")
    return _checked(content[head.end() :], dtype, elements)


def _storage_slowly(content: bytes) -> Array:
    """Read a storage whose header is not the usual one, piece by piece."""
    if content[:2] == b"PK":
        raise DataError("refused: a tensor in the zip format of torch.save, which no data set uses")
    magic, at = run(content, 0, {})
    protocol, at = run(content, at, {})
    system, at = run(content, at, {})
    if magic != _MAGIC or protocol != _PROTOCOL or type(system) is not dict:
        raise DataError("a tensor storage has no known header")
    if system.get("little_endian") is not True:
        raise DataError("a tensor storage was written on a big-endian machine")
    storage, at = run(content, at, _STORAGE_NAMES)
    keys, at = run(content, at, {})
    if type(storage) is not Call or storage.name != PERSISTENT or type(storage.args) is not tuple:
        raise DataError("a tensor storage holds something else than one storage")
    parts = (*storage.args, None)
    if not 6 <= len(parts) <= 7 or parts[0] != "storage" or parts[5] is not None:
        raise DataError("a tensor storage is a view of another one")
    kind, key, count = parts[1], parts[2], parts[4]
    if type(kind) is not Name or type(count) is not int or type(key) is not str or keys != [key]:
        raise DataError("a tensor storage is damaged")
    if content[at : at + 8] != (count % 2**64).to_bytes(8, "little"):
        raise DataError("a tensor storage is damaged: two element counts differ")
    dtype = "|u1" if kind.text == "untyped" else kind.text
    return _checked(memoryview(content)[at + 8 :], dtype, count)


def _checked(raw: memoryview, dtype: str, count: int) -> Array:
    if count < 0 or len(raw) != count * _width(dtype):
        raise DataError(
            f"a tensor storage declares {count} elements and has {len(raw)} bytes of {dtype}"
        )
    return _typed(raw, dtype)


def _width(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else _DTYPES[dtype].itemsize


def _typed(raw: memoryview, dtype: str) -> Array:
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(bytes(raw), "<u2").astype("<u4") << 16).view("<f4")
    if dtype == "|b1":
        return _truth(bytes(raw))
    values: Array = np.frombuffer(bytes(raw), _DTYPES[dtype])
    return values


def _truth(raw: bytes) -> Array:
    """Read truth values; bytes other than 0 and 1 must not get into a boolean array."""
    values: Array = np.frombuffer(raw, np.uint8) != 0
    values.flags.writeable = False
    return values


_DTYPES = {
    name: np.dtype(name) for name in {*_STORAGES.values(), *_UNTYPED.values(), "|u1"} - {"bfloat16"}
}


def _arguments(call: Call, least: int, most: int | None = None) -> tuple[Any, ...]:
    args: tuple[Any, ...] = call.args
    if not least <= len(args) <= (most or least):
        raise DataError(f"the pickle has a {call.name} with {len(args)} arguments")
    return args


def _content(value: Any, budget: _Budget) -> memoryview:
    """Give bytes, also where an old protocol wrote them as text or through a constructor."""
    if type(value) is memoryview:
        budget.charge(len(value))
        return value
    if type(value) is Call and value.name == "encoded":
        text, encoding = _arguments(value, 2)
        if type(text) is str and type(encoding) is str and encoding in {"latin1", "latin-1"}:
            budget.charge(len(text))
            try:
                return memoryview(text.encode("latin-1"))
            except UnicodeEncodeError:
                pass
    if type(value) is Call and value.name == "bytes" and len(value.args) <= 1:
        inner = value.args[0] if value.args else memoryview(b"")
        if type(inner) is memoryview:
            return _content(inner, budget)
    raise DataError("the pickle has something else where bytes are expected")


def _dtype(value: Any) -> np.dtype[Any]:
    """Read a numpy dtype: numbers, truth values and text of fixed length only."""
    if type(value) is Call and value.name == "dtype" and value.args:
        name, state = value.args[0], value.state
        order = state[1] if type(state) is tuple and len(state) > 1 else "="
        known = type(order) is str and order in {"<", ">", "|", "="}
        if known and type(name) is str and _PLAIN_DTYPE.fullmatch(name):
            if name[0] in "<>|=":
                return np.dtype(name)
            return np.dtype(name if order == "|" else order + name)
    raise DataError("refused: a numpy type other than numbers and text (Python objects?)")


def _scalar(call: Call, budget: _Budget) -> Any:
    kind, content = _arguments(call, 2)
    dtype, raw = _dtype(kind), bytes(_content(content, budget))
    if len(raw) != dtype.itemsize or not raw:
        raise DataError("a numpy number is damaged")
    return _decoded(raw, dtype)[0]


def _array(call: Call, budget: _Budget) -> Array:
    state = call.state
    if type(state) is not tuple or len(state) != 5:
        raise DataError("a numpy array is damaged")
    _, shape, dtype, fortran, content = state
    order = "F" if fortran is True else "C"
    return _shaped(_content(content, budget), _dtype(dtype), shape, order)


def _buffer_array(call: Call, budget: _Budget) -> Array:
    content, dtype, shape, order = _arguments(call, 4)
    order = "F" if order == "F" else "C"
    return _shaped(_content(content, budget), _dtype(dtype), shape, order)


def _shaped(content: memoryview, dtype: np.dtype[Any], shape: Any, order: Any) -> Array:
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise DataError("the shape of a numpy array is damaged")
    if math.prod(shape) * dtype.itemsize != len(content) or len(shape) > MAX_DIMENSIONS:
        raise DataError(f"a numpy array of shape {shape} does not fit its {len(content)} bytes")
    if not len(content):
        return _empty(shape, dtype)
    return _decoded(bytes(content), dtype).reshape(shape, order=order)


def _decoded(raw: bytes, dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "b":
        return _truth(raw)
    values: Array = np.frombuffer(raw, dtype)
    if dtype.kind == "U":
        codes = values.view(f"{dtype.byteorder}u4")
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise DataError("a numpy text is damaged")
    return values


def _size(call: Call, budget: _Budget) -> tuple[int, ...]:
    (sizes,) = _arguments(call, 1)
    if type(sizes) is not tuple or not all(type(n) is int for n in sizes):
        raise DataError("a torch.Size is damaged")
    budget.charge(len(sizes))
    return sizes


def _bytes(call: Call, budget: _Budget) -> bytes:
    return bytes(_content(call, budget))


_MEANINGS: dict[str, Callable[[Call, _Budget], Any]] = {
    "tensor": _tensor, "typed tensor": _typed_tensor, "scalar": _scalar, "array": _array,
    "buffer array": _buffer_array, "size": _size, "encoded": _bytes, "bytes": _bytes,
}  # fmt: skip
