"""The tables that ``kernels/convolution_tables.cuh`` reads: products of one input degree.

Components of a degree are ordered by |m|: 0, −1, 1, −2, 2, …; in this order the pairs (m1, m2)
that couple to some m3 lie near the diagonal. They are cut into *panels*, whose products stay in
registers. A panel without couplings is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from mlip.ops.convolution import Path
from mlip.ops.cpu.coupling import couplings
from mlip.ops.cpu.runner import Layout
from mlip.ops.cpu.table_plan import cuts, order

WIDTHS = (3, 5, 7)  # rows and columns of a panel, rounded up
SLOTS = 8  # numbers of a panel's harmonics in shared memory, zeros included
TERMS = 2  # components m3 that a pair (m1, m2) couples to, at most

Array = np.ndarray
Term = tuple[int, float]  # component of the result, factor


@dataclass(frozen=True)
class TablePlan:
    """Tables and what their reader must know.

    table, factors: as ``Plan`` of the header reads them.
    n_owners: groups of paths that add to the same rows; n_shares: with the same harmonics.
    n_paths: products; n_slots: harmonics of a path with zeros; n_rows: rows of a result, at most.
    """

    table: Array
    factors: Array
    n_owners: int
    n_shares: int
    n_paths: int
    n_slots: int
    n_rows: int


@dataclass
class _Tables:
    """Tables that grow path by path; ``terms`` and ``factors`` belong together."""

    components: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    terms: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    paths: list[int] = field(default_factory=list)
    panels: list[int] = field(default_factory=list)
    n_panels: int = 0


def tabulate(layout: Layout, degree: int, backward: bool) -> TablePlan:
    """Write the tables of all paths with one input degree.

    Args:
        layout: shapes and places of all features.
        degree: l1.
        backward: products of gradients and harmonics that add to features, owned by the degree;
            else those of features and harmonics that add to results, each of its own.
    """
    tables, first = _Tables(), int(layout.w_first[layout.degrees.index(degree)])
    paths = [path for path in layout.paths if path[0] == degree]
    results = dict(zip(layout.paths, _results(layout), strict=True))
    features = _rows(layout.channels, degree, 0)
    for i, path in enumerate(paths):
        ends = (results[path], features) if backward else (features, results[path])
        _add_path(tables, path, backward, ends, first + i * layout.channels[degree])
    owners = [0, len(paths)] if backward else list(range(len(paths) + 1))
    shares = [i for i in range(len(paths)) if i == 0 or paths[i - 1][1] != paths[i][1]]
    parts = [
        owners, [*shares, len(paths)], tables.components, tables.slots, tables.terms,
        tables.paths, tables.panels,
    ]  # fmt: skip
    places = np.cumsum([len(parts), *map(len, parts[:-1])]).tolist()
    return TablePlan(
        np.array([number for part in (places, *parts) for number in part], dtype=np.int32),
        np.array(tables.factors), len(owners) - 1, len(shares), len(paths),
        max(_padded(path[1]) for path in paths),
        max(2 * (path[0] if backward else path[2]) + 1 for path in paths),
    )  # fmt: skip


def _rows(channels: tuple[int, ...], degree: int, offset: int) -> tuple[int, ...]:
    """``Rows`` of the header: of one degree in packed features, channels from ``offset`` on."""
    before = sum((2 * i + 1) * channels[i] for i in range(degree))
    return before, (2 * degree + 1) * channels[degree], offset, channels[degree]


def _results(layout: Layout) -> Iterable[tuple[int, ...]]:
    """``Rows`` of the result of each path."""
    used = [0] * len(layout.out_channels)
    for l1, _, l3 in layout.paths:
        yield _rows(layout.out_channels, l3, used[l3])
        used[l3] += layout.channels[l1]


def _padded(degree: int) -> int:
    """Slots of the harmonics of a degree."""
    return SLOTS * len(cuts(2 * degree + 1))


def _add_path(
    tables: _Tables, path: Path, backward: bool, ends: tuple[tuple[int, ...], ...], weight: int
) -> None:
    """Add one product, with the rows that it reads and those that it adds to."""
    l1, l2, l3 = path
    inner, outer = (l3, l1) if backward else (l1, l3)
    panel, slot = tables.n_panels, len(tables.slots)
    terms = _pair_terms(path, backward)
    columns = [order(l2)[low:high] for low, high in cuts(2 * l2 + 1)]
    for own in columns:
        tables.slots += [l2 * l2 + m for m in own] + [-1] * (SLOTS - len(own))
    for low, high in cuts(2 * inner + 1):
        rows = order(inner)[low:high]
        for i, own in enumerate(columns):
            if any((row, column) in terms for row in rows for column in own):
                _add_panel(tables, rows, own, SLOTS * i, terms)
    tables.paths += [
        *ends[0], *ends[1], 2 * outer + 1, weight, slot, _padded(l2), panel,
        tables.n_panels - panel,
    ]  # fmt: skip


def _pair_terms(path: Path, backward: bool) -> dict[tuple[int, int], list[Term]]:
    """Terms of each pair (m1, m2), or (m3, m2)."""
    found: dict[tuple[int, int], list[Term]] = {}
    for m1, m2, m3, value in couplings((path,))[0].entries:
        inner, outer = (m3, m1) if backward else (m1, m3)
        found.setdefault((inner, m2), []).append((outer, value))
    return found


def _add_panel(
    tables: _Tables,
    rows: list[int],
    columns: list[int],
    slot: int,
    terms: dict[tuple[int, int], list[Term]],
) -> None:
    """Add a panel; rows and columns that fill it up have no terms."""
    height, width = (next(w for w in WIDTHS if w >= len(part)) for part in (rows, columns))
    tables.panels += [height, width, len(tables.components), slot, len(tables.terms)]
    tables.components += rows + rows[:1] * (height - len(rows))
    tables.n_panels += 1
    for i in range(height):
        for j in range(width):
            own = terms.get((rows[i], columns[j]), []) if _within(i, rows, j, columns) else []
            for component, factor in own + [(0, 0.0)] * (TERMS - len(own)):
                tables.terms.append(component)
                tables.factors.append(factor)


def _within(i: int, rows: list[int], j: int, columns: list[int]) -> bool:
    return i < len(rows) and j < len(columns)
