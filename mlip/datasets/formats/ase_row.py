"""Turn one JSON row of an ASE database into a structure without building ASE objects.

Rows come in two dialects: ASE's own (arrays as ``{"__ndarray__": [shape, dtype, flat]}``) and
plain nested lists, where null stands for what was no finite number. Both may occur in one file.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import orjson

from mlip.datasets.labels import SAME, Extracted, LabelKeys
from mlip.datasets.structure import LABELS, Array, Structure, real_array, real_scalar, stress_matrix
from mlip.errors import DataError

MAX_ROW_BYTES = 64 * 2**20  # inflated; the largest published rows have some 100 kB
# What a row holds beside labels, geometry, `data` and `key_value_pairs` and nobody misses.
_BOOKKEEPING = frozenset(
    {"unique_id", "ctime", "mtime", "user", "calculator", "calculator_parameters", "id"}
)
_GEOMETRY = frozenset({"numbers", "positions", "cell", "pbc", "tags", "constraints"})
_EXTRAS = ("key_value_pairs", "data")  # the later wins
_NO_CELL = np.zeros((3, 3))
_NO_PBC = np.zeros(3, dtype=bool)


def load_json(data: bytes | memoryview) -> Any:
    """Inflate and parse the bytes of a row.

    Raises:
        DataError: damaged or cut bytes, more than 64 MiB of text, or no JSON.
    """
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MAX_ROW_BYTES)
    except zlib.error as error:
        raise DataError(f"the compressed row is damaged ({error}): write it again") from None
    if not stream.eof:
        if len(text) >= MAX_ROW_BYTES:
            raise DataError(
                f"the row inflates to more than {MAX_ROW_BYTES >> 20} MiB "
                f"({len(data)} bytes in the file): no structure needs that much"
            )
        raise DataError(f"the compressed row ends early ({len(data)} bytes): write it again")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DataError(_what_is_wrong(text, error)) from None


def extract_row(row: Any, keys: LabelKeys) -> Extracted:
    """Read a structure with its labels from a parsed row.

    Labels are taken from the row itself, else from ``data`` or ``key_value_pairs``; two that
    contradict each other are refused. ``free_energy`` is not the energy. A key named by the caller
    is the only one used for its label.

    Raises:
        DataError: bad content; the text names the field.
    """
    if not isinstance(row, dict):
        raise DataError(f"the row is a JSON {type(row).__name__}, expected an object")
    numbers = _numbers(row)
    info = _extras(row)
    labels, used = _labels(row, info, keys, len(numbers))
    scalars = {name: info.pop(name) for name in ("charge", "spin") if _is_number(info.get(name))}
    fixed, other_constraints = _fixed(row.get("constraints"), len(numbers))
    cell, pbc, tags = row.get("cell"), row.get("pbc"), row.get("tags")
    structure = Structure(
        numbers=numbers,
        positions=plain_array("positions", _required(row, "positions")),
        cell=_NO_CELL if cell is None else plain_array("cell", cell),
        pbc=_NO_PBC if pbc is None else plain_array("pbc", pbc),
        tags=None if tags is None else plain_array("tags", tags),
        fixed=fixed, info=info, **labels, **scalars,
    )  # fmt: skip
    known = _BOOKKEEPING.union(_GEOMETRY, _EXTRAS, (name for name, _ in used.values()))
    not_kept = [f"{name} (row)" for name in row if name not in known]
    sources = {label: f"{name} ({place})" for label, (name, place) in used.items()}
    return Extracted(structure, sources, (*other_constraints, *not_kept))


def count_atoms(row: Any) -> int:
    """Give the number of atoms of a parsed row.

    Raises:
        DataError: the row has no list of numbers.
    """
    return len(_numbers(row if isinstance(row, dict) else {}))


def plain_array(name: str, value: Any) -> Array:
    """Read an array in any dialect: nested lists, a tagged array, a tagged cell.

    Raises:
        DataError: no numbers of one regular shape.
    """
    if type(value) is dict:
        value = value.get("array", value)  # a cell: {"array": ..., "__ase_objtype__": "cell"}
    shape = None
    if type(value) is dict:
        shape, value = _tag_parts(name, value)
    try:
        array = np.array(value) if shape is None else np.array(value).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{name} does not hold numbers of one regular shape") from None
    if array.dtype.kind not in "biufO":
        raise DataError(f"{name} holds text or other things, expected numbers")
    return array


def untagged(value: Any) -> Any:
    """Replace ASE's tags by plain JSON: arrays are lists, complex numbers [real, imaginary]."""
    if isinstance(value, list):
        return [untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__ndarray__" in value:
        shape, flat = _tag_parts("an array", value)
        if str(value["__ndarray__"][1]).startswith("complex"):
            shape = [*shape, 2]
        try:
            return np.array(flat, dtype=object).reshape(shape).tolist() if flat else []
        except (ValueError, OverflowError):
            raise DataError(f"an array of {len(flat)} values claims the shape {shape}") from None
    for tag in ("__complex__", "__datetime__"):
        if tag in value:
            return value[tag]
    return {key: untagged(item) for key, item in value.items()}


def _tag_parts(name: str, value: dict[str, Any]) -> tuple[list[int], list[Any]]:
    parts = value.get("__ndarray__")
    if not (isinstance(parts, list) and len(parts) == 3):
        raise DataError(f"{name} is an object {sorted(value)[:3]}, expected an array")
    shape, _, flat = parts
    if not isinstance(shape, list) or not isinstance(flat, list):
        raise DataError(f"{name} is no array with a shape and a list of values")
    if any(type(n) is not int or n < 0 for n in shape):
        raise DataError(f"{name} claims the shape {shape}")
    return shape, flat


def _what_is_wrong(text: bytes, error: Exception) -> str:
    """Say why orjson refused a row: bare NaN, or no JSON at all."""
    found: list[str] = []

    def constant(name: str) -> float:
        found.append(name)
        return math.nan

    try:
        row = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError):
        return f"the row is no JSON ({error}): write it again"
    if not found:
        return f"the row is no JSON ({error}): write it again"
    items = row.items() if isinstance(row, dict) else ()
    fields = [key for key, value in items if _has_constant(value)]
    return f"{', '.join(fields) or 'the row'} holds {found[0]}, expected finite numbers"


