"""Turn a structure into the bytes of one store entry and back: safetensors, no pickle.

A round trip keeps every bit. Positions and forces take float32 where that loses nothing, other
reals float64; flags and element numbers take one byte.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson

from mlip.datasets.structure import Array, Structure
from mlip.errors import DataError

_LENGTH_BYTES = 8  # of the length of the header, before the header
_MAX_HEADER = 1 << 16  # bytes; the largest that is written has about 800
_ITEM_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("u1"),
}  # fmt: skip
_KINDS = {
    "numbers": ("U8",), "positions": ("F64", "F32"), "cell": ("F64",), "pbc": ("BOOL",),
    "forces": ("F64", "F32"), "stress": ("F64",), "fixed": ("BOOL",), "tags": ("I8", "I64"),
    "energy": ("F64",), "charge": ("F64",), "spin": ("F64",), "info": ("U8",),
}  # fmt: skip
_REQUIRED = ("numbers", "positions", "cell", "pbc")
_SCALARS = ("energy", "charge", "spin")


class Field(NamedTuple):
    """Where an array lies in an entry."""

    dtype: str
    begin: int
    end: int


class Layout(NamedTuple):
    """What the header of an entry says, checked.

    atoms: their number. size: bytes of the whole entry. fields: place of each array.
    """

    atoms: int
    size: int
    fields: dict[str, Field]


def encode(structure: Structure) -> bytes:
    """Give the bytes of a structure."""
    s = structure
    arrays: dict[str, Array] = {"cell": s.cell}
    for name in _SCALARS:
        if getattr(s, name) is not None:
            arrays[name] = np.array(getattr(s, name), dtype=np.float64)
    if s.stress is not None:
        arrays["stress"] = s.stress
    arrays["positions"] = _shortest(s.positions)
    if s.forces is not None:
        arrays["forces"] = _shortest(s.forces)
    arrays["numbers"] = s.numbers.astype(np.uint8)
    arrays["pbc"] = s.pbc
    if s.fixed is not None:
        arrays["fixed"] = s.fixed
    if s.tags is not None:
        small = s.tags.astype(np.int8)
        arrays["tags"] = small if (small == s.tags).all() else s.tags
    if s.info:
        arrays["info"] = np.frombuffer(json.dumps(s.info).encode(), dtype=np.uint8)
    return _join(arrays)


def _shortest(array: Array) -> Array:
    with np.errstate(over="ignore"):
        short = array.astype(np.float32)
    return short if np.array_equal(short, array) else array


_NAMES = {
    np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.int64): "I64",
    np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8", np.dtype(np.bool_): "BOOL",
}  # fmt: skip


def _join(arrays: dict[str, Array]) -> bytes:
    """Lay arrays out as safetensors, those of large items first so that all are aligned."""
    parts, place = [], 0
    header = []
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].itemsize):
        parts.append(array.tobytes())
        end = place + array.nbytes
        shape = ",".join(map(str, array.shape))
        header.append(
            f'"{name}":{{"dtype":"{_NAMES[array.dtype]}","shape":[{shape}],'
            f'"data_offsets":[{place},{end}]}}'
        )
        place = end
    text = ("{" + ",".join(header) + "}").encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *parts])


def decode(data: bytes) -> Structure:
    """Read a structure from its bytes.

    Raises:
        DataError: the bytes are damaged.
    """
    atoms, _, places = read_layout(data)
    fields: dict[str, Any] = {}
    for name, (dtype, begin, end) in places.items():
        count = (end - begin) // _ITEM_BYTES[dtype]
        fields[name] = np.frombuffer(data, DTYPES[dtype], count, begin)
    for name in ("positions", "forces"):
        if name in fields:
            fields[name] = fields[name].reshape(atoms, 3).astype(np.float64, copy=False)
    for name in ("cell", "stress"):
        if name in fields:
            fields[name] = fields[name].reshape(3, 3)
    for name in ("numbers", "tags"):
        if name in fields:
            fields[name] = fields[name].astype(np.int64)
    for name in ("pbc", "fixed"):
        if name in fields:
            fields[name] = fields[name] != 0
    for name in _SCALARS:
        if name in fields:
            fields[name] = float(fields[name][0])
    if "info" in fields:
        fields["info"] = _info(fields["info"].tobytes())
    return Structure.trusted(**fields)


def _info(text: bytes) -> dict[str, Any]:
    try:
        info = json.loads(text)
    except ValueError as error:
        raise DataError(f"the entry is damaged (info: {error})") from None
    if not isinstance(info, dict):
        raise DataError("the entry is damaged (info is no JSON object)")
    return info


def read_layout(data: bytes) -> Layout:
    """Read and check the header of an entry; every place it gives lies inside of the entry.

    Raises:
        DataError: the bytes are damaged.
    """
    begin = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < begin or begin > _MAX_HEADER:
        raise DataError("the entry is damaged (its header is cut off)")
    layout = _parse_header(data[_LENGTH_BYTES:begin])
    if layout.size != len(data):
        raise DataError(f"the entry is damaged ({len(data)} bytes of {layout.size})")
    return layout


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> Layout:
    """Check the header of an entry; cached, because many structures have the same sizes."""
    try:
        described = orjson.loads(header)
        atoms = described["numbers"]["shape"][0]
        start = _LENGTH_BYTES + len(header)
        fields = {
            name: _field(name, entry["dtype"], entry["shape"], entry["data_offsets"], atoms, start)
            for name, entry in described.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"the entry is damaged (its header: {error!r})") from None
    missing = [name for name in _REQUIRED if name not in fields]
    if missing or atoms < 1:
        raise DataError(f"the entry is damaged (no {missing[0] if missing else 'atoms'})")
    return Layout(atoms, max(field.end for field in fields.values()), fields)


def _field(name: str, dtype: Any, shape: Any, offsets: Any, atoms: int, start: int) -> Field:
    if name not in _KINDS:
        raise DataError(f"the entry is damaged or newer than this mlip (unknown field {name!r})")
    if dtype not in _KINDS[name]:
        raise DataError(f"{name} is of type {dtype!r}, expected {' or '.join(_KINDS[name])}")
    expected = _shape(name, shape, atoms)
    if shape != expected or not all(type(size) is int and size >= 0 for size in shape):
        raise DataError(f"{name} has shape {shape}, expected {expected}")
    begin, end = offsets
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    if not (type(begin) is type(end) is int and begin >= 0 and end - begin == size):
        raise DataError(f"{name} lies at {offsets}, expected {size} bytes")
    return Field(dtype, start + begin, start + end)


def _shape(name: str, given: Any, atoms: int) -> list[int]:
    if name in ("positions", "forces"):
        return [atoms, 3]
    if name in ("cell", "stress"):
        return [3, 3]
    if name in _SCALARS:
        return []
    if name == "pbc":
        return [3]
    return [given[0]] if name == "info" and len(given) == 1 else [atoms]
