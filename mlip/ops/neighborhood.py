"""Edges of a batch arranged for dense linear algebra over the neighbours of each atom."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mlip.ops.cpu.runner import EdgeList

FILL = 0.7  # atoms share a bucket while their neighbour counts differ by less than this factor


class Bucket(NamedTuple):
    """Atoms with similar numbers of neighbours.

    edges: [n, D] edge of each neighbour slot; E (one past the last edge) marks an empty slot.
    sources: [n, D] neighbouring atom of each slot; 0 in empty slots.
    """

    edges: Tensor
    sources: Tensor


class Padded(NamedTuple):
    """Edges as padded rows of neighbours.

    buckets: all atoms that have neighbours, by falling count; restore: [N] row of each atom in the
    concatenation of all buckets and one row of zeros.
    """

    buckets: tuple[Bucket, ...]
    restore: Tensor


class Neighborhood:
    """Edges sorted by target.

    source, target: [E]; n_nodes: N; rowptr: [N + 1] first edge of each atom, and E.
    as_list: the same for kernels on the CPU, which have found that all edges exist; None before.
    """

    def __init__(self, source: Tensor, target: Tensor, n_nodes: int, rowptr: Tensor) -> None:
        self.source, self.target, self.n_nodes, self.rowptr = source, target, n_nodes, rowptr
        self.as_list: EdgeList | None = None
        self._padded: Padded | None = None

    def first(self, count: int) -> Neighborhood:
        """The first edges, at most so many, of the same atoms."""
        return Neighborhood(
            self.source[:count], self.target[:count], self.n_nodes, self.rowptr.clamp(max=count)
        )

    @property
    def padded(self) -> Padded:
        """The same edges as padded rows, made when first asked for."""
        if self._padded is None:
            self._padded = _padded(self.source, self.rowptr)
        return self._padded


def neighborhood(edge_index: Tensor, n_nodes: int) -> Neighborhood:
    """Index edges that are sorted by target.

    Args:
        edge_index: [2, E]; row 0 source, row 1 target, targets ascending.
        n_nodes: N.
    """
    source, target = edge_index[0], edge_index[1]
    return Neighborhood(source, target, n_nodes, row_pointers(target, n_nodes))


def row_pointers(target: Tensor, n_nodes: int) -> Tensor:
    """Give the first edge of each atom, and E; [N + 1] int64, for ascending targets [E]."""
    nodes = torch.arange(n_nodes + 1, device=target.device)
    return torch.searchsorted(target.contiguous(), nodes)


def _padded(source: Tensor, rowptr: Tensor) -> Padded:
    """Arrange edges in buckets of atoms with similar neighbour counts."""
    first, counts = rowptr[:-1], rowptr.diff()
    n_nodes = len(counts)
    sorted_counts, order = torch.sort(counts, descending=True, stable=True)
    n_edges = source.shape[0]
    padded_source = torch.cat([source, source.new_zeros(1)])
    buckets = []
    for start, stop in _bucket_bounds(sorted_counts.tolist()):
        nodes = order[start:stop]
        slots = torch.arange(int(sorted_counts[start]), device=source.device)
        edges = first[nodes][:, None] + slots
        edges = torch.where(slots < counts[nodes][:, None], edges, n_edges)
        buckets.append(Bucket(edges, padded_source[edges]))
    n_connected = int((sorted_counts > 0).sum())
    restore = torch.empty_like(order)
    restore[order] = torch.arange(n_nodes, device=order.device).clamp(max=n_connected)
    return Padded(tuple(buckets), restore)


def _bucket_bounds(falling_counts: list[int]) -> list[tuple[int, int]]:
    """Split a falling list of counts where it drops below FILL of the bucket's first."""
    bounds: list[tuple[int, int]] = []
    start = 0
    for i, count in enumerate(falling_counts):
        if count == 0:
            return [*bounds, (start, i)] if i > start else bounds
        if count < FILL * falling_counts[start]:
            bounds.append((start, i))
            start = i
    return [*bounds, (start, len(falling_counts))] if falling_counts else bounds


def gather_nodes(neighbors: Neighborhood, per_bucket: list[Tensor], like: Tensor) -> Tensor:
    """Put rows computed bucket by bucket back in the order of the atoms; others are zero.

    Args:
        neighbors: arrangement of the edges.
        per_bucket: [n, ...] for each bucket.
        like: any tensor with the dtype and device of the result, used when there is no bucket.
    """
    shape = per_bucket[0].shape[1:] if per_bucket else (0,)
    zero = like.new_zeros((1, *shape))
    return torch.cat([*per_bucket, zero])[neighbors.padded.restore]
