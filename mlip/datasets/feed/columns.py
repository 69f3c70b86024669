"""The fields of many structures as one array each, from store bytes or from structures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlip.datasets.encoding import DTYPES, Layout, read_layout
from mlip.datasets.structure import MAX_ATOMIC_NUMBER, Array, Structure
from mlip.errors import DataError, InputError
from mlip.graph import neighbor_list

Columns = dict[str, Array]
Edges = list[tuple[Array, Array]]  # edge_index [2, E] and edge_shift [E, 3] of each structure

PER_ATOM = {"positions": 3, "forces": 3, "numbers": 1, "fixed": 1, "tags": 1}  # field: width
_PER_STRUCTURE = {"cell": 9, "stress": 9, "energy": 1, "charge": 1, "spin": 1, "pbc": 3}
_WIDTHS = PER_ATOM | _PER_STRUCTURE
_SCALARS = ("energy", "charge", "spin")
_FILLERS = dict.fromkeys(_WIDTHS, np.full(1, np.nan)) | {
    "fixed": np.zeros(1, dtype=np.uint8), "tags": np.zeros(1, dtype=np.int8),
}  # fmt: skip


class Names:
    """How errors call the structures of a batch: asked for only when one is bad."""

    def __init__(self, indices: Sequence[int], name: Callable[[int], str]) -> None:
        self.indices = indices
        self._name = name

    def error(self, place: int, problem: object) -> DataError:
        """Give the error for the structure at a place in the batch."""
        return DataError(f"{self._name(int(self.indices[place]))}: {problem}")


def columns_of_bytes(entries: Sequence[bytes], names: Names) -> tuple[tuple[int, ...], Columns]:
    """Take entries of the native store apart; give numbers of atoms and the fields.

    Raises:
        DataError: an entry is damaged; the text names it.
    """
    layouts = []
    for place, data in enumerate(entries):
        try:
            layouts.append(read_layout(data))
        except DataError as error:
            raise names.error(place, error) from None
    n_atoms = tuple([layout.atoms for layout in layouts])
    return n_atoms, {field: _joined(field, entries, layouts) for field in _WIDTHS}


def _joined(field: str, entries: Sequence[bytes], layouts: Sequence[Layout]) -> Array:
    """Join one field of all entries; those that lack it get its filler."""
    places = [layout.fields.get(field) for layout in layouts]
    types = {place[0] for place in places if place}
    if len(types) > 1:  # float32 and float64, or short and long tags
        arrays = [
            np.frombuffer(data[p.begin : p.end], DTYPES[p.dtype]) if p else _missing(field, layout)
            for data, p, layout in zip(entries, places, layouts, strict=True)
        ]
        return np.concatenate(arrays)
    dtype = DTYPES[types.pop()] if types else _FILLERS[field].dtype
    pieces = [
        data[p[1] : p[2]] if p else _missing(field, layout).astype(dtype).tobytes()
        for data, p, layout in zip(entries, places, layouts, strict=True)
    ]
    return np.frombuffer(b"".join(pieces), dtype)


def _missing(field: str, layout: Layout) -> Array:
    items = _WIDTHS[field] * (layout.atoms if field in PER_ATOM else 1)
    return _FILLERS[field].repeat(items)


def columns_of_structures(structures: Sequence[Structure]) -> tuple[tuple[int, ...], Columns]:
    """Take structures apart; give numbers of atoms and the fields."""
    n_atoms = tuple([len(s) for s in structures])
    columns: Columns = {}
    for field, width in _WIDTHS.items():
        values: list[Any] = [getattr(s, field) for s in structures]
        filler = _FILLERS[field]
        if field in _SCALARS:
            columns[field] = np.array([np.nan if v is None else v for v in values])
            continue
        for k, value in enumerate(values):
            if value is None:
                values[k] = filler.repeat(width * (n_atoms[k] if field in PER_ATOM else 1))
        columns[field] = np.concatenate(values, axis=None)
    return n_atoms, columns


def check_columns(columns: Columns, n_atoms: Sequence[int], names: Names) -> None:
    """Refuse elements that do not exist and positions that are nowhere.

    Raises:
        DataError: names the first structure that has them.
    """
    numbers, positions = columns["numbers"], columns["positions"]
    if 1 <= numbers.min() <= numbers.max() <= MAX_ATOMIC_NUMBER and np.isfinite(positions).all():
        return
    wrong = np.flatnonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))
    if len(wrong):
        what = f"atomic number {numbers[wrong[0]]} is no element"
    else:
        what = "a position is not finite"
        wrong = np.flatnonzero(~np.isfinite(positions)) // 3
    place = np.searchsorted(np.cumsum(n_atoms), wrong[0], side="right")
    raise names.error(int(place), f"the entry is damaged ({what})")


def neighbor_lists(columns: Columns, n_atoms: Sequence[int], cutoff: float, names: Names) -> Edges:
    """Build the neighbour list of every structure.

    Raises:
        DataError: a structure cannot have one; the text names it.
    """
    positions = columns["positions"].reshape(-1, 3)
    cells, pbc = columns["cell"].reshape(-1, 3, 3), columns["pbc"].reshape(-1, 3)
    found, begin = [], 0
    for place, count in enumerate(n_atoms):
        points = positions[begin : begin + count]
        try:
            found.append(neighbor_list(points, cells[place], pbc[place], cutoff))
        except InputError as error:
            raise names.error(place, error) from None
        begin += count
    return found
