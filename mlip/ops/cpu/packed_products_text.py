"""Source text of the kernels that multiply functions on the sphere, circle by circle of latitude.

On a circle a function is a short Fourier series, f(φ) = Σ_m z_m e^{imφ} with z_{−m} the conjugate
of z_m; products are convolutions of series, and no point of a grid is visited. In code a series is
a dictionary: order m > 0 holds Re z_m and order −m holds −Im z_m, half of the factors of cos mφ and
sin mφ. Series of all circles stay in cache between the two steps, S. LMAX and LMAX_OUT are degrees
of factors and products, ORDER the number of factors; with PARTIAL the last vector of channels is
not whole.
"""

from __future__ import annotations

CIRCLES = '''
MOST = max(LMAX, LMAX_OUT)
ENTRIES = (MOST + 1) * (MOST + 2) // 2  # of a table for one circle, at l (l + 1) / 2 + |m|
WAVES = ORDER * (2 * LMAX + 1)
PRODUCT_WAVES = (ORDER - 1) * (2 * LMAX_OUT + 1)


def rows(lmax):
    return [(l, m) for l in range(lmax + 1) for m in range(-l, l + 1)]


def places(lmax, atoms, n, width, c):
    """Where the rows (l, m) of atom n begin, at channel c; one degree lies after the other."""
    return {
        (l, m): (atoms * (l * l) + n * (2 * l + 1) + (l + m)) * width + c for l, m in rows(lmax)
    }


def entry(l, m):
    return l * (l + 1) // 2 + abs(m)


def series(k, TABLE, at, X, places, lmax):
    """Series on one circle of the function with the coefficients X."""
    found = {}
    for l, m in rows(lmax):
        term = k.broadcast(TABLE, at + entry(l, m)), k.load(X, places[l, m])
        found[m] = k.fma(*term, found[m]) if m in found else k.mul(*term)
    half = k.constant(0.5)
    return {m: k.mul(half, value) if m else value for m, value in found.items()}


def product(k, f, g, most):
    """Series of f g, up to an order: z_k is the sum of z_m z_n with m + n = k."""
    found = {}

    def add(order, x, y, negative=False):
        x = k.negative(x) if negative else x
        found[order] = k.fma(x, y, found[order]) if order in found else k.mul(x, y)

    for total in range(min(most, max(f) + max(g)) + 1):
        for m in range(total - max(g), max(f) + 1):
            n = total - m
            if total == 0 and m <= 0:  # the others are conjugates of these
                continue
            if -m in f and -n in g:
                a, b = abs(m), abs(n)
                add(total, f[a], g[b])
                if m and n:
                    add(total, f[-a], g[-b], negative=m * n > 0)
                if total:
                    if n:
                        add(-total, f[a], g[-b], negative=n < 0)
                    if m:
                        add(-total, f[-a], g[b], negative=m < 0)
        if total == 0:
            if 0 in found:
                found[0] = k.add(found[0], found[0])
            add(0, f[0], g[0])
    return found


def added(k, f, g):
    return {m: k.add(f[m], g[m]) if m in f and m in g else f.get(m, g.get(m)) for m in {**f, **g}}


def keep(k, S, at, f, lmax):
    for m in range(-lmax, lmax + 1):
        k.store(S, at + (lmax + m) * T, f[m] if m in f else k.zero())


def sum_circles(k, S, TABLE, OUT, places, lmax, parts, width, waves, circles):
    """Write the coefficients: sums over circles of table entries times series."""
    for l, m in rows(lmax):
        sums = [k.accumulator(k.zero()) for _ in range(parts)]
        with k.loop(circles) as p:
            factor = k.broadcast(TABLE, p * ENTRIES + entry(l, m))
            for i, total in enumerate(sums):
                wave = p * (waves * T) + ((2 * lmax + 1) * i + lmax + m) * T
                total.add(factor, k.load(S, wave))
        for i, total in enumerate(sums):
            k.store(OUT, places[l, m] + width * i, total.value)


def shifted(places, by):
    return {row: at + by for row, at in places.items()}


@written
def circle_products(k, U, TO, S, atoms, n, c, channels, circles):
    """Series of the running products of one atom and block of channels."""
    k.use_lanes(channels - c, PARTIAL)
    first = places(LMAX, atoms, n, channels * ORDER, c)
    with k.loop(circles) as p:
        total = series(k, TO, p * ENTRIES, U, first, LMAX)
        for i in range(1, ORDER):
            factor = series(k, TO, p * ENTRIES, U, shifted(first, channels * i), LMAX)
            total = product(k, total, factor, LMAX_OUT + LMAX * (ORDER - 1 - i))
            at = p * (PRODUCT_WAVES * T) + (2 * LMAX_OUT + 1) * (i - 1) * T
            keep(k, S, at, total, LMAX_OUT)


@written
def products_of_circles(k, S, FROM, OUT, atoms, n, c, channels, circles):
    """Write the products of one atom and block of channels."""
    k.use_lanes(channels - c, PARTIAL)
    out = places(LMAX_OUT, atoms, n, channels * (ORDER - 1), c)
    sum_circles(k, S, FROM, OUT, out, LMAX_OUT, ORDER - 1, channels, PRODUCT_WAVES, circles)


@written
def circle_slopes(k, U, G, TO, FROM, S, atoms, n, g_atoms, g, c, channels, circles):
    """Series of the slopes of the factors of one atom (n; g in G) and block of channels."""
    k.use_lanes(channels - c, PARTIAL)
    first = places(LMAX, atoms, n, channels * ORDER, c)
    given = places(LMAX_OUT, g_atoms, g, channels * (ORDER - 1), c)
    with k.loop(circles) as p:
        at = p * ENTRIES
        factors = [
            series(k, TO, at, U, shifted(first, channels * i), LMAX) for i in range(ORDER)
        ]
        slopes = [
            series(k, FROM, at, G, shifted(given, channels * i), LMAX_OUT)
            for i in range(ORDER - 1)
        ]
        before = [factors[0]]
        for factor in factors[1:-1]:
            before.append(product(k, before[-1], factor, LMAX + LMAX_OUT))
        total, to = slopes[-1], p * (WAVES * T)
        for i in range(ORDER - 1, 0, -1):
            own = product(k, total, before[i - 1], LMAX)
            keep(k, S, to + (2 * LMAX + 1) * i * T, own, LMAX)
            total = product(k, total, factors[i], LMAX * i)
            if i > 1:
                total = added(k, total, slopes[i - 2])
        keep(k, S, to, total, LMAX)


@written
def slopes_of_circles(k, S, TO, DU, atoms, n, c, channels, circles):
    """Write the slopes of the coefficients of one atom and block of channels."""
    k.use_lanes(channels - c, PARTIAL)
    out = places(LMAX, atoms, n, channels * ORDER, c)
    sum_circles(k, S, TO, DU, out, LMAX, ORDER, channels, WAVES, circles)

'''
