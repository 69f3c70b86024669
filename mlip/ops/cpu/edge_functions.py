"""Harmonics and radial functions of edges, and their gradient, in one loop over edges each.

For code that writes its own backward pass: nothing here is seen by autograd. Solid harmonics of
degree l follow from those below, with Clebsch–Gordan coefficients C of l−1 and 1 to l:

    R_l = k_l C(R_{l−1}, r),   ∂R_l/∂r = l k_l C(R_{l−1}, ·),

k_l such that (R_l)² sums to 2l + 1 on the unit sphere; the second line is Euler's theorem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mlip.ops.cpu import threads
from mlip.ops.cpu.cache import load
from mlip.ops.cpu.library import as_array
from mlip.so3 import clebsch_gordan

SERIAL_EDGES = 4096  # below, threads do not pay


@dataclass(frozen=True)
class EdgeFunctions:
    """Y(d/r) to degree ``lmax`` and b_n(r) = 2 sin(f_n r) u(r)/r of edge vectors d, r = |d|.

    u is the polynomial envelope 1 + s^p (a + b s + c s²), s = r/cutoff, of ``mlip.nn.radial``.

    lmax: highest degree. frequencies: f, [R] rad/Å. cutoff: Å. order: p of the envelope.
    """

    lmax: int
    frequencies: Tensor
    cutoff: float
    order: int

    def values(self, vectors: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Evaluate edge vectors [E, 3] Å.

        Returns:
            Y [E, (lmax+1)²], component normalised; b [E, R]; and what ``gradient`` takes: the
            phases f r [E, R], reduced to −π … π, and their sines.
        """
        count = len(vectors)
        harmonics = vectors.new_empty(count, (self.lmax + 1) ** 2)
        phases = vectors.new_empty(count, len(self.frequencies))
        factors = vectors.new_empty(count, 1)
        self._run("values", count, vectors, harmonics, phases, factors)
        sines = torch.sin(phases)
        return harmonics, sines * factors, (phases, sines)

    def gradient(
        self, vectors: Tensor, waves: tuple[Tensor, Tensor], of_harmonics: Tensor, of_basis: Tensor
    ) -> Tensor:
        """Differentiate Σ of_harmonics·Y + Σ of_basis·b by the vectors.

        Args:
            vectors: [E, 3] Å.
            waves: as ``values`` gives them for these vectors.
            of_harmonics: [E, (lmax+1)²].
            of_basis: [E, R].

        Returns:
            [E, 3].
        """
        out = torch.empty_like(vectors)
        phases, sines = waves
        given = (vectors, sines, torch.cos(phases), of_harmonics, of_basis)
        self._run("gradient", len(vectors), *given, out)
        return out

    def _run(self, loop: str, count: int, *tensors: Tensor) -> None:
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        module = loops(self.lmax, len(self.frequencies), self.order, dtype)
        arrays = [as_array(tensor).ravel() for tensor in (*tensors, self.frequencies)]
        call = partial(getattr(module, loop), *arrays, self.cutoff)
        threads.run_range(call, count, serial=count < SERIAL_EDGES)


@cache
def loops(lmax: int, n_radial: int, order: int, dtype: str) -> ModuleType:
    """Compiled loops, from the cache on disk if they are there."""
    return load(f"edges_{dtype}", source_text(lmax, n_radial, order, dtype))


