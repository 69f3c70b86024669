"""Product grids on the sphere with exact quadrature, and the matrices to and from them.

Grids of the published models are reproduced point by point; no layer lives here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.so3.harmonics import spherical_harmonics
from mlip.so3.orders import degree_major

Quadrature = Literal["soft", "gauss_legendre"]


@dataclass(frozen=True)
class SphereGrid:
    """Points of B latitudes × A longitudes and their quadrature, all float64.

    ``to_grid @ coefficients`` evaluates a function with K coefficients, (lmax+1)² or fewer, of
    component-normalised harmonics; ``from_grid @ values`` projects back and is its left inverse.

    Attributes:
        points: [B, A, 3] unit vectors, polar axis y, latitudes from south (−y) to north.
        weights: [B, A], sum 1: the sum over the grid is the mean over the sphere.
        to_grid: [B·A, K].
        from_grid: [K, B·A].
    """

    points: Tensor
    weights: Tensor
    to_grid: Tensor
    from_grid: Tensor


def latitude_longitude_grid(
    lmax: int,
    n_latitude: int,
    n_longitude: int,
    quadrature: Quadrature = "soft",
    *,
    mmax: int | None = None,
) -> SphereGrid:
    """Build a product grid of ``n_latitude`` × ``n_longitude`` points.

    Point (b, a) is (s_b sin α_a, y_b, s_b cos α_a) with α_a = 2πa/A. "soft" has y_b at equal
    angles and the weights of Kostelec and Rockmore (J. Fourier Anal. Appl. 14, 145, 2008), exact
    for polynomials of degree below B; "gauss_legendre" has the Gauss–Legendre nodes, exact up to
    degree 2B − 1. In longitude degrees below A are exact.

    Args:
        lmax: highest degree of the coefficients.
        n_latitude: B; even for "soft".
        n_longitude: A.
        quadrature: "soft" or "gauss_legendre".
        mmax: highest |m| of the coefficients, by default ``lmax``; if it is lower, K counts the
            coefficients that are left, in degree-major order.

    Raises:
        InputError: unknown quadrature, odd B for "soft", or too few points to tell the harmonics
            up to ``lmax`` apart.
    """
    mmax = lmax if mmax is None else mmax
    y, s, latitude_weights = _latitudes(n_latitude, quadrature)
    exact = 2 * n_latitude - 1 if quadrature == "gauss_legendre" else n_latitude - 1
    limit = min(exact, n_longitude - 1 + 2 * (lmax - mmax))  # longitudes resolve orders alone
    if not 0 <= mmax <= lmax or limit < 2 * lmax:
        raise InputError(
            f"a {n_latitude} x {n_longitude} {quadrature} grid is exact up to degree {limit}; "
            f"lmax = {lmax} needs {2 * lmax}: use more points"
        )
    alpha = 2 * np.pi * np.arange(n_longitude) / n_longitude
    points = np.stack(
        [
            s[:, None] * np.sin(alpha),
            np.broadcast_to(y[:, None], (n_latitude, n_longitude)),
            s[:, None] * np.cos(alpha),
        ],
        axis=-1,
    )
    weights = torch.from_numpy(np.repeat(latitude_weights[:, None] / n_longitude, n_longitude, 1))
    vectors = torch.from_numpy(points)
    columns = [degree**2 + degree + order for degree, order in degree_major(lmax, mmax)]
    to_grid = spherical_harmonics(lmax, vectors.reshape(-1, 3))[:, columns]  # [B·A, K]
    from_grid = (to_grid * weights.reshape(-1, 1)).T.contiguous()
    return SphereGrid(points=vectors, weights=weights, to_grid=to_grid, from_grid=from_grid)


def minimal_grid(degree: int, lmax: int | None = None) -> SphereGrid:
    """Build the smallest Gauss–Legendre × uniform grid exact for polynomials of a degree.

    Args:
        degree: highest polynomial degree that the quadrature integrates exactly.
        lmax: highest degree of ``to_grid`` and ``from_grid``; at most, and by default,
            ``degree // 2``. To project the product of two functions of degree L back to degree L
            exactly take ``degree = 3 L`` and ``lmax = L``.

    Raises:
        InputError: ``degree`` is negative or too low for ``lmax``.
    """
    if degree < 0:
        raise InputError(f"degree is {degree}; expected 0 or more")
    lmax = degree // 2 if lmax is None else lmax
    return latitude_longitude_grid(lmax, degree // 2 + 1, degree + 1, "gauss_legendre")


def _latitudes(count: int, quadrature: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return y, sqrt(1 − y²) and weights (sum 1) of the latitudes, south to north."""
    if quadrature == "gauss_legendre":
        if count < 1:
            raise InputError(f"n_latitude is {count}; expected 1 or more")
        y, weights = np.polynomial.legendre.leggauss(count)
        return y, np.sqrt((1 - y) * (1 + y)), weights / 2
    if quadrature != "soft":
        raise InputError(f"quadrature {quadrature!r} is unknown: use 'soft' or 'gauss_legendre'")
    if count < 2 or count % 2:
        raise InputError(f"n_latitude is {count}; 'soft' quadrature needs an even number")
    beta = (np.arange(count) + 0.5) * np.pi / count
    odd = 2 * np.arange(count // 2) + 1
    series = (np.sin(beta[:, None] * odd) / odd).sum(1)
    return -np.cos(beta), np.sin(beta), 2 / count * np.sin(beta) * series
