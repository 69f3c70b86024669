"""Source text of the loops over atoms, tiles and blocks, the same for every set of paths.

It is a part of the generated modules (``generate.py``) and of those that read tables
(``table_text.py``). Both define T, FLOAT and the functions ``matrices``, ``forward``, ``edges``,
``nodes`` and ``harmonics_gradient``. The other names in capitals are constants of a generated
module (``program.py`` says what they are), and arguments where tables are read. Arrays go to those
functions by address; all work space is one array that the loops return, which keeps it alive while
only its address is in use.
"""


def drivers(tables: str = "", given: str = "", scratch: str = "", rows: str = "") -> str:
    """Write the loops.

    Args:
        tables: their first parameters, ``"A, B, "``; ``harmonics_gradient`` takes these, too.
        given: arguments that ``matrices``, ``forward``, ``edges`` and ``nodes`` take besides.
        scratch: argument that ``edges`` and ``nodes`` take after these.
        rows: argument that ``edges`` takes after that.
    """
    return PIECES + PASSES.format(tables=tables, given=given, scratch=scratch, rows=rows)


PIECES = '''

BYTES = np.dtype(FLOAT).itemsize
TILE_BYTES = 12288  # weights of a tile, and as many slopes: a part of the first cache
SUM_EDGES = 512  # edges in one sum of the gradient of a kernel: sums of sums lose fewer digits


@written
def radial_weights(k, B, b, n_radial, K, kernel, column, path, n_paths, blocks, n, W):
    """Weights of a tile and some blocks, W[t, p] = sum_r B[t, r] K[r, p]."""
    cuts = [k.number(0), *(k.remainder(n, step) for step in (8, 4, 2)), n]

    def rows(t, count, first, w):
        sums = [k.accumulator(k.zero()) for _ in range(count)]
        with k.loop(n_radial) as r:
            row = k.load(K, first + r * column)
            for i in range(count):
                sums[i].add(k.broadcast(B, b + (t + i) * n_radial + r), row)
        for i in range(count):
            k.store(W, w + (t + i) * (n_paths * blocks * T), sums[i].value)

    with k.loop(n_paths) as p:
        with k.loop(blocks) as c:
            first, w = kernel + (p * path + c * T), (p * blocks + c) * T
            for step, start, end in zip((8, 4, 2, 1), cuts[:-1], cuts[1:], strict=True):
                with k.loop_from(start, end, step=step) as t:
                    rows(t, step, first, w)


@written
def basis_gradient(k, D, K, kernel, column, path, n_paths, blocks, n, n_radial, Y):
    """Add the gradient of the radial functions, Y[t, r] += sum_p K[r, p] D[t, p], lane by lane."""
    pairs, full = k.remainder(n, 2), k.remainder(n_radial, 8)

    def part(t, r, edges, count):
        cells = [(i, j) for i in range(edges) for j in range(count)]
        at = [((t + i) * n_radial + (r + j)) * T for i, j in cells]
        sums = [k.accumulator(k.load(Y, cell)) for cell in at]
        with k.loop(n_paths) as p:
            with k.loop(blocks) as c:
                d, first = (p * blocks + c) * T, kernel + (p * path + c * T)
                slopes = [k.load(D, d + (t + i) * (n_paths * blocks * T)) for i in range(edges)]
                rows = [k.load(K, first + (r + j) * column) for j in range(count)]
                for (i, j), total in zip(cells, sums, strict=True):
                    total.add(rows[j], slopes[i])
        for cell, total in zip(at, sums, strict=True):
            k.store(Y, cell, total.value)

    def edges(t, count):
        with k.loop(full, step=8) as r:
            part(t, r, count, 8)
        with k.loop_from(full, n_radial) as r:
            part(t, r, count, 1)

    with k.loop(pairs, step=2) as t:
        edges(t, 2)
    with k.loop_from(pairs, n) as t:
        edges(t, 1)


@written
def kernel_gradient(k, D, B, b, n_radial, column, path, n_paths, blocks, n, Q, kernel):
    """Add the gradient of the radial kernel, Q[r, p] += sum_t B[t, r] D[t, p]."""
    full = k.remainder(n_radial, 8)

    def rows(d, first, r, count):
        at = [first + (r + i) * column for i in range(count)]
        sums = [k.accumulator(k.zero()) for _ in range(count)]
        with k.loop(n) as t:
            slope = k.load(D, d + t * (n_paths * blocks * T))
            for i in range(count):
                sums[i].add(k.broadcast(B, b + t * n_radial + r + i), slope)
        for i in range(count):
            k.store(Q, at[i], k.add(k.load(Q, at[i]), sums[i].value))

    with k.loop(n_paths) as p:
        with k.loop(blocks) as c:
            d, first = (p * blocks + c) * T, kernel + (p * path + c * T)
            with k.loop(full, step=8) as r:
                rows(d, first, r, 8)
            with k.loop_from(full, n_radial) as r:
                rows(d, first, r, 1)


@written
def sum_lanes(k, Z, OUT, out, count):
    """OUT[out + i] = sum over the lanes of Z[i]."""
    full = k.remainder(count, T)
    with k.loop(full, step=T) as i:
        k.store(OUT, out + i, k.lane_sums([k.load(Z, (i + j) * T) for j in range(T)]))
    with k.loop_from(full, count) as i:
        k.store_sum(OUT, out + i, k.load(Z, i * T))


@piece
def blocks_at_a_time(n_blocks, n_paths):
    """How many blocks of a tile keep their weights in the cache, in equal parts."""
    most = max(1, TILE_BYTES // (n_paths * T * T * BYTES))
    parts = -(-n_blocks // most)
    return -(-n_blocks // parts)


@piece
def transpose(S, n_harmonics, e, n, H):
    for t in range(n):
        for j in range(n_harmonics):
            H[j * T + t] = S[(e + t) * n_harmonics + j]


@piece
def move_rows(A, a, G, n_rows, channels, row_start, row_step, node, back):
    """Copy the rows of an atom from G to A[a:], block after block, or back."""
    row = 0
    for i in range(len(channels)):
        for c in range(0, channels[i], T):
            for r in range(row, row + n_rows[i]):
                at = row_start[r] + node * row_step[r] + c
                for lane in range(T):
                    if back:
                        G[at + lane] = A[a + lane]
                    else:
                        A[a + lane] = G[at + lane]
                a += T
        row += n_rows[i]


@piece
def add_up(PART, SUM):
    """Add a part to a sum and begin the next one."""
    for i in range(len(PART)):
        SUM[i] += PART[i]
        PART[i] = 0


@piece
def work_space(size):
    """Zeros that begin at a cache line, with their address."""
    space = np.zeros(size + 64, FLOAT)
    skip = (-space.ctypes.data % 64) // BYTES
    return space[skip : skip + size]
'''

