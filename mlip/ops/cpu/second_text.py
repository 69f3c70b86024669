"""Source text of the pass that makes second derivatives, for one set of paths.

Names as in ``generate.py``; an A at the end is the cotangent of what is named before it: features
X and XA, weights W and WA, edge matrices M and MA = M(Y'). With s = Mᵀg and s' = MAᵀg of a path:

    by g:  Σ M (w' x + w x') + M' w x        by w:  x'·s + x·s'    (D; DF = x·s, by w', for K)
    by x:  w' s + w s'                       by Y:  C (w' x + w x') g
"""

from __future__ import annotations

from mlip.ops.convolution import Path
from mlip.ops.cpu.coupling import Coupling
from mlip.ops.cpu.drivers import PIECES
from mlip.ops.cpu.generate import (
    HARMONICS_GRADIENT,
    Text,
    add_with_factors,
    add_with_one_factor,
    by_group,
    group_sizes,
    head,
    matrices,
    one_factor,
    products,
    row_parts,
)
from mlip.ops.cpu.program import Asked
from mlip.ops.cpu.second_drivers import SECOND_PASS

ROWS = "X, XA, x, channels, W, WA, w, edge, path, M, MA, source_index, e, n, A, a"
EDGES = (
    "X, XA, x, channels, W, WA, w, edge, path, M, MA, source_index, row_index, e, n, blocks, "
    "A, a, DX, dx, D, DF, Z"
)


def source_text(paths: tuple[Path, ...], lmax_edge: int, dtype: str, asked: Asked) -> str:
    """Write the module for one set of paths and one precision.

    Args:
        paths: (l1, l2, l3), sorted by l1.
        lmax_edge: highest degree of the harmonics.
        dtype: float32 or float64.
        asked: which terms there are.
    """
    text, table, width = head("second derivatives", paths, lmax_edge, dtype, asked.radial)
    matrices(text, table, width)
    degrees = sorted({l1 for l1, _, _ in paths})
    for l1 in degrees:
        group = [c for c in table if c.path[0] == l1]
        _rows(text, l1, group, width, asked)
        _edges(text, l1, group, width, asked)
    group_sizes(text, paths)
    text.lines += [PIECES, SECOND_PASS]
    by_group(text, "rows", f"({ROWS})", degrees)
    by_group(text, "edges", f"({EDGES})", degrees)
    text.lines.append(HARMONICS_GRADIENT)
    return "\n".join(text.lines) + "\n"


def _entries(c: Coupling, width: int) -> dict[tuple[int, int], int]:
    """Where the entries (m3, m1) of a path's edge matrix lie."""
    return {key: (c.first_matrix + i) * width for i, key in enumerate(c.matrix)}


def _features(text: Text, l1: int, at: str, asked: Asked, depth: int) -> None:
    """Read features x and their cotangents xa."""
    for m1 in range(2 * l1 + 1):
        text(f"row = {at.format(m1)}", depth)
        text(f"x{m1} = k.load(X, row)", depth)
        if asked.along:
            text(f"xa{m1} = k.load(XA, row)", depth)


def _weights(text: Text, at: str, edges_ahead: str, depth: int) -> None:
    """Read the weight v of a path and its cotangent va."""
    text(f"place = {at}", depth)
    for name, array in (("v", "W"), ("va", "WA")):
        text(f"{name} = k.load({array}, place)", depth)
        text.prefetch(f"{array}, place + edge * {edges_ahead}", depth)


def _rows(text: Text, l1: int, group: list[Coupling], width: int, asked: Asked) -> None:
    text("", 0)
    text("@written", 0)
    text(f"def rows_{l1}(k, {ROWS}):", 0)
    text(f'"""Add the derivatives by the gradients of the sums of degree {l1} features to A."""')
    for part in row_parts(group):
        rows = [c.first_row + m3 for c in part for m3 in range(2 * c.path[2] + 1)]
        for r in rows:
            text(f"s{r} = k.accumulator(k.load(A, a + {r * width}))")
        text("with k.loop(n) as t:")
        text(f"here = x + k.integer(source_index, e + t) * (channels * {2 * l1 + 1})", 2)
        _features(text, l1, "here + channels * {}", asked, 2)
        text("weight = w + t * edge", 2)
        for c in part:
            text("# {} x {} -> {}".format(*c.path), 2)
            _weights(text, f"weight + path * {group.index(c)}", str(width), 2)
            _rows_of_path(text, c, width, asked)
        for r in rows:
            text(f"k.store(A, a + {r * width}, s{r}.value)")


