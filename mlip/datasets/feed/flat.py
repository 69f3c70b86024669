"""A batch of structures in one flat buffer: made from bytes, cheap to send, widened to a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from mlip.datasets.feed.columns import (
    Columns,
    Edges,
    Names,
    check_columns,
    columns_of_bytes,
    columns_of_structures,
    neighbor_lists,
)
from mlip.datasets.feed.noise import BatchNoise, mark_noise
from mlip.datasets.structure import Array, Structure
from mlip.graph import AtomicGraph

_ALIGNMENT = 8
_SMALL = ("numbers", "fixed", "pbc", "noise_mask", "noisy")  # one byte each
_TORCH = {
    "f8": torch.float64, "i8": torch.int64, "i4": torch.int32, "i2": torch.int16, "i1": torch.int8,
    "u1": torch.uint8,
}  # fmt: skip
_FIELDS = (
    "edge_index", "positions", "atomic_numbers", "cell", "pbc", "edge_shift", "cutoff", "truncated",
    "energy", "forces", "stress", "charge", "spin", "tags", "fixed", "index",
)  # fmt: skip
_ATOM_FIELDS = ("positions", "atomic_numbers", "forces", "tags", "fixed")


Section = tuple[str, int, int]  # numpy's name of the type of an array, its first and last byte


@dataclass(frozen=True)
class FlatBatch:
    """Hold a batch of structures, with or without their neighbour lists, in one tensor.

    Attributes:
        buffer: all arrays one after the other, [bytes] uint8.
        sections: where each array lies in the buffer.
        n_atoms: atoms of each structure.
        n_edges: edges of each structure, zeros without neighbour lists.
        cutoff: Å, NaN if there are no neighbour lists.
    """

    buffer: Tensor
    sections: dict[str, Section]
    n_atoms: tuple[int, ...]
    n_edges: tuple[int, ...]
    cutoff: float

    def __len__(self) -> int:
        return len(self.n_atoms)

    @classmethod
    def from_bytes(
        cls,
        entries: Sequence[bytes],
        indices: Sequence[int],
        cutoff: float | None = None,
        name: Callable[[int], str] = "structure {}".format,
        noise: BatchNoise | None = None,
    ) -> Self:
        """Join entries of the native store (see encoding.py).

        Args:
            entries: bytes of each structure.
            indices: place of each in the data set.
            cutoff: Å; neighbour lists are built if given.
            name: how errors call the structure at a place in the data set.
            noise: moves atoms before neighbours are found, and leaves its marks in the batch.

        Raises:
            DataError: an entry is damaged or cannot have neighbours; the text names it.
        """
        names = Names(indices, name)
        return cls._join(*columns_of_bytes(entries, names), names, cutoff, noise)

    @classmethod
    def from_structures(
        cls,
        structures: Sequence[Structure],
        indices: Sequence[int],
        cutoff: float | None = None,
        name: Callable[[int], str] = "structure {}".format,
        noise: BatchNoise | None = None,
    ) -> Self:
        """Join structures of any data set; arguments and errors as for :meth:`from_bytes`."""
        names = Names(indices, name)
        return cls._join(*columns_of_structures(structures), names, cutoff, noise)

    @classmethod
    def _join(
        cls,
        n_atoms: tuple[int, ...],
        columns: Columns,
        names: Names,
        cutoff: float | None,
        noise: BatchNoise | None,
    ) -> Self:
        check_columns(columns, n_atoms, names)
        bulk = columns["pbc"].reshape(-1, 3).min(axis=1) > 0
        if not bulk.all():  # the stress of anything else is no label, as in structure_to_graph
            columns["stress"] = np.where(bulk.repeat(9), columns["stress"].reshape(-1), np.nan)
        if noise is not None:
            noise.corrupt_columns(columns, n_atoms, names.indices)
        edges: Edges = []
        if cutoff is not None:
            edges = neighbor_lists(columns, n_atoms, cutoff, names)
        columns["index"] = np.asarray(names.indices, dtype=np.int64)
        n_edges = tuple([len(shift) for _, shift in edges]) or (0,) * len(n_atoms)
        sections, size = _plan(columns, edges, sum(n_edges))
        buffer = np.empty(size, dtype=np.uint8)
        arrays = {f: buffer[begin:end].view(kind) for f, (kind, begin, end) in sections.items()}
        for field, column in columns.items():
            arrays[field][:] = column.reshape(-1)
        _place_edges(edges, n_atoms, arrays["edge_index"].reshape(2, -1), arrays["edge_shift"])
        tensor = torch.from_numpy(buffer)
        return cls(tensor, sections, n_atoms, n_edges, np.nan if cutoff is None else cutoff)

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes, not as a tensor: torch would open a shared file for each batch, which costs
        # more than copying it and needs a large /dev/shm.
        content = (self.sections, self.n_atoms, self.n_edges, self.cutoff)
        return _received, (bytearray(self.buffer.numpy()), *content)

    def pin_memory(self, device: Any = None) -> Self:  # noqa: ARG002
        """Copy the buffer to pinned memory; called by torch's DataLoader."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy the buffer, and with it everything, to a device in one transfer."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))

    def array(self, field: str) -> Tensor:
        """Give a flat view of an array in the buffer, of the type in which it travels."""
        kind, begin, end = self.sections[field]
        return self.buffer[begin:end].view(_TORCH[kind])

    def to_graph(self) -> Batch:
        """Widen to the batch that :func:`mlip.graph.batch_graphs` makes of single graphs.

        Nothing in it shares memory with the buffer. Without neighbour lists there are no edges
        and `cutoff` is NaN.
        """
        count, total, device = len(self), sum(self.n_atoms), self.buffer.device
        sizes = torch.tensor(self.n_atoms)
        offsets = torch.tensor((0, *self.n_atoms)).cumsum(0)
        batch = copy.copy(_empty_batch())
        for field, tensor in {
            "edge_index": self.array("edge_index").view(2, -1).long(),
            "positions": self.array("positions").view(total, 3).clone(),
            "atomic_numbers": self.array("numbers").long(),
            "cell": self.array("cell").view(count, 3, 3).clone(),
            "pbc": self.array("pbc").view(count, 3) != 0,
            "edge_shift": self.array("edge_shift").view(-1, 3).long(),
            "cutoff": torch.full((count,), self.cutoff, dtype=torch.float64, device=device),
            "truncated": torch.zeros(count, dtype=torch.bool, device=device),
            "energy": self.array("energy").clone(),
            "forces": self.array("forces").view(total, 3).clone(),
            "stress": self.array("stress").view(count, 3, 3).clone(),
            "charge": self.array("charge").clone(),
            "spin": self.array("spin").clone(),
            "tags": self.array("tags").to(torch.int64, copy=True),
            "fixed": self.array("fixed") != 0,
            "index": self.array("index").clone(),
            "num_nodes": total,
            "batch": torch.repeat_interleave(sizes).to(device),
            "ptr": offsets.to(device),
        }.items():
            batch._store[field] = tensor
        self._remember_parts(batch, offsets)
        if "noise" in self.sections:
            noise = self.array("noise").view(total, 3).clone()
            mark_noise(batch, noise, self.array("noise_mask") != 0, self.array("noisy") != 0)
        return batch

    def _remember_parts(self, batch: Batch, offsets: Tensor) -> None:
        """Note where each graph begins, which ``to_data_list`` asks for."""
        single, none = torch.arange(len(self) + 1), torch.zeros(len(self), dtype=torch.int64)
        edges = torch.tensor((0, *self.n_edges)).cumsum(0)
        slices = dict.fromkeys(_FIELDS, single) | dict.fromkeys(_ATOM_FIELDS, offsets)
        store = batch._store
        store._slice_dict = slices | {"edge_index": edges, "edge_shift": edges}
        store._inc_dict = dict.fromkeys(_FIELDS, none) | {"edge_index": offsets[:-1]}
        store._num_graphs = len(self)
        store._num_nodes = list(self.n_atoms)


