"""Source text of the loops over atoms, tiles and blocks, the same for every set of paths.

It is a part of the generated module (``generate.py``), which defines the capitals and the functions
``matrices``, ``forward``, ``edges`` and ``nodes``. Arrays go to those by address; all work space is
one array that the loops return, which keeps it alive while only its address is in use.
"""

DRIVERS = '''

OPTIONS = dict(nogil=True, error_model="numpy", boundscheck=False, cache=True)
BYTES = np.dtype(FLOAT).itemsize


@written
def radial_weights(k, B, b, n_radial, K, kernel, column, path, n_paths, n, W):
    """Weights of a tile and block, W[t, p] = sum_r B[t, r] K[r, p]."""
    full = k.remainder(n, 8)
    with k.loop(n_paths) as p:
        first = kernel + p * path
        with k.loop(full, step=8) as t:
            sums = [k.accumulator(k.zero()) for _ in range(8)]
            with k.loop(n_radial) as r:
                row = k.load(K, first + r * column)
                for i in range(8):
                    sums[i].add(k.broadcast(B, b + (t + i) * n_radial + r), row)
            for i in range(8):
                k.store(W, ((t + i) * n_paths + p) * T, sums[i].value)
        with k.loop_from(full, n) as t:
            total = k.accumulator(k.zero())
            with k.loop(n_radial) as r:
                total.add(k.broadcast(B, b + t * n_radial + r), k.load(K, first + r * column))
            k.store(W, (t * n_paths + p) * T, total.value)


@written
def basis_gradient(k, D, K, kernel, column, path, n_paths, n, n_radial, Y):
    """Add the gradient of the radial functions, Y[t, r] += sum_p K[r, p] D[t, p], lane by lane."""
    full = k.remainder(n_radial, 8)

    def rows(t, r, count):
        sums = [k.accumulator(k.load(Y, (t * n_radial + r + i) * T)) for i in range(count)]
        with k.loop(n_paths) as p:
            slope = k.load(D, (t * n_paths + p) * T)
            for i in range(count):
                sums[i].add(k.load(K, kernel + (r + i) * column + p * path), slope)
        for i in range(count):
            k.store(Y, (t * n_radial + r + i) * T, sums[i].value)

    with k.loop(n) as t:
        with k.loop(full, step=8) as r:
            rows(t, r, 8)
        with k.loop_from(full, n_radial) as r:
            rows(t, r, 1)


@written
def kernel_gradient(k, D, B, b, n_radial, column, path, n_paths, n, Q, kernel):
    """Add the gradient of the radial kernel, Q[r, p] += sum_t B[t, r] D[t, p]."""
    full = k.remainder(n_radial, 8)

    def rows(p, r, count):
        at = [kernel + (r + i) * column + p * path for i in range(count)]
        sums = [k.accumulator(k.zero()) for _ in range(count)]
        with k.loop(n) as t:
            slope = k.load(D, (t * n_paths + p) * T)
            for i in range(count):
                sums[i].add(k.broadcast(B, b + t * n_radial + r + i), slope)
        for i in range(count):
            k.store(Q, at[i], k.add(k.load(Q, at[i]), sums[i].value))

    with k.loop(n_paths) as p:
        with k.loop(full, step=8) as r:
            rows(p, r, 8)
        with k.loop_from(full, n_radial) as r:
            rows(p, r, 1)


@written
def sum_lanes(k, Z, OUT, out, count):
    """OUT[out + i] = sum over the lanes of Z[i]."""
    with k.loop(count) as i:
        k.store_sum(OUT, out + i, k.load(Z, i * T))


@njit(**OPTIONS)
def transpose(S, e, n, H):
    for t in range(n):
        for j in range(N_HARMONICS):
            H[j * T + t] = S[(e + t) * N_HARMONICS + j]


@njit(**OPTIONS)
def work_space(size):
    """Zeros that begin at a cache line, with their address."""
    space = np.zeros(size + 64, FLOAT)
    skip = (-space.ctypes.data % 64) // BYTES
    return space[skip : skip + size]


@njit(**OPTIONS)
def forward_pass(
    X, S, W, B, K, rowptr, source, OUT,
    channels, x_first, w_first, n_weights, R, row_start, row_step, n0, n1,
):
    """Sums of atoms n0 ... n1 - 1. R = 0: weights are read from W; else they are B K."""
    n_sums = 0
    for i in range(len(DEGREES)):
        n_sums += N_ROWS[i] * channels[i]
    at_m = N_HARMONICS * T
    at_u = at_m + N_ENTRIES * T
    at_a = at_u + max(N_PATHS) * T * T
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
            transpose(S, e, n, H)
            matrices(h, m)
            a = 0
            for i in range(len(DEGREES)):
                C, P = channels[i], N_PATHS[i]
                for c in range(0, C, T):
                    first = w_first[i] + c
                    if R > 0:
                        radial_weights(b, e * R, R, kernel, first, n_weights, C, P, n, u)
                        w_from, w_0, edge, path = u, 0, P * T, T
                    else:
                        w_from, w_0, edge, path = w, e * n_weights + first, n_weights, C
                    forward(
                        DEGREES[i], x, x_first[i] + c, C, w_from, w_0, edge, path, m, src, e, n,
                        s, a,
                    )
                    a += N_ROWS[i] * T
        a = 0
        row = 0
        for i in range(len(DEGREES)):
            for c in range(0, channels[i], T):
                for r in range(row, row + N_ROWS[i]):
                    to = row_start[r] + node * row_step[r] + c
                    for lane in range(T):
                        OUT[to + lane] = A[a + lane]
                    a += T
            row += N_ROWS[i]
    return space


@njit(**OPTIONS)
def backward_pass(
    X, S, W, B, K, G, rowptr, source, rows, DX, DS, DW, DB, DK,
    channels, x_first, dx_first, w_first, n_weights, R, row_start, row_step, n0, n1,
    need_features, need_edges, need_kernel,
):
    """Gradients from atoms n0 ... n1 - 1 for the gradients G of their sums.

    DX, DK: added to; rows: row of DX of each edge. DS and DW or DB: written for the edges of the
    atoms.
    """
    n_sums = 0
    for i in range(len(DEGREES)):
        n_sums += N_ROWS[i] * channels[i]
    at_m = N_HARMONICS * T
    at_u = at_m + N_ENTRIES * T
    at_d = at_u + max(N_PATHS) * T * T
    at_z = at_d + max(N_PATHS) * T * T
    at_y = at_z + N_HARMONICS * T * T
    at_a = at_y + R * T * T
    space = work_space(at_a + n_sums)
    H, Z, A = space[:at_m], space[at_z:at_a], space[at_a:]
    h = space.ctypes.data
    m, u, d, s = h + at_m * BYTES, h + at_u * BYTES, h + at_d * BYTES, h + at_a * BYTES
    z, y = h + at_z * BYTES, h + at_y * BYTES
    x, w, b, kernel = X.ctypes.data, W.ctypes.data, B.ctypes.data, K.ctypes.data
    src, local = source.ctypes.data, rows.ctypes.data
    dx, dw, dk = DX.ctypes.data, DW.ctypes.data, DK.ctypes.data
    for node in range(n0, n1):
        if rowptr[node] == rowptr[node + 1]:
            continue
        a = 0
        row = 0
        for i in range(len(DEGREES)):
            for c in range(0, channels[i], T):
                for r in range(row, row + N_ROWS[i]):
                    of = row_start[r] + node * row_step[r] + c
                    for lane in range(T):
                        A[a + lane] = G[of + lane]
                    a += T
            row += N_ROWS[i]
        for e in range(rowptr[node], rowptr[node + 1], T):
            n = min(T, rowptr[node + 1] - e)
            transpose(S, e, n, H)
            if need_features:
                matrices(h, m)
            Z[:] = 0
            a = 0
            for i in range(len(DEGREES)):
                C, P = channels[i], N_PATHS[i]
                for c in range(0, C, T):
                    first = w_first[i] + c
                    if R > 0:
                        radial_weights(b, e * R, R, kernel, first, n_weights, C, P, n, u)
                        wp, w0, dedge, path, grad, g0 = u, 0, P * T, T, d, 0
                    else:
                        w0 = e * n_weights + first
                        wp, dedge, path, grad, g0 = w, n_weights, C, dw, w0
                    if need_edges:
                        edges(
                            DEGREES[i], x, x_first[i] + c, C, wp, w0, dedge, path, h, src, e, n,
                            s, a, grad, g0, dedge, path, z,
                        )
                        if R > 0:
                            basis_gradient(d, kernel, first, n_weights, C, P, n, R, y)
                            if need_kernel:
                                kernel_gradient(d, b, e * R, R, n_weights, C, P, n, dk, first)
                    if need_features:
                        nodes(
                            DEGREES[i], dx, dx_first[i] + c, C, wp, w0, dedge, path, m, local, e, n,
                            s, a,
                        )
                    a += N_ROWS[i] * T
            if need_edges:
                sum_lanes(z, DS.ctypes.data, e * N_HARMONICS, n * N_HARMONICS)
                if R > 0:
                    sum_lanes(y, DB.ctypes.data, e * R, n * R)
    return space

'''