def source_text(lmax: int, n_radial: int, order: int, dtype: str) -> str:
    """Write the module; one edge after another, in float64 between reading and writing."""
    p, k, r = order, (lmax + 1) ** 2, n_radial
    raised = [_raised(degree) for degree in range(1, lmax + 1)]
    recursion = [
        f"y{row} = {' + '.join(f'{c!r} * y{low} * {axis}' for c, low, axis in terms)}"
        for rows in raised
        for row, terms in rows.items()
    ]
    slopes = [
        f"g{axis} += {math.isqrt(row) * c!r} * y{low} * GH[{k} * e + {row}]"
        for rows in raised
        for row, terms in rows.items()
        for c, low, axis in terms
    ]
    return TEXT.format(
        dtype=dtype,
        p=p,
        m=p - 1,
        p1=p + 1,
        p2=p + 2,
        a=-(p + 1) * (p + 2) / 2,
        b=float(p * (p + 2)),
        c=-p * (p + 1) / 2,
        recursion=_lines(recursion),
        below=_lines(recursion[: lmax**2 - 1]),
        stores=_lines([f"H[{k} * e + {row}] = y{row}" for row in range(k)]),
        phases=_lines([f"P[{r} * e + {n}] = reduced(r * F[{n}])" for n in range(r)]),
        slopes=_lines(slopes),
        radial=_lines(
            [
                f"dr += GB[{r} * e + {n}] * (C[{r} * e + {n}] * F[{n}] * w + S[{r} * e + {n}] * dw)"
                for n in range(r)
            ]
        ),
    )


def _raised(degree: int) -> dict[int, list[tuple[float, int, str]]]:
    """Terms (factor, row of degree − 1, axis) of each row of a degree."""
    table = np.asarray(clebsch_gordan(degree - 1, 1, degree))
    middle = table[degree - 1, 1, degree]  # along y, rows of order 0 alone do not vanish
    factor = math.sqrt((2 * degree + 1) / (2 * degree - 1)) / middle
    terms: dict[int, list[tuple[float, int, str]]] = {}
    for m3 in range(2 * degree + 1):
        for m1, axis in np.argwhere(np.abs(table[:, :, m3]) > 1e-12):
            term = (float(factor * table[m1, axis, m3]), (degree - 1) ** 2 + int(m1), "xyz"[axis])
            terms.setdefault(degree**2 + m3, []).append(term)
    return terms


def _lines(lines: list[str]) -> str:
    return "\n        ".join(lines)


TEXT = '''"""Generated by mlip: harmonics and radial functions of edges, {dtype}."""
import numpy as np
from mlip.ops.cpu.jit import compiled, piece
TINY = np.finfo(np.{dtype}).tiny
TURN = 2 * np.pi


@piece
def direction(V, e):
    """Components of the unit vector (zero of a zero vector), length and its inverse."""
    x, y, z = np.float64(V[3 * e]), np.float64(V[3 * e + 1]), np.float64(V[3 * e + 2])
    r2 = x * x + y * y + z * z
    r = np.sqrt(r2)
    inverse = 1 / r if r2 >= TINY else 0.0
    return x * inverse, y * inverse, z * inverse, r, inverse


@piece
def envelope(s):
    """Polynomial envelope and its derivative at s = r / cutoff."""
    if s >= 1:
        return 0.0, 0.0
    power = s ** {m}
    u = 1 + power * s * ({a} + s * ({b} + s * {c}))
    return u, power * ({p} * {a} + s * ({p1} * {b} + s * ({p2} * {c})))


@piece
def reduced(phase):
    return phase - TURN * np.rint(phase * (1 / TURN))


@compiled
def values(V, H, P, W, F, cutoff, n0, n1):
    """Write harmonics, phases, and the factors of the sines of edges n0 ... n1 - 1."""
    for e in range(n0, n1):
        x, y, z, r, inverse = direction(V, e)
        W[e] = 2 * envelope(r / cutoff)[0] / r
        y0 = 1.0
        {recursion}
        {stores}
        {phases}


@compiled
def gradient(V, S, C, GH, GB, DV, F, cutoff, n0, n1):
    """Write the gradients by edges n0 ... n1 - 1; S, C: sines and cosines."""
    for e in range(n0, n1):
        x, y, z, r, inverse = direction(V, e)
        u, du = envelope(r / cutoff)
        w = 2 * u / r
        dw = (2 * du / cutoff - w) / r
        y0 = 1.0
        {below}
        gx = gy = gz = 0.0
        {slopes}
        dr = 0.0
        {radial}
        along = dr - (gx * x + gy * y + gz * z) * inverse
        DV[3 * e] = gx * inverse + along * x
        DV[3 * e + 1] = gy * inverse + along * y
        DV[3 * e + 2] = gz * inverse + along * z
'''