def _has_constant(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_constant, value.values()))
    if isinstance(value, list):
        return any(map(_has_constant, value))
    return isinstance(value, float) and not math.isfinite(value)


def _required(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise DataError(f"{name} is missing")
    return value


def _numbers(row: dict[str, Any]) -> Array:
    numbers = plain_array("numbers", _required(row, "numbers"))
    if numbers.ndim != 1:
        raise DataError(f"numbers has shape {numbers.shape}, expected (N,)")
    return numbers


def _extras(row: dict[str, Any]) -> dict[str, Any]:
    info: dict[str, Any] = {}
    for name in _EXTRAS:
        extra = row.get(name)
        if extra is None:
            continue
        try:
            extra = untagged(extra)
        except RecursionError:
            raise DataError(f"{name} is nested too deeply") from None
        if not isinstance(extra, dict):
            raise DataError(f"{name} is a JSON {type(extra).__name__}, expected an object")
        info.update(extra)
    return info


class _Found(NamedTuple):
    name: str
    place: str  # "row" or "data"


def _labels(
    row: dict[str, Any], info: dict[str, Any], keys: LabelKeys, n: int
) -> tuple[dict[str, Any], dict[str, _Found]]:
    """Give the labels and where each was found; takes label keys out of ``info``."""
    if keys.virial is not None:
        raise DataError("virial labels are read from files that ASE opens, rows have a stress")
    values: dict[str, Any] = {}
    used: dict[str, _Found] = {}
    for label in LABELS:
        name = getattr(keys, label) or label
        if name in row:
            values[label], used[label] = _label(label, name, row[name]), _Found(name, "row")
            if name in info:
                _check_same(label, name, values[label], _label(label, name, info[name]), n)
        elif name in info:
            values[label], used[label] = _label(label, name, info[name]), _Found(name, "data")
        elif name != label:
            raise DataError(f"{name} is missing, which was named as the key of the {label}")
    for name in (*LABELS, *keys.named().values()):
        info.pop(name, None)
    return values, used


def _label(label: str, name: str, value: Any) -> Any:
    """Read the value of a label; its shape is checked later."""
    if value is None:
        raise DataError(f"{name} is null: it was no finite number when the row was written")
    return value if label == "energy" and _is_number(value) else plain_array(name, value)


def _check_same(label: str, name: str, a: Any, b: Any, n: int) -> None:
    """Compare the label of the row with the one in ``data``."""
    own, other = f"{name} of the row", f"{name} in data"
    if label == "energy":
        a, b = real_scalar(own, a), real_scalar(other, b)
    elif label == "stress":
        a, b = stress_matrix(a, own), stress_matrix(b, other)
    else:
        a, b = real_array(own, a, (n, 3)), real_array(other, b, (n, 3))
    absolute, relative = SAME[label]
    if not np.allclose(a, b, rtol=relative, atol=absolute):
        difference = np.abs(np.subtract(a, b)).max()
        raise DataError(
            f"conflicting {label}: {own} and {other} differ by {difference:.4g}: name the key "
            "of the right one, or write the rows again"
        )


def _fixed(constraints: Any, n: int) -> tuple[Array | None, list[str]]:
    """Read FixAtoms as a mask; name the other constraints."""
    if constraints is None:
        return None, []
    if not isinstance(constraints, list) or not all(isinstance(c, dict) for c in constraints):
        raise DataError("constraints is no list of objects")
    fixed: Array | None = None
    others: list[str] = []
    for constraint in constraints:
        if constraint.get("name") != "FixAtoms":
            others.append(f"constraint {constraint.get('name')}")
            continue
        fixed = np.zeros(n, dtype=bool) if fixed is None else fixed
        arguments = constraint.get("kwargs")
        arguments = arguments if isinstance(arguments, dict) else {}
        if "indices" in arguments:
            fixed |= _mask_of(plain_array("constraints (FixAtoms)", arguments["indices"]), n)
        elif "mask" in arguments:
            fixed |= _flags("constraints (FixAtoms mask)", arguments["mask"], n)
    return fixed, sorted(set(others))


def _mask_of(indices: Array, n: int) -> Array:
    mask = np.zeros(n, dtype=bool)
    if indices.size == 0:
        return mask
    if indices.dtype.kind == "b" and indices.shape == (n,):
        return indices
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise DataError("constraints: the indices of FixAtoms are no list of whole numbers")
    low, high = int(indices.min()), int(indices.max())
    if low < -n or high >= n:
        wrong = low if low < -n else high
        raise DataError(f"constraints: FixAtoms names atom {wrong}, there are {n} atoms")
    mask[indices] = True
    return mask


def _flags(name: str, value: Any, n: int) -> Array:
    array = plain_array(name, value)
    if array.shape != (n,) or array.dtype.kind not in "biu":
        raise DataError(f"{name} has shape {array.shape}, expected {n} times true or false")
    return array.astype(bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