def _rows_of_path(text: Text, c: Coupling, width: int, asked: Asked) -> None:
    """One path of one edge; weights go to the side where that costs fewer operations."""
    l1, _, l3 = c.path
    d1, d3, entries = 2 * l1 + 1, 2 * l3 + 1, _entries(c, width)
    if len(entries) * asked.along + 2 * d3 < (2 + asked.along) * d1:
        for m3 in range(d3):
            row = [(m1, f"t + {at}") for (m, m1), at in entries.items() if m == m3]
            if not row:
                continue
            plain = [(f"k.broadcast(M, {at})", f"x{m1}") for m1, at in row]
            along = [(f"k.broadcast(M, {at})", f"xa{m1}") for m1, at in row if asked.along]
            turned = [(f"k.broadcast(MA, {at})", f"x{m1}") for m1, at in row]
            text(f"s{c.first_row + m3}.add(va, {products(plain)})", 2)
            text(f"s{c.first_row + m3}.add(v, {products(along + turned)})", 2)
        return
    _weighted_features(text, d1, asked, 2)
    for m1 in range(d1):
        text(f"u{m1} = k.mul(v, x{m1})", 2)
    for (m3, m1), at in entries.items():
        text(f"s{c.first_row + m3}.add(k.broadcast(M, t + {at}), h{m1})", 2)
        text(f"s{c.first_row + m3}.add(k.broadcast(MA, t + {at}), u{m1})", 2)


def _weighted_features(text: Text, d1: int, asked: Asked, depth: int) -> None:
    """Write h = w'·x + w·x'."""
    for m1 in range(d1):
        text(f"h{m1} = {products([('va', f'x{m1}'), ('v', f'xa{m1}')][: 1 + asked.along])}", depth)


def _edges(text: Text, l1: int, group: list[Coupling], width: int, asked: Asked) -> None:
    text("", 0)
    text("@written", 0)
    text(f"def edges_{l1}(", 0)
    text(f"k, {EDGES}")
    text("):", 0)
    text('"""Derivatives by weights (stored in D, DF), harmonics and features (added to Z, DX)."""')
    rows = sum(2 * c.path[2] + 1 for c in group)
    harmonics = sorted({c.path[1] ** 2 + m2 for c in group for _, m2, _, _ in c.entries})
    if not asked.harmonics:
        harmonics = []
    text("with k.loop(n) as t:")
    for name, first, index in (("here", "x", "source"), ("there", "dx", "row")):
        text(f"{name} = {first} + k.integer({index}_index, e + t) * (channels * {2 * l1 + 1})", 2)
    text("weight = w + t * edge", 2)
    text(f"z = t * (N_HARMONICS * {width})", 2)
    for j in harmonics:
        text(f"z{j} = k.accumulator(k.load(Z, z + {j * width}))", 2)
    text("with k.loop(blocks) as b:", 2)
    text(f"c, r, m = b * {width}, a + b * {rows * width}, k.opaque(t)", 3)
    _features(text, l1, "here + (channels * {} + c)", asked, 3)
    added: set[int] = set()
    for number, c in enumerate(group):
        text("# {} x {} -> {}".format(*c.path), 3)
        for m3 in range(2 * c.path[2] + 1):
            text(f"g{m3} = k.load(A, r + {(c.first_row + m3) * width})", 3)
        _weights(text, f"weight + (path * {number} + c)", "AHEAD", 3)
        _slopes_of_nodes(text, c, width, added, asked)
        if asked.harmonics:
            _weighted_features(text, 2 * l1 + 1, asked, 3)
            _slopes_of_harmonics(text, c)
    for m1 in sorted(added):
        text(f"row = there + (channels * {m1} + c)", 3)
        text(f"k.store(DX, row, k.add(k.load(DX, row), y{m1}))", 3)
    for j in harmonics:
        text(f"k.store(Z, z + {j * width}, z{j}.value)", 2)


def _slopes_of_nodes(text: Text, c: Coupling, width: int, added: set[int], asked: Asked) -> None:
    """Slopes of a path's weight and of its cotangent, and of features."""
    entries = _entries(c, width)
    second, first = "", ""
    for m1 in sorted({m1 for _, m1 in entries}):
        for name, array in (("s", "M"), ("q", "MA")):
            terms = [
                (f"k.broadcast({array}, m + {at})", f"g{m3}")
                for (m3, column), at in entries.items()
                if column == m1
            ]
            text(f"{name} = {products(terms)}", 3)
        if asked.slopes:
            text("second = " + _plus(f"x{m1}", "q", second), 3)
            second = "second"
        if asked.slopes and asked.along:
            text(f"second = k.fma(xa{m1}, s, second)", 3)
        if asked.kernel:
            text("first = " + _plus(f"x{m1}", "s", first), 3)
            first = "first"
        text(f"y{m1} = " + _plus("v", "q", f"y{m1}" if m1 in added else ""), 3)
        text(f"y{m1} = k.fma(va, s, y{m1})", 3)
        added.add(m1)
    if asked.slopes:
        text("k.store(D, place, second)", 3)
        text.prefetch("D, place + edge * AHEAD, write=True", 3)
    if asked.kernel:
        text("k.store(DF, place, first)", 3)


def _plus(x: str, y: str, total: str) -> str:
    return f"k.fma({x}, {y}, {total})" if total else f"k.mul({x}, {y})"


def _slopes_of_harmonics(text: Text, c: Coupling) -> None:
    """Σ C·h·g, added for each harmonic."""
    value = one_factor(c)
    if value is None:
        add_with_factors(text, c)
    else:
        add_with_one_factor(text, c, f"k.constant({value!r})", "h")
