"""Source text of the loops around ``second_text.py``, with the pieces of ``drivers.py``."""

SECOND_PASS = '''

@piece
def radial_slopes(
    d, df, b, ba, kernel, e, R, n_weights, first, C, P, blocks, n, need_radial, DK, y
):
    """Take derivatives by the weights of a tile to radial functions (y) and kernel (DK)."""
    if need_radial:
        basis_gradient(d, kernel, first, n_weights, C, P, blocks, n, R, y)
    if len(DK):
        dk = DK.ctypes.data
        kernel_gradient(d, b, e * R, R, n_weights, C, P, blocks, n, dk, first)
        kernel_gradient(df, ba, e * R, R, n_weights, C, P, blocks, n, dk, first)


@compiled
def second_pass(
    X, XA, S, SA, W, WA, B, BA, K, G, rowptr, source, rows_of, DX, DS, DW, DB, DK, DG,
    channels, x_first, dx_first, w_first, n_weights, R, row_start, row_step, n0, n1,
):
    """Second derivatives from atoms n0 ... n1 - 1. R = 0: weights are W, WA; else B K, BA K.

    DX, DK: added to; rows_of: row of DX of each edge. DS, DB, DG: written unless empty, for the
    edges and atoms. DW: written if R = 0 and the code is for slopes of weights.
    """
    n_sums = n_tile = 0
    for i in range(len(N_ROWS)):
        n_sums += N_ROWS[i] * channels[i]
        blocks = blocks_at_a_time(channels[i] // T, N_PATHS[i])
        n_tile = max(n_tile, N_PATHS[i] * T * T * blocks if R > 0 else 0)
    at_m = N_HARMONICS * T
    at_u = at_m + 2 * N_ENTRIES * T
    at_z = at_u + 4 * n_tile
    at_y = at_z + N_SLOPES
    at_a = at_y + R * T * T
    space = work_space(at_a + 2 * n_sums)
    H, Z = space[:at_m], space[at_z:at_a]
    A, SUMS = space[at_a : at_a + n_sums], space[at_a + n_sums :]
    h = space.ctypes.data
    m, u, z, y = h + at_m * BYTES, h + at_u * BYTES, h + at_z * BYTES, h + at_y * BYTES
    ma, tile = m + N_ENTRIES * T * BYTES, n_tile * BYTES
    wp, wap, d, df = W.ctypes.data, WA.ctypes.data, DW.ctypes.data, DW.ctypes.data
    if R > 0:
        wp, wap, d, df = u, u + tile, u + 2 * tile, u + 3 * tile
    b, ba, kernel = B.ctypes.data, BA.ctypes.data, K.ctypes.data
    x, xa, dx = X.ctypes.data, XA.ctypes.data, DX.ctypes.data
    src, local = source.ctypes.data, rows_of.ctypes.data
    PART = np.zeros(len(DK), FLOAT)
    begin = rowptr[n0]
    for node in range(n0, n1):
        move_rows(A, 0, G, N_ROWS, channels, row_start, row_step, node, False)
        SUMS[:] = 0
        for e in range(rowptr[node], rowptr[node + 1], T):
            n = min(T, rowptr[node + 1] - e)
            transpose(S, N_HARMONICS, e, n, H)
            matrices(h, m)
            transpose(SA, N_HARMONICS, e, n, H)
            matrices(h, ma)
            Z[:] = 0
            a = 0
            for i in range(len(N_ROWS)):
                C, P = channels[i], N_PATHS[i]
                step = blocks_at_a_time(C // T, P) if R > 0 else C // T
                for c in range(0, C, step * T):
                    blocks = min(step, (C - c) // T)
                    first = w_first[i] + c
                    w, edge, path = e * n_weights + first, n_weights, C
                    if R > 0:
                        w, edge, path = 0, P * blocks * T, blocks * T
                        radial_weights(b, e * R, R, kernel, first, n_weights, C, P, blocks, n, wp)
                        radial_weights(
                            ba, e * R, R, kernel, first, n_weights, C, P, blocks, n, wap
                        )
                    edges(
                        i, x, xa, x_first[i] + c, C, wp, wap, w, edge, path, m, ma, src, local, e,
                        n, blocks, A.ctypes.data, a, dx, dx_first[i] + c, d, df, z,
                    )
                    if R > 0:
                        radial_slopes(
                            d, df, b, ba, kernel, e, R, n_weights, first, C, P, blocks, n,
                            len(DB) > 0, PART, y,
                        )
                    for block in range(blocks):
                        if len(DG):
                            rows(
                                i, x, xa, x_first[i] + c + block * T, C, wp, wap, w + block * T,
                                edge, path, m, ma, src, e, n, SUMS.ctypes.data, a,
                            )
                        a += N_ROWS[i] * T
            if len(DS):
                harmonics_gradient(Z, DS, e, n)
            if len(DB):
                sum_lanes(y, DB.ctypes.data, e * R, n * R)
        if len(DG):
            move_rows(SUMS, 0, DG, N_ROWS, channels, row_start, row_step, node, True)
        if rowptr[node + 1] - begin >= SUM_EDGES:
            add_up(PART, DK)
            begin = rowptr[node + 1]
    add_up(PART, DK)
    return space

'''
