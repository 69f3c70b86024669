"""A batch of structures in one flat buffer: made from bytes, cheap to send, widened to a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from mlip.datasets.encoding import DTYPES, read_layout
from mlip.datasets.structure import MAX_ATOMIC_NUMBER, Array, Structure
from mlip.errors import DataError, InputError
from mlip.graph import AtomicGraph, neighbor_list

_ALIGNMENT = 8
_NAN, _ZERO = np.float64(np.nan).tobytes(), b"\0"
_PERIODIC = b"\1\1\1"
_PER_ATOM = {"positions": 3, "forces": 3, "numbers": 1, "fixed": 1, "tags": 1}
_PER_GRAPH = {"cell": 9, "stress": 9, "energy": 1, "charge": 1, "spin": 1, "pbc": 3}
_SCALARS = ("energy", "charge", "spin")
_SMALL = ("numbers", "fixed", "pbc")
_MISSING = {
    "forces": ("F64", _NAN), "stress": ("F64", _NAN), "energy": ("F64", _NAN),
    "charge": ("F64", _NAN), "spin": ("F64", _NAN), "fixed": ("BOOL", _ZERO), "tags": ("I8", _ZERO),
}  # fmt: skip
_NO_FILLER = ("", b"")
_TORCH = {np.dtype(f"{kind}{size}"): getattr(torch, name) for kind, size, name in (
    ("f", 8, "float64"), ("i", 8, "int64"), ("i", 4, "int32"), ("i", 2, "int16"), ("i", 1, "int8"),
    ("u", 1, "uint8"),
)}  # fmt: skip

Columns = dict[str, Array]
Edges = list[tuple[Array, Array]]


@dataclass(frozen=True)
class FlatBatch:
    """Hold a batch of structures, with or without their neighbour lists, in one tensor.

    Attributes:
        buffer: all arrays one after the other, [bytes] uint8.
        n_atoms: atoms of each structure.
        n_edges: edges of each structure.
        cutoff: Å, None if there are no neighbour lists.
        layout: (name, data type, items) of each array in the buffer.
    """

    buffer: Tensor
    n_atoms: tuple[int, ...]
    n_edges: tuple[int, ...]
    cutoff: float | None
    layout: tuple[tuple[str, str, int], ...]

    def __len__(self) -> int:
        return len(self.n_atoms)

    @classmethod
    def from_bytes(
        cls,
        entries: Sequence[bytes],
        indices: Sequence[int],
        cutoff: float | None = None,
        name: Callable[[int], str] = "structure {}".format,
    ) -> Self:
        """Join entries of the native store (see encoding.py).

        Args:
            entries: bytes of each structure.
            indices: place of each in the data set.
            cutoff: Å; neighbour lists are built if given.
            name: how errors call the structure at a place in the data set.

        Raises:
            DataError: an entry is damaged or cannot have neighbours; the text names it.
        """
        layouts = []
        for data, index in zip(entries, indices, strict=True):
            try:
                layouts.append(read_layout(data))
            except DataError as error:
                raise DataError(f"{name(index)}: {error}") from None
        n_atoms = tuple(layout.atoms for layout in layouts)
        columns: Columns = {}
        for field, width in (_PER_ATOM | _PER_GRAPH).items():
            pieces, types = [], []
            for data, layout in zip(entries, layouts, strict=True):
                place = layout.fields.get(field)
                if place is None:
                    dtype, filler = _MISSING[field]
                    types.append(dtype)
                    pieces.append(filler * (width * (layout.atoms if field in _PER_ATOM else 1)))
                else:
                    types.append(place.dtype)
                    pieces.append(data[place.begin : place.end])
            columns[field] = _concatenated(pieces, types)
        return cls._join(columns, n_atoms, indices, cutoff, name)

    @classmethod
    def from_structures(
        cls,
        structures: Sequence[Structure],
        indices: Sequence[int],
        cutoff: float | None = None,
        name: Callable[[int], str] = "structure {}".format,
    ) -> Self:
        """Join structures of any data set; arguments and errors as for :meth:`from_bytes`."""
        n_atoms = tuple(len(s) for s in structures)
        columns: Columns = {}
        for field, width in (_PER_ATOM | _PER_GRAPH).items():
            values = [getattr(s, field) for s in structures]
            filler = np.nan if _MISSING.get(field, _NO_FILLER)[0] == "F64" else 0
            if field in _SCALARS:
                columns[field] = np.array([filler if v is None else v for v in values], np.float64)
                continue
            for k, value in enumerate(values):
                if value is None:
                    values[k] = np.full(width * (n_atoms[k] if field in _PER_ATOM else 1), filler)
            columns[field] = np.concatenate(values, axis=None)
        return cls._join(columns, n_atoms, indices, cutoff, name)

    @classmethod
    def _join(
        cls,
        columns: Columns,
        n_atoms: tuple[int, ...],
        indices: Sequence[int],
        cutoff: float | None,
        name: Callable[[int], str],
    ) -> Self:
        _check(columns, n_atoms, indices, name)
        not_bulk = ~columns["pbc"].reshape(-1, 3).astype(bool).all(axis=1)
        if not_bulk.any():
            columns["stress"] = columns["stress"].reshape(-1, 9).copy()
            columns["stress"][not_bulk] = np.nan
        edges = [] if cutoff is None else _edges(columns, n_atoms, indices, cutoff, name)
        n_edges = tuple(len(shift) for _, shift in edges)
        types = dict.fromkeys(columns, np.dtype(np.float64)) | dict.fromkeys(_SMALL, DTYPES["U8"])
        types["tags"] = _smallest_type([columns["tags"]])
        types["index"] = np.dtype(np.int64)
        columns["index"] = np.asarray(indices)
        sections = {field: (dtype, columns[field].size) for field, dtype in types.items()}
        sections["edge_index"] = (np.dtype(np.int32), 2 * sum(n_edges))
        sections["edge_shift"] = (_smallest_type([s for _, s in edges]), 3 * sum(n_edges))
        layout = tuple((field, d.str[1:], n) for field, (d, n) in sections.items())
        size = sum(_padded(dtype.itemsize * n) for dtype, n in sections.values())
        flat = cls(torch.empty(size, dtype=torch.uint8), n_atoms, n_edges, cutoff, layout)
        arrays = {field: tensor.numpy() for field, tensor in flat.fields().items()}
        for field in types:
            arrays[field][:] = columns[field].reshape(-1)
        _place_edges(edges, n_atoms, arrays["edge_index"].reshape(2, -1), arrays["edge_shift"])
        return flat

    def fields(self) -> dict[str, Tensor]:
        """Give every array as a flat view of the buffer, of the type in which it travels."""
        views, begin = {}, 0
        for field, kind, items in self.layout:
            dtype = np.dtype(kind)
            end = begin + items * dtype.itemsize
            views[field] = self.buffer[begin:end].view(_TORCH[dtype])
            begin = _padded(end)
        return views

    def pin_memory(self, device: Any = None) -> Self:  # noqa: ARG002
        """Copy the buffer to pinned memory; called by torch's DataLoader."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy the buffer, and with it everything, to a device in one transfer."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))

    def to_graph(self) -> Batch:
        """Widen to the batch that :func:`mlip.graph.batch_graphs` makes of single graphs.

        Nothing in it shares memory with the buffer. Without neighbour lists there are no edges
        and `cutoff` is NaN.
        """
        views, count, total = self.fields(), len(self), sum(self.n_atoms)
        device = self.buffer.device
        offsets = torch.tensor([0, *self.n_atoms]).cumsum(0)
        per_atom = torch.tensor(self.n_atoms)
        cutoff = float("nan") if self.cutoff is None else self.cutoff
        batch = Batch(
            _base_cls=AtomicGraph,
            positions=views["positions"].view(total, 3).clone(),
            atomic_numbers=views["numbers"].long(),
            cell=views["cell"].view(count, 3, 3).clone(),
            pbc=views["pbc"].view(count, 3) != 0,
            edge_index=views["edge_index"].view(2, -1).long(),
            edge_shift=views["edge_shift"].view(-1, 3).long(),
            cutoff=torch.full((count,), cutoff, dtype=torch.float64, device=device),
            truncated=torch.zeros(count, dtype=torch.bool, device=device),
            energy=views["energy"].clone(),
            forces=views["forces"].view(total, 3).clone(),
            stress=views["stress"].view(count, 3, 3).clone(),
            charge=views["charge"].clone(),
            spin=views["spin"].clone(),
            tags=views["tags"].to(torch.int64, copy=True),
            fixed=views["fixed"] != 0,
            index=views["index"].clone(),
        )
        batch.batch = torch.repeat_interleave(per_atom).to(device)
        batch.ptr = offsets.to(device)
        self._remember_parts(batch, offsets)
        return batch

    def _remember_parts(self, batch: Batch, offsets: Tensor) -> None:
        """Note where each graph begins, which ``to_data_list`` asks for."""
        edges = torch.tensor([0, *(self.n_edges or [0] * len(self))]).cumsum(0)
        single, none = torch.arange(len(self) + 1), torch.zeros(len(self), dtype=torch.int64)
        slices = dict.fromkeys((k for k in batch.keys() if k not in _NOT_SLICED), single)  # noqa: SIM118
        for field in ("positions", "atomic_numbers", "forces", "tags", "fixed"):
            slices[field] = offsets
        slices["edge_index"] = slices["edge_shift"] = edges
        batch._num_graphs = len(self)
        batch._slice_dict = slices
        batch._inc_dict = dict.fromkeys(slices, none) | {"edge_index": offsets[:-1]}
        batch._store._num_nodes = list(self.n_atoms)


