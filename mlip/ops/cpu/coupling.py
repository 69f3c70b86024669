"""Which products of numbers a convolution needs: the nonzero Clebsch–Gordan entries by path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mlip.ops.convolution import Path
from mlip.so3 import clebsch_gordan


@dataclass(frozen=True)
class Coupling:
    """One path l1 × l2 → l3.

    entries: (m1, m2, m3, value) with √(2 l3 + 1) C^{l1 l2 l3}_{m1 m2 m3} ≠ 0, sorted by (m3, m1).
    first_matrix: number of its first entry among all edge matrices.
    first_row: row of its first output component among those of the same l1.
    """

    path: Path
    entries: tuple[tuple[int, int, int, float], ...]
    first_matrix: int
    first_row: int

    @cached_property
    def matrix(self) -> dict[tuple[int, int], tuple[tuple[int, float], ...]]:
        """Σ_m2 C Y_m2, the matrix of an edge: terms (m2, value) of each nonzero (m3, m1)."""
        terms: dict[tuple[int, int], tuple[tuple[int, float], ...]] = {}
        for m1, m2, m3, value in self.entries:
            terms[m3, m1] = (*terms.get((m3, m1), ()), (m2, value))
        return terms


@lru_cache(maxsize=256)
def couplings(paths: tuple[Path, ...]) -> tuple[Coupling, ...]:
    """Tabulate all paths, which are sorted by l1."""
    found: list[Coupling] = []
    n_matrix, rows = 0, {l1: 0 for l1, _, _ in paths}
    for l1, l2, l3 in paths:
        table = clebsch_gordan(l1, l2, l3) * math.sqrt(2 * l3 + 1)
        entries = [
            (m1, m2, m3, table[m1, m2, m3].item())
            for m1, m2, m3 in (table.abs() > 1e-10).nonzero().tolist()
        ]
        entries.sort(key=lambda entry: (entry[2], entry[0]))
        found.append(Coupling((l1, l2, l3), tuple(entries), n_matrix, rows[l1]))
        n_matrix += len(found[-1].matrix)
        rows[l1] += 2 * l3 + 1
    return tuple(found)


@dataclass(frozen=True)
class Cost:
    """Work and traffic of one pass over one edge and channel (times four or eight bytes).

    multiply_adds: in the product itself; radial: in recomputing weights from radial functions.
    """

    multiply_adds: int
    radial: int
    numbers: int


def forward_cost(paths: tuple[Path, ...], n_radial: int = 0) -> Cost:
    """Count a forward pass: edge matrices times features, one weight for each path.

    Args:
        paths: all with the same number of channels.
        n_radial: radial functions of the fused variant; 0 if weights are read.
    """
    products = sum(len(c.matrix) + min(2 * c.path[0], 2 * c.path[2]) + 1 for c in couplings(paths))
    gathered = sum(2 * l1 + 1 for l1 in {l1 for l1, _, _ in paths})
    read = 0 if n_radial else len(paths)
    return Cost(products, n_radial * len(paths), gathered + read)
