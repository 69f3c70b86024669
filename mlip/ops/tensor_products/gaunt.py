"""Gaunt product: features as functions on the sphere, multiplied point by point.

z_c = mean over the sphere of (Σ_a x_a Y_a)(Σ_b y_b Y_b) Y_c with component-normalised harmonics
(Luo et al., arXiv 2401.10216): the Clebsch–Gordan product in which every path has a fixed weight.
Paths with odd l1 + l2 + l3 vanish, the cross product of vectors among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.tables import table_like
from mlip.ops.tensor_products.interface import (
    Degrees,
    TensorProduct,
    coupled_paths,
    scale_degrees,
)
from mlip.so3 import clebsch_gordan, minimal_grid, spherical_harmonics


@dataclass(frozen=True)
class GauntProduct(TensorProduct):
    """Product of functions on the sphere, with a weight for each degree of x, y and z.

    Attributes:
        method: "grid" evaluates the functions on the smallest Gauss–Legendre grid that is exact;
            "fourier" goes through Fourier series on the torus that covers the sphere twice. Both
            give the same numbers.
    """

    method: Literal["grid", "fourier"] = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("grid", "fourier"):
            raise InputError(f"method is {self.method!r}; use 'grid' or 'fourier'")

    @property
    def n_weights(self) -> int:
        """One for each degree of x, then of y, then of z."""
        return sum(self.degrees) + 3

    def path_weights(self, weights: Tensor) -> Tensor:
        """Multiply the three weights of each path by the fixed one."""
        fixed = table_like(weights, fixed_weights, self.degrees)
        return degree_weights(self.degrees, weights) * fixed[:, None]

    def multiply(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Weight, multiply as functions, project, weight."""
        first, second, out = weights.split([degree + 1 for degree in self.degrees], dim=1)
        product = _grid_product if self.method == "grid" else _fourier_product
        projected = product(self.degrees, scale_degrees(x, first), scale_degrees(y, second))
        return scale_degrees(projected, out)


def degree_weights(degrees: Degrees, weights: Tensor) -> Tensor:
    """Multiply the weights of the three degrees of each path: [E, ΣL + 3, C] → [E, P, C]."""
    index = torch.zeros(0, dtype=torch.int64, device=weights.device)
    columns = table_like(index, _degree_columns, degrees)  # [3, P]
    first, second, out = (weights.index_select(1, column) for column in columns)
    return first * second * out


def fixed_weights(degrees: Degrees) -> Tensor:
    """Weight of each path, [P]: √((2 l1+1)(2 l2+1)(2 l3+1)) times the (0, 0, 0) entry of C."""
    return torch.stack(
        [
            math.sqrt(math.prod(2 * degree + 1 for degree in path))
            * clebsch_gordan(*path)[path[0], path[1], path[2]]
            for path in coupled_paths(degrees)
        ]
    )


def grid_points(degrees: Degrees) -> tuple[Tensor, Tensor]:
    """Points [G, 3] and weights [G] exact for products of three functions, sum of weights 1."""
    grid = minimal_grid(sum(degrees), 0)
    return grid.points.reshape(-1, 3), grid.weights.reshape(-1)


def to_grid(degrees: Degrees, lmax: int) -> Tensor:
    """Matrix that evaluates coefficients on the grid, [G, (lmax+1)²]."""
    return spherical_harmonics(lmax, grid_points(degrees)[0])


def from_grid(degrees: Degrees) -> Tensor:
    """Matrix that projects values on the grid to the output, [d3, G]."""
    points, weights = grid_points(degrees)
    return (spherical_harmonics(degrees.out, points) * weights[:, None]).T.contiguous()


def _grid_product(degrees: Degrees, x: Tensor, y: Tensor) -> Tensor:
    on_grid = [
        table_like(x, to_grid, degrees, lmax) @ features
        for lmax, features in ((degrees.first, x), (degrees.second, y))
    ]
    return table_like(x, from_grid, degrees) @ (on_grid[0] * on_grid[1])


def _fourier_product(degrees: Degrees, x: Tensor, y: Tensor) -> Tensor:
    if not len(x):  # which some transforms refuse
        return _grid_product(degrees, x, y)
    band = degrees.first + degrees.second
    size = 2 * band + 1
    values = [
        _torus_values(table_like(x, _to_fourier, lmax, band), features, size)
        for lmax, features in ((degrees.first, x), (degrees.second, y))
    ]
    series = torch.fft.rfft2(values[0] * values[1], dim=(1, 2), norm="forward")
    parts = torch.cat([series.real.flatten(1, 2), series.imag.flatten(1, 2)], dim=1)
    return table_like(x, _from_fourier, degrees) @ parts


def _torus_values(table: Tensor, x: Tensor, size: int) -> Tensor:
    """Evaluate [E, d, C] on size × size points of the torus, by the inverse transform."""
    real, imaginary = (table.flatten(0, 1) @ x).unflatten(1, (2, size, -1)).unbind(1)
    series = torch.complex(real, imaginary)
    return torch.fft.irfft2(series, s=(size, size), dim=(1, 2), norm="forward")


def _torus_series(lmax: int, band: int) -> Tensor:
    """Fourier series of the harmonics in both angles, complex [2·band+1, 2·band+1, (lmax+1)²].

    The polar angle runs over the full circle: past π the point comes back on the other side.
    """
    size = 2 * band + 1
    angle = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    polar, azimuth = torch.meshgrid(angle, angle, indexing="ij")
    sine = torch.sin(polar)
    vectors = [sine * torch.sin(azimuth), torch.cos(polar), sine * torch.cos(azimuth)]
    harmonics = spherical_harmonics(lmax, torch.stack(vectors, dim=-1), normalize=False)
    return torch.fft.fft2(harmonics, dim=(0, 1), norm="forward")


def _to_fourier(lmax: int, band: int) -> Tensor:
    """Real and imaginary part of the half spectrum, [2, size · (band+1), d]."""
    half = _torus_series(lmax, band)[:, : band + 1].flatten(0, 1)
    return torch.stack([half.real, half.imag])


def _from_fourier(degrees: Degrees) -> Tensor:
    """Matrix from real and imaginary parts of the half spectrum to the output, [d3, 2·size·(M+1)].

    The mean over the sphere of F·Y is π/2 times that over the torus of |sin θ|·F·Y, and
    |sin θ| = Σ over even n of 2/(π (1 − n²)) e^{inθ}.
    """
    band = degrees.first + degrees.second
    size = 2 * band + 1
    wide = max(band, degrees.out)
    series = _torus_series(degrees.out, wide)  # [u', v, c]
    frequency = torch.fft.fftfreq(2 * wide + 1, 1 / (2 * wide + 1), dtype=torch.float64).round()
    total = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64).round()[:, None] + frequency
    absolute_sine = torch.where(total % 2 == 0, 2 / math.pi / (1 - total**2), 0.0)  # [u, u']
    orders = -torch.arange(band + 1)
    matrix = math.pi / 2 * torch.einsum("uw,wvc->cuv", absolute_sine.to(series), series[:, orders])
    matrix[:, :, 1:] *= 2  # the other half of the spectrum is the complex conjugate
    return torch.cat([matrix.real.flatten(1), -matrix.imag.flatten(1)], dim=1)


def _degree_columns(degrees: Degrees) -> Tensor:
    """Where the weights of the three degrees of each path lie among all, [3, P]."""
    starts = (0, degrees.first + 1, degrees.first + degrees.second + 2)
    paths = coupled_paths(degrees)
    return torch.tensor([[start + p[i] for p in paths] for i, start in enumerate(starts)])