_NOT_SLICED = ("num_nodes", "batch", "ptr")


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def _concatenated(pieces: list[bytes], types: list[str]) -> Array:
    """Read pieces one after the other as one array."""
    if len(set(types)) == 1:
        return np.frombuffer(b"".join(pieces), DTYPES[types[0]])
    return np.concatenate(
        [np.frombuffer(p, DTYPES[t]) for p, t in zip(pieces, types, strict=True)]
    )


def _check(
    columns: Columns, n_atoms: Sequence[int], indices: Sequence[int], name: Callable[[int], str]
) -> None:
    """Refuse elements that do not exist and positions that are nowhere."""
    numbers, positions = columns["numbers"], columns["positions"]
    wrong = (numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)
    what = "an atomic number that is no element"
    if not wrong.any():
        wrong = ~np.isfinite(positions).reshape(-1, 3).all(axis=1)
        what = "a position that is not finite"
    if wrong.any():
        k = int(np.searchsorted(np.cumsum(n_atoms), np.flatnonzero(wrong)[0], side="right"))
        raise DataError(f"{name(indices[k])}: {what}: the entry is damaged")


def _edges(
    columns: Columns,
    n_atoms: Sequence[int],
    indices: Sequence[int],
    cutoff: float,
    name: Callable[[int], str],
) -> Edges:
    positions = columns["positions"].reshape(-1, 3)
    cells, pbc = columns["cell"].reshape(-1, 3, 3), columns["pbc"].reshape(-1, 3)
    found, begin = [], 0
    for k, count in enumerate(n_atoms):
        points = positions[begin : begin + count]
        try:
            found.append(neighbor_list(points, cells[k], pbc[k], cutoff))
        except InputError as error:
            raise DataError(f"{name(indices[k])}: {error}") from None
        begin += count
    return found


def _smallest_type(arrays: Iterable[Array]) -> np.dtype[Any]:
    """Give the shortest signed integer type that holds all values."""
    largest = max((int(np.abs(array).max()) for array in arrays if array.size), default=0)
    bits = next(b for b in (8, 16, 32, 64) if largest < 2 ** (b - 1))
    return np.dtype(f"i{bits // 8}")


def _place_edges(edges: Edges, n_atoms: Sequence[int], edge_index: Array, shift: Array) -> None:
    """Number the edges through the batch and put them where they belong."""
    begin, first_atom = 0, 0
    shift = shift.reshape(-1, 3)
    for (pairs, shifts), count in zip(edges, n_atoms, strict=bool(edges)):
        end = begin + len(shifts)
        np.add(pairs, first_atom, out=edge_index[:, begin:end], casting="unsafe")
        shift[begin:end] = shifts
        begin, first_atom = end, first_atom + count
