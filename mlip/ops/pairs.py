"""Pairs of opposite edges, i ← j and j ← i, whose vectors differ in sign alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlip.ops.backend import default_backend, refusal, tracing
from mlip.ops.neighborhood import neighborhood


class Pairs(NamedTuple):
    """All edges, two by two. edge, other: [P] numbers of both. place: [E] the pair of an edge."""

    edge: Tensor
    other: Tensor
    place: Tensor


def opposite_edges(edge_index: Tensor, shift: Tensor, n_nodes: int) -> Pairs | None:
    """Find the pairs, or return None if an edge has no opposite, or nothing compiled may run.

    Args:
        edge_index: [2, E] sources and targets, by target, then source, then shift.
        shift: [E, 3] int64, image of the source.
        n_nodes: N.

    Raises:
        InputError: an edge does not exist.
    """
    given = shift.double()[:0]
    if default_backend() == "torch" or tracing() or refusal([given], None, "no kernel is needed"):
        return None
    from mlip.ops.cpu.library import edge_list
    from mlip.ops.cpu.pairs import find_pairs

    neighbors = neighborhood(edge_index, n_nodes)
    found = find_pairs(edge_list(neighbors.rowptr, neighbors.source), shift)
    if found is None:
        return None
    return Pairs(torch.from_numpy(found.edge), torch.from_numpy(found.other), found.place)


def of_all_edges(values: Tensor, pairs: Pairs) -> Tensor:
    """Give the rows [P, ...] of pairs to all edges, [E, ...]; any derivative is as fast."""
    found: Tensor = _OfAll.apply(values, pairs)  # type: ignore[no-untyped-call]
    return found


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return values.index_select(0, pairs.place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(gradient, ctx.pairs), None  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    """The sums of both edges."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return values.index_select(0, pairs.edge) + values.index_select(0, pairs.other)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _OfAll.apply(gradient, ctx.pairs), None  # type: ignore[no-untyped-call]
