"""Pairs of opposite edges, and gradients of a convolution that make weights once for both.

For code that writes its own passes. i ← j and j ← i have opposite vectors: the same radial
functions, harmonics of even degree alike and of odd degree opposite. What depends on edge vectors
alone is then made for one edge of each pair, and its gradient is that by both.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mlip.ops.convolution import Path
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array, layout
from mlip.ops.cpu.program import is_generated
from mlip.ops.cpu.runner import (
    SERIAL_SUM,
    Array,
    EdgeList,
    Part,
    in_parts,
    ordered_rows,
    over_nodes,
)


class PairList(EdgeList):
    """One edge of each pair, by target. edge, other: [P] numbers of both among all edges."""

    by_pairs = True

    def __init__(self, rowptr: Array, source: Array, edge: Array, other: Array) -> None:
        super().__init__(rowptr, source)
        self.edge, self.other = edge, other

    @cached_property
    def place(self) -> Tensor:
        """The pair of each edge, [E]."""
        place = torch.empty(2 * self.n_edges, dtype=torch.int64)
        for edges in (self.edge, self.other):
            place[torch.from_numpy(edges)] = torch.arange(self.n_edges)
        return place

    def both(self, harmonics: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Give harmonics [E, K] and radial functions [E, R] of all edges, differentiable.

        Args:
            harmonics, basis: [P, K] and [P, R], of one edge of each pair.
        """
        sign = harmonics.new_ones(len(self.place), harmonics.shape[1])
        sign[torch.from_numpy(self.other)] = signs(harmonics.shape[1]).to(harmonics)
        return harmonics[self.place] * sign, basis[self.place]

    def both_detached(self, harmonics: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Give the same without derivatives."""
        found = []
        for half, sign in ((harmonics, signs(harmonics.shape[1])), (basis, None)):
            out = half.new_empty(2 * self.n_edges, half.shape[1])
            factors = np.ones(half.shape[1]) if sign is None else sign.numpy()
            cache.loops().both_directions(
                as_array(half), factors.astype(out.numpy().dtype), self.edge, self.other,
                out.numpy(),
            )  # fmt: skip
            found.append(out)
        return found[0], found[1]


def signs(n_harmonics: int) -> Tensor:
    """Give the factor of each harmonic from a vector to the opposite one, ±1."""
    return torch.tensor([(-1) ** math.isqrt(column) for column in range(n_harmonics)])


def find_pairs(edges: EdgeList, shift: Tensor) -> PairList | None:
    """Give the pairs of opposite edges, or None if an edge has none or edges are in other order.

    Args:
        edges: by target, then source, then shift.
        shift: [E, 3] int64, image of the source.
    """
    first, (edge, other) = np.empty_like(edges.rowptr), np.empty((2, edges.n_edges), np.int64)
    count = cache.loops().opposite_edges(
        edges.rowptr, edges.source, as_array(shift), first, edge, other
    )
    if count < 0:
        return None
    return PairList(first, edges.source[edge[:count]], edge[:count], other[:count])


def covers(paths: tuple[Path, ...]) -> bool:
    """Whether there are paths, of degrees whose products are written out."""
    return bool(paths) and is_generated(paths)


def pair_gradients(
    features: Tensor,
    harmonics: Tensor,
    basis: Tensor,
    kernel: Tensor,
    gradient: Tensor,
    pairs: PairList,
    signature: str,
    onto: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients by harmonics and radial functions of pairs, add that by features.

    Args:
        features: packed, flat.
        harmonics, basis: [P, K] and [P, R], of one edge of each pair.
        kernel: [R, n_weights].
        gradient: of the result, packed.
        pairs: all edges, two by two.
        signature: as text, with paths that ``covers`` allows.
        onto: what the gradient by features is added to; None: not wanted.

    Returns:
        [P, K] and [P, R].
    """
    shape = layout(signature)
    given = [as_array(each).reshape(-1) for each in (features, harmonics, basis, kernel)]
    sums = as_array(gradient)
    module = _module(shape.paths, shape.lmax_edge, sums.dtype.name)
    start, step = ordered_rows(shape, pairs.n_nodes, None)
    by_atom = np.empty_like(sums)
    parts = 1 if sums.size < SERIAL_SUM else 2 * threads.available_threads()
    call = partial(module.by_atom, sums, shape.group_channels, start, step, by_atom)
    threads.run(over_nodes(call, pairs.bounds(parts)))
    found = torch.empty_like(harmonics), torch.empty_like(basis)
    slopes = [each.numpy().reshape(-1) for each in found]

    def pass_over(part: Part) -> None:
        module.pair_pass(
            *given, by_atom, pairs.rowptr, pairs.source, part.rows, part.row_of, part.features,
            *slopes, shape.group_channels, shape.feature_first(pairs.n_nodes), part.first,
            shape.w_first, shape.n_weights, basis.shape[1], *part.atoms,
        )  # fmt: skip

    in_parts(shape, pairs, sums.dtype, None if onto is None else onto.numpy(), None, pass_over)
    return found


@lru_cache(maxsize=256)
def _module(paths: tuple[Path, ...], lmax_edge: int, dtype: str) -> ModuleType:
    from mlip.ops.cpu.pair_text import source_text

    name = f"pairs_l{max(max(path) for path in paths)}_{len(paths)}paths_{dtype}"
    return cache.load(name, source_text(paths, lmax_edge, dtype))
