"""The tables that ``table_text.py`` reads: the nonzero couplings of a set of paths.

Components of a degree are ordered by |m|: 0, −1, 1, −2, 2, …; in this order the entries
M[m3, m1] = Σ_m2 C Y[m2] of an edge matrix that are not zero lie near its diagonal. A matrix is cut
into *panels*: up to ``WIDEST`` rows, and the range of columns in which they have entries. Gradients
of features take panels of the transposed matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mlip.ops.convolution import Path
from mlip.ops.cpu.coupling import Coupling, couplings

WIDEST = 7  # rows of a panel: two sums for each, a factor and a weight fit in 16 registers
WIDTHS = (1, 3, 4, 5, 6, 7)  # rows of the panels that ``cuts`` makes
UNROLLED = 4  # terms of a harmonic's gradient come in multiples

# Where integers lie: the head, then the heads of groups (paths of one l1).
MATRIX_TERMS, N_MATRIX_TERMS, SUMS, N_SUMS, SUM_VALUES, FIRST_GROUP = range(6)
COMPONENTS, N_PATHS, PANELS, N_PANELS, TRANSPOSED, N_TRANSPOSED, ORDER, GROUP_SIZE = range(8)
# One panel. AT: its first entry of M; FIRST: first of LENGTH columns; NEW: 1 for a new path.
WIDTH, PATH, ROW, AT, FIRST, LENGTH, NEW, PANEL_SIZE = range(8)

Array = np.ndarray


@dataclass(frozen=True)
class Plan:
    """integers, values: the tables; n_entries: of all edge matrices, zeros included.

    row_order: [rows] row (path, m3) of each row (path, component by |m|).
    """

    integers: Array
    values: Array
    n_entries: int
    row_order: Array


@dataclass
class _Group:
    """Paths of one l1. transposed: panels in which rows and columns have changed places."""

    l1: int
    n_paths: int = 0
    n_rows: int = 0
    panels: list[tuple[int, ...]] = field(default_factory=list)
    transposed: list[tuple[int, ...]] = field(default_factory=list)


def order(degree: int) -> list[int]:
    """Components of a degree by |m|."""
    return sorted(range(2 * degree + 1), key=lambda m: (abs(m - degree), m))


def cuts(rows: int) -> list[tuple[int, int]]:
    """Cut rows into as few panels as can be, of about the same width."""
    n = -(-rows // WIDEST)
    bounds = [rows * i // n for i in range(n + 1)]
    return list(pairwise(bounds))


def scratch_vectors(paths: tuple[Path, ...], width: int) -> int:
    """Vectors of scratch: rows to transpose, weights, weighted gradients, features of a tile."""
    components = 2 * max(l1 for l1, _, _ in paths) + 1
    return (2 + WIDEST + components) * width


def tabulate(paths: tuple[Path, ...], n_harmonics: int) -> Plan:
    """Write the tables of a set of paths, sorted by l1, for harmonics of an edge."""
    groups: list[_Group] = []
    matrix: list[tuple[int, int, int]] = []
    factors: list[float] = []
    sums: list[list[tuple[int, float]]] = [[] for _ in range(n_harmonics)]
    row_order: list[int] = []
    n_entries = 0
    for c in couplings(paths):
        l1, l2, l3 = c.path
        if not groups or groups[-1].l1 != l1:
            groups.append(_Group(l1))
        for (row, column), terms in _ranked(c).items():
            at = n_entries + row * (2 * l1 + 1) + column
            (m2, value), (other, more) = (*terms, (terms[0][0], 0.0))[:2]
            matrix.append((at, l2 * l2 + m2, l2 * l2 + other))
            factors += [value, more]
            for m, factor in terms:
                sums[l2 * l2 + m].append((at, factor))
        _add_panels(groups[-1], c, n_entries)
        row_order += [len(row_order) + m3 for m3 in order(l3)]
        n_entries += (2 * l3 + 1) * (2 * l1 + 1)
    integers, values = _packed(groups, matrix, factors, sums)
    return Plan(integers, values, n_entries, np.array(row_order))


def _ranked(c: Coupling) -> dict[tuple[int, int], tuple[tuple[int, float], ...]]:
    """Entries of an edge matrix, one or two terms each, with components by |m|."""
    l1, _, l3 = c.path
    column = {m: i for i, m in enumerate(order(l1))}
    row = {m: i for i, m in enumerate(order(l3))}
    return {(row[m3], column[m1]): terms for (m3, m1), terms in c.matrix.items()}


def _add_panels(group: _Group, c: Coupling, entry: int) -> None:
    """Cut the matrix of one path, whose first entry is given, and its transpose."""
    l1, _, l3 = c.path
    n1, n3 = 2 * l1 + 1, 2 * l3 + 1
    entries = list(_ranked(c))
    for low, high, first, length in _panels(entries, n3):
        at = entry + low * n1 + first
        new = int(not group.panels or group.panels[-1][PATH] != group.n_paths)
        group.panels.append(
            (high - low, group.n_paths, group.n_rows + low, at, first, length, new)
        )  # fmt: skip
    for low, high, first, length in _panels([(b, a) for a, b in entries], n1):
        at = entry + first * n1 + low
        group.transposed.append(
            (high - low, group.n_paths, group.n_rows + first, at, low, length, 0)
        )  # fmt: skip
    group.n_paths += 1
    group.n_rows += n3


def _panels(entries: list[tuple[int, int]], n_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows from and to, first column and number of columns of each panel with entries."""
    for low, high in cuts(n_rows):
        columns = [column for row, column in entries if low <= row < high]
        if columns:
            yield low, high, min(columns), max(columns) - min(columns) + 1


def _packed(
    groups: list[_Group],
    matrix: list[tuple[int, int, int]],
    factors: list[float],
    sums: list[list[tuple[int, float]]],
) -> tuple[Array, Array]:
    """Lay all tables out in one array of integers and one of numbers."""
    integers = [0] * (FIRST_GROUP + GROUP_SIZE * len(groups))
    values = list(factors)

    def append(rows: list[tuple[int, ...]]) -> int:
        first = len(integers)
        for row in rows:
            integers.extend(row)
        return first

    integers[MATRIX_TERMS], integers[N_MATRIX_TERMS] = append(list(matrix)), len(matrix)
    integers[SUM_VALUES], integers[N_SUMS] = len(values), len(sums)
    terms: list[int] = []
    ends = []
    for members in sums:
        padded = members + [(0, 0.0)] * (-len(members) % UNROLLED)
        terms += [entry for entry, _ in padded]
        values += [value for _, value in padded]
        ends.append((len(terms),))
    integers[SUMS] = append([(0,), *ends])
    append([(entry,) for entry in terms])
    for i, group in enumerate(groups):
        at = FIRST_GROUP + GROUP_SIZE * i
        integers[at + COMPONENTS], integers[at + N_PATHS] = 2 * group.l1 + 1, group.n_paths
        integers[at + PANELS], integers[at + N_PANELS] = append(group.panels), len(group.panels)
        integers[at + TRANSPOSED] = append(group.transposed)
        integers[at + N_TRANSPOSED] = len(group.transposed)
        integers[at + ORDER] = append([(m,) for m in order(group.l1)])
    return np.array(integers, dtype=np.int64), np.array(values)