@cache
def _empty_batch() -> Batch:
    return Batch(_base_cls=AtomicGraph)


def _received(buffer: bytearray, *content: Any) -> FlatBatch:
    return FlatBatch(torch.frombuffer(buffer, dtype=torch.uint8), *content)


def _plan(columns: Columns, edges: Edges, n_edges: int) -> tuple[dict[str, Section], int]:
    """Say where each array lies in the buffer, and how long that is."""
    kinds = {field: "u1" if field in _SMALL else "f8" for field in columns} | {"index": "i8"}
    kinds["tags"] = _smallest_kind([columns["tags"]])
    items = {field: column.size for field, column in columns.items()}
    kinds["edge_index"], items["edge_index"] = "i4", 2 * n_edges
    kinds["edge_shift"], items["edge_shift"] = _smallest_kind([s for _, s in edges]), 3 * n_edges
    sections, begin = {}, 0
    for field, kind in kinds.items():
        end = begin + items[field] * int(kind[1:])
        sections[field] = (kind, begin, end)
        begin = end + -end % _ALIGNMENT
    return sections, begin


def _smallest_kind(arrays: Sequence[Array]) -> str:
    """Name the shortest signed integer type that holds all values."""
    low = min((int(array.min()) for array in arrays if array.size), default=0)
    high = max((int(array.max()) for array in arrays if array.size), default=0)
    return next(f"i{n}" for n in (1, 2, 4, 8) if -(256**n) <= 2 * low and 2 * high < 256**n)


def _place_edges(edges: Edges, n_atoms: Sequence[int], edge_index: Array, shift: Array) -> None:
    """Number the edges through the batch and put them where they belong."""
    begin, first_atom = 0, 0
    shift = shift.reshape(-1, 3)
    for (pairs, shifts), count in zip(edges, n_atoms, strict=bool(edges)):
        end = begin + len(shifts)
        np.add(pairs, first_atom, out=edge_index[:, begin:end], casting="unsafe")
        shift[begin:end] = shifts
        begin, first_atom = end, first_atom + count