PASSES = '''

@compiled
def forward_pass(
    {tables}X, S, W, B, K, rowptr, source, OUT,
    channels, x_first, w_first, n_weights, R, row_start, row_step, n0, n1,
):
    """Sums of atoms n0 ... n1 - 1. R = 0: weights are read from W; else they are B K."""
    n_sums = 0
    for i in range(len(N_ROWS)):
        n_sums += N_ROWS[i] * channels[i]
    at_m = N_HARMONICS * T
    at_u = at_m + N_ENTRIES * T
    at_a = at_u + MOST_PATHS * T * T
    space = work_space(at_a + n_sums)
    H, A = space[:at_m], space[at_a:]
    h = space.ctypes.data
    m, u, s = h + at_m * BYTES, h + at_u * BYTES, h + at_a * BYTES
    x, b, kernel, src = X.ctypes.data, B.ctypes.data, K.ctypes.data, source.ctypes.data
    w = W.ctypes.data
    for node in range(n0, n1):
        A[:] = 0
        for e in range(rowptr[node], rowptr[node + 1], T):
            n = min(T, rowptr[node + 1] - e)
            transpose(S, N_HARMONICS, e, n, H)
            matrices({given}h, m)
            a = 0
            for i in range(len(N_ROWS)):
                C, P = channels[i], N_PATHS[i]
                for c in range(0, C, T):
                    first = w_first[i] + c
                    if R > 0:
                        radial_weights(b, e * R, R, kernel, first, n_weights, C, P, 1, n, u)
                        w_from, w_0, edge, path = u, 0, P * T, T
                    else:
                        w_from, w_0, edge, path = w, e * n_weights + first, n_weights, C
                    forward(
                        {given}i, x, x_first[i] + c, C, w_from, w_0, edge, path, m, src, e, n,
                        s, a,
                    )
                    a += N_ROWS[i] * T
        move_rows(A, 0, OUT, N_ROWS, channels, row_start, row_step, node, True)
    return space


@compiled
def backward_pass(
    {tables}X, S, W, B, K, G, rowptr, source, rows, DX, DS, DW, DB, DK,
    channels, x_first, dx_first, w_first, n_weights, R, row_start, row_step, n0, n1,
    need_edges, need_kernel,
):
    """Gradients from atoms n0 ... n1 - 1 for the gradients G of their sums.

    DX, DK: added to; rows: row of DX of each edge. DS and DW or DB: written for the edges of the
    atoms if they are needed.
    """
    n_sums = n_tile = 0
    for i in range(len(N_ROWS)):
        n_sums += N_ROWS[i] * channels[i]
        if R > 0:
            n_tile = max(
                n_tile, N_PATHS[i] * T * T * blocks_at_a_time(channels[i] // T, N_PATHS[i])
            )
    at_m = N_HARMONICS * T
    at_u = at_m + N_ENTRIES * T
    at_d = at_u + n_tile
    at_q = at_d + n_tile
    at_z = at_q + N_SCRATCH
    at_y = at_z + N_SLOPES
    at_a = at_y + R * T * T
    space = work_space(at_a + n_sums)
    H, Z, A = space[:at_m], space[at_z:at_a], space[at_a:]
    h = space.ctypes.data
    m, u, d, s = h + at_m * BYTES, h + at_u * BYTES, h + at_d * BYTES, h + at_a * BYTES
    q, z, y = h + at_q * BYTES, h + at_z * BYTES, h + at_y * BYTES
    x, w, b, kernel = X.ctypes.data, W.ctypes.data, B.ctypes.data, K.ctypes.data
    src, local = source.ctypes.data, rows.ctypes.data
    PART = np.zeros(len(DK), FLOAT)
    dx, dw, dk = DX.ctypes.data, DW.ctypes.data, PART.ctypes.data
    begin = rowptr[n0]
    for node in range(n0, n1):
        if rowptr[node] == rowptr[node + 1]:
            continue
        move_rows(A, 0, G, N_ROWS, channels, row_start, row_step, node, False)
        for e in range(rowptr[node], rowptr[node + 1], T):
            n = min(T, rowptr[node + 1] - e)
            transpose(S, N_HARMONICS, e, n, H)
            matrices({given}h, m)
            Z[:] = 0
            a = 0
            for i in range(len(N_ROWS)):
                C, P = channels[i], N_PATHS[i]
                blocks = blocks_at_a_time(C // T, P) if R > 0 else C // T
                for c in range(0, C, blocks * T):
                    blocks = min(blocks, (C - c) // T)
                    first = w_first[i] + c
                    if R > 0:
                        radial_weights(
                            b, e * R, R, kernel, first, n_weights, C, P, blocks, n, u
                        )
                        wp, w0, grad, g0 = u, 0, d, 0
                        edge, path = P * blocks * T, blocks * T
                    else:
                        wp, w0, grad, g0 = w, e * n_weights + first, dw, e * n_weights + first
                        edge, path = n_weights, C
                    if need_edges:
                        edges(
                            {given}{scratch}{rows}i, x, x_first[i] + c, C, wp, w0, edge, path, m,
                            src, local, e, n, blocks, s, a, dx, dx_first[i] + c, grad, g0, edge,
                            path, z,
                        )
                        if R > 0:
                            basis_gradient(d, kernel, first, n_weights, C, P, blocks, n, R, y)
                            if need_kernel:
                                kernel_gradient(
                                    d, b, e * R, R, n_weights, C, P, blocks, n, dk, first
                                )
                        a += blocks * N_ROWS[i] * T
                    else:
                        for block in range(blocks):
                            nodes(
                                {given}{scratch}i, dx, dx_first[i] + c + block * T, C, wp,
                                w0 + block * T, edge, path, m, local, e, n, s, a,
                            )
                            a += N_ROWS[i] * T
            if need_edges:
                harmonics_gradient({tables}Z, DS, e, n)
                if R > 0:
                    sum_lanes(y, DB.ctypes.data, e * R, n * R)
        if need_kernel and rowptr[node + 1] - begin >= SUM_EDGES:
            add_up(PART, DK)
            begin = rowptr[node + 1]
    if need_kernel:
        add_up(PART, DK)
    return space

'''
