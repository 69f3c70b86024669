"""Product with vector spherical harmonics: what the Gaunt product cannot reach, recovered.

Beside the values of two functions on the sphere their surface gradients, vector harmonics r∇Y, are
multiplied: {f, g} = n · (∇f × ∇g). It is antisymmetric and of degree l1 + l2 − 1 at most, so the
same grid is exact, and its projection reaches just the paths with odd l1 + l2 + l3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlip.ops.tables import table_like
from mlip.ops.tensor_products.gaunt import (
    degree_weights,
    fixed_weights,
    from_grid,
    grid_points,
    to_grid,
)
from mlip.ops.tensor_products.interface import (
    Degrees,
    TensorProduct,
    scale_degrees,
    tensor_path_weights,
)
from mlip.so3 import spherical_harmonics


@dataclass(frozen=True)
class VectorHarmonicProduct(TensorProduct):
    """Sum of f·g and n · (∇f × ∇g), each with a weight for each degree of x, y and z.

    All paths are within reach, their weights not independent of each other.
    """

    @property
    def n_weights(self) -> int:
        """Those of the even paths as in `GauntProduct`, then those of the odd paths."""
        return 2 * (sum(self.degrees) + 3)

    def path_weights(self, weights: Tensor) -> Tensor:
        """Multiply the three weights of each path by the fixed one."""
        fixed = (table_like(weights, f, self.degrees) for f in (fixed_weights, curl_weights))
        parts = (degree_weights(self.degrees, half) for half in weights.chunk(2, dim=1))
        even, odd = (w * part[:, None] for w, part in zip(parts, fixed, strict=True))
        return even + odd

    def multiply(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Evaluate values and both derivatives on the grid, multiply and project."""
        widths = [degree + 1 for degree in self.degrees]
        a1, b1, c1, a2, b2, c2 = weights.split([*widths, *widths], dim=1)
        values = [
            table_like(x, to_grid, self.degrees, lmax) @ scale_degrees(features, weight)
            for lmax, features, weight in ((self.degrees[0], x, a1), (self.degrees[1], y, b1))
        ]
        (f1, f2), (g1, g2) = (
            (table_like(x, _gradients, self.degrees, lmax) @ scale_degrees(features, weight)).chunk(
                2, dim=1
            )
            for lmax, features, weight in ((self.degrees[0], x, a2), (self.degrees[1], y, b2))
        )
        project = table_like(x, from_grid, self.degrees)
        even = scale_degrees(project @ (values[0] * values[1]), c1)
        return even + scale_degrees(project @ (f1 * g2 - f2 * g1), c2)


def curl_weights(degrees: Degrees) -> Tensor:
    """Weight of each path in n · (∇f × ∇g), [P], by exact quadrature."""
    n_points = len(grid_points(degrees)[0])
    f, g = (
        _gradients(degrees, lmax).unflatten(0, (2, n_points))
        for lmax in (degrees.first, degrees.second)
    )
    project = from_grid(degrees)
    tensor = torch.einsum("gi,gj,kg->ijk", f[0], g[1], project)
    tensor -= torch.einsum("gi,gj,kg->ijk", f[1], g[0], project)
    return tensor_path_weights(tensor, degrees)


def _gradients(degrees: Degrees, lmax: int) -> Tensor:
    """Derivatives of the harmonics along two tangents at each grid point, [2·G, (lmax+1)²].

    The tangents e1, e2 and the point n are right-handed: n · (∇f × ∇g) = f1 g2 − f2 g1.
    """
    points, _ = grid_points(degrees)
    axis = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand_as(points)
    east = torch.linalg.cross(axis, points)  # no Gauss–Legendre latitude is a pole
    east = east / torch.linalg.vector_norm(east, dim=1, keepdim=True)
    north = torch.linalg.cross(points, east)
    columns = torch.func.vmap(torch.func.jacrev(lambda v: spherical_harmonics(lmax, v)))(points)
    return torch.cat([torch.einsum("gia,ga->gi", columns, t) for t in (east, north)])
