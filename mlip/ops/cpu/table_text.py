"""Source text of the kernels that read the couplings of a set of paths from tables.

Terms and arrays are those of ``generate.py``, but M holds, for each path, a matrix [m3, m1] with
its zeros, components by |m|; rows of A follow the same order. Every function goes through the
panels of ``table_plan.py`` (``plan``), whose width is the one thing that the code has to know. The
gradient of the harmonics goes through that of the edge matrices, Z [entry, T], summed over
channels: there a lane is an edge, and features and weights of a tile are transposed in a scratch Q.
"""

from __future__ import annotations

from mlip.ops.cpu import table_plan
from mlip.ops.cpu.drivers import drivers
from mlip.ops.cpu.simd import lanes

CONSTANTS = (
    "MATRIX_TERMS", "N_MATRIX_TERMS", "SUMS", "N_SUMS", "SUM_VALUES", "FIRST_GROUP", "COMPONENTS",
    "N_PATHS", "PANELS", "N_PANELS", "TRANSPOSED", "N_TRANSPOSED", "ORDER", "GROUP_SIZE", "WIDTH",
    "PATH", "ROW", "AT", "FIRST", "LENGTH", "NEW", "PANEL_SIZE", "UNROLLED", "WIDEST", "WIDTHS",
)  # fmt: skip

TABLES = (
    "N_PATHS", "N_ROWS", "MOST_PATHS", "N_HARMONICS", "N_ENTRIES", "N_SLOPES", "N_SCRATCH",
    "plan", "values",
)  # fmt: skip


def source_text(dtype: str) -> str:
    """Write the module for one precision."""
    head = (
        f'"""Written by mlip: tensor products of any degrees; {dtype}, {lanes(dtype)} lanes."""',
        "import numpy as np",
        "from mlip.ops.cpu.jit import compiled, piece",
        "from mlip.ops.cpu.simd import straight_line",
        f"T = {lanes(dtype)}",
        f"FLOAT = np.{dtype}",
        f"written = straight_line({dtype!r})",
        *(f"{name} = {getattr(table_plan, name)}" for name in CONSTANTS),
    )
    loops = drivers(
        tables=f"{', '.join(TABLES)}, ",
        given="plan.ctypes.data, values.ctypes.data, ",
        scratch="q, ",
        rows="N_ROWS[i], ",
    )
    gradient = HARMONICS_GRADIENT.replace("TABLES", ", ".join(TABLES))
    return "\n".join(head) + KERNELS + loops + gradient


