"""Turn the fields of one OC20-style entry into a checked structure; errors name the field.

The fields have had other names, types and shapes over the years: float or small integer atomic
numbers, ``y`` or ``energy``, ``force`` or ``forces``, plain numbers or tensors of one element.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlip.datasets.labels import Extracted, LabelKeys
from mlip.datasets.options import ReadOptions, RelaxationFrame
from mlip.datasets.structure import (
    FLAT_CELL,
    MAX_ATOMIC_NUMBER,
    Array,
    Structure,
    json_info,
    real_array,
    stress_matrix,
)  # fmt: skip
from mlip.errors import DataError

# Graphs of a fixed cutoff, cut to the nearest neighbours: of no use to any other model.
DROPPED = frozenset(
    {
        "edge_index", "cell_offsets", "distances", "edge_distance_vec", "nedges", "neighbors",
        "edge_attr", "batch", "ptr",
    }
)  # fmt: skip
_GEOMETRY = frozenset({"pos", "cell", "atomic_numbers", "natoms", "pbc", "tags", "fixed"})
MAX_TAG = 2**31
_MAX_INFO = 100_000  # numbers in one extra field
Fields = Mapping[str, Any]


def is_relaxation(fields: Fields) -> bool:
    """Tell whether an entry is one of IS2RE: energies of first and last frame, none of its own."""
    return "y_relaxed" in fields and "y" not in fields and "energy" not in fields


def count_atoms(fields: Fields) -> int:
    """Give the number of atoms, checked against the positions.

    Raises:
        DataError: no positions, of a wrong shape, none at all, or ``natoms`` disagrees.
    """
    pos = _field(fields, "pos")
    if not isinstance(pos, np.ndarray) or pos.ndim != 2 or pos.shape[1] != 3:
        raise DataError(f"pos has shape {np.shape(pos)}, expected (N, 3)")
    if "natoms" in fields and (natoms := _number("natoms", fields["natoms"])) != len(pos):
        raise DataError(f"natoms is {natoms:g}, but pos has {len(pos)} rows")
    if len(pos) == 0:
        raise DataError("pos has no rows: there are no atoms, expected at least one")
    return len(pos)


def extract_entry(fields: Fields, options: ReadOptions) -> Extracted:
    """Check an entry and make a structure of it.

    Args:
        fields: content of the entry, as :func:`mlip.datasets.formats.pickles.loads` gives it.
        options: what is meant by its energy, and which frame of an IS2RE entry.

    Raises:
        DataError: a field is missing, of a wrong shape, not finite, or contradicts another.
    """
    n = count_atoms(fields)
    frame = options.is2re if is_relaxation(fields) else None
    relaxed = frame == "relaxed"
    positions = real_array("pos", _real("pos", fields["pos"]), (n, 3))
    if "pos_relaxed" in fields:
        last = real_array("pos_relaxed", _real("pos_relaxed", fields["pos_relaxed"]), (n, 3))
        positions = last if relaxed else positions
    elif relaxed:
        raise DataError("pos_relaxed is missing, the positions of the relaxed frame")
    pbc = _flags("pbc", fields["pbc"], 3) if "pbc" in fields else np.ones(3, dtype=bool)
    labels: dict[str, Any] = {}
    used = _energy(fields, options.keys, frame, labels)
    used |= {} if relaxed else _forces(fields, options.keys, n, labels)
    used |= {} if relaxed else _stress(fields, options.keys, labels)
    _check_edges(fields, n)
    info, not_kept = _info(fields, _taken(used, options.keys, relaxed))
    for name in ("charge", "spin"):
        if name in fields:
            labels[name] = _number(name, fields[name])
    structure = Structure.trusted(
        numbers=_elements(fields, n),
        positions=positions,
        cell=_cell(fields, pbc),
        pbc=pbc,
        tags=_whole("tags", fields["tags"], n, -MAX_TAG, MAX_TAG) if "tags" in fields else None,
        fixed=_flags("fixed", fields["fixed"], n) if "fixed" in fields else None,
        info=info,
        **labels,
    )
    return Extracted(structure, {k: f"{v} (entry)" for k, v in used.items()}, not_kept)


def _field(fields: Fields, name: str) -> Any:
    if name not in fields:
        raise DataError(f"{name} is missing")
    return fields[name]


def _real(name: str, value: Any) -> Any:
    """Refuse what numpy would turn into real numbers in its own way (text, complex, objects)."""
    if not isinstance(value, np.ndarray | np.generic):
        try:
            value = np.asarray(value)
        except ValueError:
            raise DataError(f"{name} does not hold numbers of one regular shape") from None
    if value.dtype.kind not in "fiub":
        raise DataError(f"{name} holds {value.dtype.name}, expected real numbers")
    return value


def _number(name: str, value: Any) -> float:
    """Read one finite number, also from an array that holds a single one."""
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise DataError(f"{name} has shape {value.shape}, expected one number")
        value = _real(name, value).reshape(-1)[0]
    if not isinstance(value, int | float | np.integer | np.floating) or value is True:
        raise DataError(f"{name} is {value!r:.60}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if not np.isfinite(number):
        raise DataError(f"{name} is {number}, expected a finite number")
    return number


def _elements(fields: Fields, n: int) -> Array:
    return _whole("atomic_numbers", _field(fields, "atomic_numbers"), n, 1, MAX_ATOMIC_NUMBER)


def _whole(name: str, value: Any, n: int, least: int, most: int) -> Array:
    """Read [n] whole numbers within limits; they may be stored as real numbers."""
    value = _real(name, value)
    if value.shape != (n,):
        raise DataError(f"{name} has shape {value.shape}, expected {(n,)}")
    for number in set(value.tolist()):  # few different ones, so this is quick
        if not least <= number <= most or number != int(number):
            raise DataError(f"{name} holds {number:g}, expected whole numbers {least} to {most}")
    whole: Array = value.astype(np.int64)
    return whole


def _flags(name: str, value: Any, n: int) -> Array:
    return _whole(name, np.reshape(_real(name, value), -1), n, 0, 1) != 0


def _cell(fields: Fields, pbc: Array) -> Array:
    value = _real("cell", _field(fields, "cell"))
    shape = np.shape(value)
    if shape not in {(1, 3, 3), (3, 3)}:
        raise DataError(f"cell has shape {shape}, expected (1, 3, 3)")
    cell = real_array("cell", np.reshape(value, (3, 3)), (3, 3))
    if pbc.all():
        (a, b, c), (d, e, f), (g, h, i) = cell.tolist()
        volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
        box = ((a * a + b * b + c * c) * (d * d + e * e + f * f) * (g * g + h * h + i * i)) ** 0.5
        if not volume > FLAT_CELL * box:
            raise DataError(
                "cell has no volume, but OC20 entries are periodic along a, b and c "
                f"(its rows are {cell.tolist()})"
            )
    elif pbc.any():
        Structure(np.ones(1), np.zeros((1, 3)), cell, pbc)  # checks the cell
    return cell


def _energy(
    fields: Fields, keys: LabelKeys, frame: RelaxationFrame | None, labels: dict[str, Any]
) -> dict[str, str]:
    """Find the energy; give the label and the field it was found under."""
    if keys.energy is not None:
        names: tuple[str, ...] = (keys.energy,)
    elif is_relaxation(fields):
        names = ("y_init",) if frame == "initial" else ("y_relaxed",)
    else:
        names = ("y", "energy")
    found = {name: _number(name, fields[name]) for name in names if name in fields}
    if len(set(found.values())) > 1:
        raise DataError(f"y is {found['y']}, but energy is {found['energy']}: which one is meant?")
    for name in ("y_init", "y_relaxed"):
        if name in fields:
            _number(name, fields[name])
    for name, value in found.items():
        labels["energy"] = value
        return {"energy": name}
    return {}


def _forces(fields: Fields, keys: LabelKeys, n: int, labels: dict[str, Any]) -> dict[str, str]:
    names = ("force", "forces") if keys.forces is None else (keys.forces,)
    found = {
        name: real_array(name, _real(name, fields[name]), (n, 3))
        for name in names
        if name in fields
    }
    if len(found) == 2 and (found["force"] != found["forces"]).any():
        raise DataError("force and forces differ: which one is meant?")
    for name, value in found.items():
        labels["forces"] = value
        return {"forces": name}
    return {}


def _stress(fields: Fields, keys: LabelKeys, labels: dict[str, Any]) -> dict[str, str]:
    name = keys.stress or "stress"
    if name not in fields:
        return {}
    value = np.asarray(_real(name, fields[name]))
    if value.shape in {(1, 3, 3), (1, 9), (1, 6)}:
        value = value[0]
    labels["stress"] = stress_matrix(value, name)
    return {"stress": name}


def _check_edges(fields: Fields, n: int) -> None:
    """Check the stored graph, although it is not kept: a damaged one means a damaged entry."""
    if "edge_index" not in fields:
        return
    edges = fields["edge_index"]
    if not isinstance(edges, np.ndarray) or edges.ndim != 2 or len(edges) != 2:
        raise DataError(f"edge_index has shape {np.shape(edges)}, expected (2, E)")
    if edges.dtype.kind not in "iu":
        raise DataError(f"edge_index is of type {edges.dtype}, expected integers")
    count = edges.shape[1]
    if count and (edges.min() < 0 or edges.max() >= n):
        wrong = edges[(edges < 0) | (edges >= n)][0]
        raise DataError(f"edge_index names atom {wrong}, but there are {n}")
    for name, shape in (("cell_offsets", (count, 3)), ("distances", (count,))):
        if name in fields and np.shape(fields[name]) != shape:
            have = np.shape(fields[name])
            raise DataError(f"{name} has shape {have}, expected {shape} as edge_index says")


def _taken(used: Mapping[str, str], keys: LabelKeys, relaxed: bool) -> set[str]:
    """Name the fields that have a place of their own; the energies of a relaxation stay."""
    names = {name for name in used.values() if not name.startswith("y_")}
    if not keys.named():
        names |= {"y", "energy", "force", "forces", "stress"}
    if relaxed:
        names.add("pos_relaxed")
    return names | _GEOMETRY | DROPPED | {"charge", "spin"}


def _info(fields: Fields, taken: set[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keep every other field that JSON can hold; also name those that it cannot."""
    info: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in fields.items():
        if name in taken:
            continue
        if type(value) in {int, float, str, bool}:
            info[name] = value
        elif isinstance(value, np.ndarray | np.generic):
            if value.size > _MAX_INFO or value.dtype.kind not in "fiubU":
                lost.append(name)
            else:
                info[name] = value.item() if value.size == 1 else value.tolist()
        else:
            kept, bad = json_info({name: value})
            info |= kept
            lost += bad
    return info, tuple(lost)
