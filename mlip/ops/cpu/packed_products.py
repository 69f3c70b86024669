"""Products of functions on the sphere whose coefficients lie degree after degree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mlip.so3 import minimal_grid, spherical_harmonics


@dataclass(frozen=True)
class PackedProducts:
    """Running products of ``order`` factors, projected to degrees up to ``lmax_out``.

    Those of ``mlip.ops.sphere_products`` on a grid that is exact for them; a node program makes
    them. Packed coefficients: flat, for each degree [N, 2l + 1, factors · channels].

    lmax: of the factors. scale: of every factor. channels: of one.
    """

    lmax: int
    lmax_out: int
    order: int
    scale: float
    channels: int


@cache
def tables(products: PackedProducts, dtype: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Count the circles, and give values of the harmonics of orders m ≥ 0 where sin mφ is 0.

    Both tables are [circles · entries]; the first is that of the factors with their scale, the
    second has the weights of the circles.
    """
    lmax, lmax_out = products.lmax, products.lmax_out
    most = max(lmax, lmax_out)
    grid = minimal_grid(products.order * lmax + lmax_out, 0)
    columns = [degree**2 + degree + m for degree in range(most + 1) for m in range(degree + 1)]
    values = spherical_harmonics(most, grid.points[:, 0])[:, columns]
    weights = grid.weights.sum(1, keepdim=True)
    found = (
        np.ascontiguousarray(each.numpy(), dtype).ravel()
        for each in (products.scale * values, weights * values)
    )
    return (len(values), *found)  # type: ignore[return-value]
