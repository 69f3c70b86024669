"""Source text of the backward pass over pairs of opposite edges, for one set of paths.

i ← j and j ← i have the same radial functions, so the same weights, and harmonics of one sign or
the other. The pass makes weights once for both, does the slopes of both, and sums those of weights
before it goes back to the radial functions. Terms as in ``generate.py``.
"""

from __future__ import annotations

from mlip.ops.convolution import Path
from mlip.ops.cpu.coupling import Coupling
from mlip.ops.cpu.drivers import PIECES
from mlip.ops.cpu.generate import (
    HARMONICS_GRADIENT,
    Text,
    by_group,
    edges,
    group_sizes,
    head,
    matrices,
    slopes_of_edges,
)

EDGES = (
    "(X, x, channels, W, w, edge, path, M, source_index, row_index, e, n, blocks, A, a, DX, dx, "
    "D, d, dedge, dpath, Z)"
)
OPPOSITE = (
    "(X, x, channels, W, w, edge, path, M, source_index, e, n, blocks, A, a, stride, DX, dx, "
    "node, own, D, d, dedge, dpath, Z)"
)


def source_text(paths: tuple[Path, ...], lmax_edge: int, dtype: str) -> str:
    """Write the module for one set of paths and one precision.

    Args:
        paths: (l1, l2, l3), sorted by l1.
        lmax_edge: highest degree of the harmonics.
        dtype: float32 or float64.
    """
    text, table, width = head("pairs of opposite edges", paths, lmax_edge, dtype, True)
    matrices(text, table, width)
    degrees = sorted({l1 for l1, _, _ in paths})
    for l1 in degrees:
        group = [c for c in table if c.path[0] == l1]
        edges(text, l1, group, width)
        _opposite(text, l1, group, width)
    group_sizes(text, paths)
    text.lines += [PIECES, PAIR_PASS]
    by_group(text, "edges", EDGES, degrees)
    by_group(text, "opposite", OPPOSITE, degrees)
    text.lines.append(HARMONICS_GRADIENT)
    return "\n".join(text.lines) + "\n"


def _opposite(text: Text, l1: int, group: list[Coupling], width: int) -> None:
    text("", 0)
    text("@written", 0)
    text(f"def opposite_{l1}(k, {OPPOSITE[1:]}:", 0)
    text('"""The same for the opposite edges, from one atom to n; D is added to."""')
    text("with k.loop(n) as t:")
    text(f"here, there = (f + i * (channels * {2 * l1 + 1}) for f, i in ((x, node), (dx, own)))", 2)
    text("sums = a + k.integer(source_index, e + t) * stride", 2)
    text("weight, slope = w + t * edge, d + t * dedge", 2)
    slopes_of_edges(text, l1, group, width, opposite=True)


PAIR_PASS = '''

@compiled
def by_atom(G, channels, row_start, row_step, OUT, n0, n1):
    """Gradients of the sums of atoms n0 ... n1 - 1, atom after atom in the order of a tile."""
    size = 0
    for i in range(len(N_ROWS)):
        size += N_ROWS[i] * channels[i]
    for node in range(n0, n1):
        move_rows(OUT, node * size, G, N_ROWS, channels, row_start, row_step, node, False)


@compiled
def pair_pass(
    X, S, B, K, G, first, source, rows, row_of, DX, DS, DB,
    channels, x_first, dx_first, w_first, n_weights, R, n0, n1,
):
    """Gradients from the pairs of targets n0 ... n1 - 1 for the gradients G, ``by_atom``.

    first: first pair of each target i; source: j. S, B: of i <- j. rows, row_of: row of DX of j
    and of i. DX: added to. DS, DB: written for the pairs of these atoms, sums of both directions.
    """
    n_sums = n_tile = 0
    for i in range(len(N_ROWS)):
        n_sums += N_ROWS[i] * channels[i]
        n_tile = max(n_tile, N_PATHS[i] * T * T * blocks_at_a_time(channels[i] // T, N_PATHS[i]))
    at_m = N_HARMONICS * T
    at_u = at_m + N_ENTRIES * T
    at_d = at_u + n_tile
    at_z = at_d + n_tile
    at_y = at_z + N_SLOPES
    space = work_space(at_y + R * T * T)
    H, Z = space[:at_m], space[at_z:]
    h = space.ctypes.data
    m, u, d, z = h + at_m * BYTES, h + at_u * BYTES, h + at_d * BYTES, h + at_z * BYTES
    y, b = h + at_y * BYTES, B.ctypes.data
    x, g, kernel, dx = X.ctypes.data, G.ctypes.data, K.ctypes.data, DX.ctypes.data
    src, local = source.ctypes.data, rows.ctypes.data
    for node in range(n0, n1):
        own = row_of[node]
        for e in range(first[node], first[node + 1], T):
            n = min(T, first[node + 1] - e)
            transpose(S, N_HARMONICS, e, n, H)
            matrices(h, m)
            Z[:] = 0
            a = 0
            for i in range(len(N_ROWS)):
                C, P = channels[i], N_PATHS[i]
                blocks = blocks_at_a_time(C // T, P)
                for c in range(0, C, blocks * T):
                    blocks = min(blocks, (C - c) // T)
                    column = w_first[i] + c
                    of_tile, path = P * blocks * T, blocks * T
                    radial_weights(b, e * R, R, kernel, column, n_weights, C, P, blocks, n, u)
                    edges(
                        i, x, x_first[i] + c, C, u, 0, of_tile, path, m, src, local, e, n, blocks,
                        g, node * n_sums + a, dx, dx_first[i] + c, d, 0, of_tile, path, z,
                    )
                    opposite(
                        i, x, x_first[i] + c, C, u, 0, of_tile, path, m, src, e, n, blocks,
                        g, a, n_sums, dx, dx_first[i] + c, node, own, d, 0, of_tile, path, z,
                    )
                    basis_gradient(d, kernel, column, n_weights, C, P, blocks, n, R, y)
                    a += blocks * N_ROWS[i] * T
            harmonics_gradient(Z, DS, e, n)
            sum_lanes(y, DB.ctypes.data, e * R, n * R)
    return space
'''