KERNELS = '''


@written
def matrices(k, plan_index, V, H, M):
    """Edge matrices of a tile, vectorised over its edges."""
    first = k.integer(plan_index, MATRIX_TERMS)
    with k.loop(k.integer(plan_index, N_MATRIX_TERMS)) as i:
        entry, y, other = (k.integer(plan_index, first + i * 3 + j) for j in range(3))
        value = k.mul(k.broadcast(V, i * 2), k.load(H, y * T))
        value = k.fma(k.broadcast(V, i * 2 + 1), k.load(H, other * T), value)
        k.store(M, entry * T, value)


class Group:
    """Head of a group, with its panels."""

    def __init__(self, k, plan, number):
        self.k, self.plan = k, plan
        self.head = number * GROUP_SIZE + FIRST_GROUP
        self.components = k.integer(plan, self.head + COMPONENTS)
        self.order = k.integer(plan, self.head + ORDER)

    def component(self, i):
        """Component with the place i by |m|."""
        return self.k.integer(self.plan, self.order + i)

    def each_panel(self, panels, count, write):
        """Call ``write`` for the width, the numbers and the place of every panel."""
        k = self.k
        first = k.integer(self.plan, self.head + panels)
        with k.loop(k.integer(self.plan, self.head + count)) as i:
            place = first + i * PANEL_SIZE
            width = k.integer(self.plan, place + WIDTH)
            for rows in WIDTHS:
                with k.when(width, rows):
                    write(rows, [k.integer(self.plan, place + j) for j in range(PANEL_SIZE)])


def coupled(k, group, X, here, channels, M, entry, panel, rows):
    """Rows of a panel times the features of an edge."""
    sums = [k.accumulator(k.zero()) for _ in range(rows)]
    with k.loop(panel[LENGTH]) as j:
        x = k.load(X, here + channels * group.component(panel[FIRST] + j))
        for r in range(rows):
            sums[r].add(k.broadcast(M, entry + (j + group.components * r) * T), x)
    return [s.value for s in sums]


@written
def forward(
    k, plan_index, V, number, X, x, channels, W, w, edge, path, M, source_index, e, n, A, a
):
    """Add the products of n neighbours to the sums A."""
    group = Group(k, plan_index, number)
    size = channels * group.components

    def write(rows, panel):
        row = a + panel[ROW] * T
        sums = [k.accumulator(k.load(A, row + r * T)) for r in range(rows)]
        with k.loop(n) as t:
            here = x + k.integer(source_index, e + t) * size
            entry = panel[AT] * T + t
            values = coupled(k, group, X, here, channels, M, entry, panel, rows)
            weight = w + t * edge + path * panel[PATH]
            v = k.load(W, weight)
            k.prefetch(W, weight + edge * T)
            for r in range(rows):
                sums[r].add(v, values[r])
        for r in range(rows):
            k.store(A, row + r * T, sums[r].value)

    group.each_panel(PANELS, N_PANELS, write)


@written
def weight_slopes(
    k, plan_index, number, X, x, channels, M, source_index, e, n, A, a, D, d, dedge, dpath
):
    """Gradients of weights, stored in D."""
    group = Group(k, plan_index, number)
    size = channels * group.components
    with k.loop(k.integer(plan_index, group.head + N_PATHS)) as p:
        with k.loop(n) as t:
            k.store(D, d + t * dedge + p * dpath, k.zero())

    def write(rows, panel):
        row = a + panel[ROW] * T
        with k.loop(n) as t:
            here = x + k.integer(source_index, e + t) * size
            entry = panel[AT] * T + t
            values = coupled(k, group, X, here, channels, M, entry, panel, rows)
            slope = d + t * dedge + dpath * panel[PATH]
            total = k.load(D, slope)
            for r in range(rows):
                total = k.fma(k.load(A, row + r * T), values[r], total)
            k.store(D, slope, total)

    group.each_panel(PANELS, N_PANELS, write)


def transpose_rows(k, Q, to):
    """Transpose the T vectors at the beginning of the scratch."""
    for i, row in enumerate(k.transposed([k.load(Q, i * T) for i in range(T)])):
        k.store(Q, to + i * T, row)


@written
def matrix_slopes(
    k, plan_index, number, X, x, channels, W, w, edge, path, source_index, e, n, A, a, Z, Q
):
    """Gradients of edge matrices, added to Z; a lane is an edge.

    Q holds T rows to transpose, weights, weighted gradients of the rows of a panel, features.
    """
    group = Group(k, plan_index, number)
    size = channels * group.components
    weights, weighted, features = T * T, 2 * T * T, (2 + WIDEST) * T * T
    with k.loop(group.components) as i:
        with k.loop(n) as t:
            here = x + k.integer(source_index, e + t) * size
            k.store(Q, t * T, k.load(X, here + channels * group.component(i)))
        transpose_rows(k, Q, i * (T * T) + features)

    def write(rows, panel):
        with k.when(panel[NEW], 1):
            with k.loop(n) as t:
                k.store(Q, t * T, k.load(W, w + t * edge + path * panel[PATH]))
            transpose_rows(k, Q, k.number(weights))
        row = a + panel[ROW] * T
        with k.loop(k.number(T)) as c:
            v = k.load(Q, c * T + weights)
            for r in range(rows):
                g = k.broadcast(A, row + c + r * T)
                k.store(Q, c * T + (weighted + r * T * T), k.mul(g, v))
        with k.loop(panel[LENGTH]) as j:
            at = [(panel[AT] + j + group.components * r) * T for r in range(rows)]
            sums = [k.accumulator(k.load(Z, entry)) for entry in at]
            column = (panel[FIRST] + j) * (T * T) + features
            with k.loop(k.number(T)) as c:
                x = k.load(Q, column + c * T)
                for r in range(rows):
                    sums[r].add(k.load(Q, c * T + (weighted + r * T * T)), x)
            for r in range(rows):
                k.store(Z, at[r], sums[r].value)

    group.each_panel(PANELS, N_PANELS, write)


@written
def nodes(k, plan_index, V, Q, number, X, x, channels, W, w, edge, path, M, row_index, e, n, A, a):
    """Add the gradients of the features of n neighbours to X; those of an edge are summed first."""
    group = Group(k, plan_index, number)
    size = channels * group.components
    with k.loop(n * group.components) as i:
        k.store(Q, i * T, k.zero())

    def write(columns, panel):
        row = a + panel[ROW] * T
        with k.loop(n) as t:
            entry = panel[AT] * T + t
            sums = [k.accumulator(k.zero()) for _ in range(columns)]
            with k.loop(panel[LENGTH]) as j:
                g = k.load(A, row + j * T)
                for i in range(columns):
                    sums[i].add(k.broadcast(M, entry + (group.components * j + i) * T), g)
            v = k.load(W, w + t * edge + path * panel[PATH])
            own = (t * group.components + panel[FIRST]) * T
            for i in range(columns):
                at = own + i * T
                k.store(Q, at, k.fma(v, sums[i].value, k.load(Q, at)))

    group.each_panel(TRANSPOSED, N_TRANSPOSED, write)
    with k.loop(n) as t:
        here = x + k.integer(row_index, e + t) * size
        with k.loop(group.components) as i:
            at = here + channels * group.component(i)
            k.store(X, at, k.add(k.load(X, at), k.load(Q, (t * group.components + i) * T)))


@written
def harmonics_sums(k, plan_index, V, Z, Y):
    """Gradients of the harmonics of a tile, Y[m2, T], from those of the edge matrices."""
    sums, n = k.integer(plan_index, SUMS), k.integer(plan_index, N_SUMS)
    factors = k.integer(plan_index, SUM_VALUES)
    entries = sums + n + 1
    with k.loop(n) as j:
        parts = [k.accumulator(k.zero()) for _ in range(UNROLLED)]
        first, last = k.integer(plan_index, sums + j), k.integer(plan_index, sums + j + 1)
        with k.loop_from(first, last, step=UNROLLED) as i:
            for u in range(UNROLLED):
                z = k.load(Z, k.integer(plan_index, entries + i + u) * T)
                parts[u].add(k.broadcast(V, factors + i + u), z)
        total = parts[0].value
        for part in parts[1:]:
            total = k.add(total, part.value)
        k.store(Y, j * T, total)
'''

HARMONICS_GRADIENT = """
@piece
def edges(
    plan, values, Q, rows, number, X, x, channels, W, w, edge, path, M, source, own, e, n, blocks,
    A, a, DX, dx, D, d, dedge, dpath, Z,
):
    for c in range(0, blocks * T, T):
        weight_slopes(
            plan, number, X, x + c, channels, M, source, e, n, A, a, D, d + c, dedge, dpath
        )
        matrix_slopes(
            plan, number, X, x + c, channels, W, w + c, edge, path, source, e, n, A, a, Z, Q
        )
        nodes(
            plan, values, Q, number, DX, dx + c, channels, W, w + c, edge, path, M, own, e, n, A, a
        )
        a += rows * T


@piece
def harmonics_gradient(TABLES, Z, DS, e, n):
    Y = Z[N_ENTRIES * T :]
    harmonics_sums(plan.ctypes.data, values.ctypes.data, Z.ctypes.data, Y.ctypes.data)
    for t in range(n):
        for j in range(N_HARMONICS):
            DS[(e + t) * N_HARMONICS + j] = Y[j * T + t]
"""
