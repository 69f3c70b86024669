"""Nonlinear updates of the features of one atom: on a sphere grid, as polynomials, by gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlip.nn.equivariant import EquivariantLinear, gate
from mlip.nn.mlp import MLP, Activation
from mlip.ops import Backend, Features, default_backend, sphere_products, table_like
from mlip.so3 import latitude_longitude_grid, minimal_grid


def stack_degrees(x: Features) -> Tensor:
    """Join degrees of equal channel count to [N, (L+1)², C]."""
    return torch.cat(x, dim=1)


def split_degrees(x: Tensor) -> Features:
    """Cut [N, (L+1)², C] into one tensor [N, 2l+1, C] for each degree."""
    lmax = math.isqrt(x.shape[1]) - 1
    return tuple(x.split([2 * degree + 1 for degree in range(lmax + 1)], dim=1))


class ScalarUpdate(nn.Module):
    """Multilayer perceptron on features that hold scalars only (last block of Facet)."""

    def __init__(
        self, width: int, activation: Activation, final_activation: Activation, normalize: bool
    ) -> None:
        super().__init__()
        self.mlp = MLP([width] * 4, activation, final_activation, normalize)

    def forward(self, y: Features) -> Features:
        """Map [N, 1, C] to [N, 1, C]."""
        return (self.mlp(y[0]),)


class SphereGridUpdate(nn.Module):
    """S2 mixer of the published Facet: one small MLP shared by all points of a sphere grid.

    Equivariant up to the aliasing of the nonlinearity on the grid: about 1e-3 of the energy for
    18 x 17 points.
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        channels_out: Sequence[int],
        grid: tuple[int, int, str],
        hidden: Sequence[int],
        heads: int,
        activation: Activation,
        final_activation: Activation,
        normalize: bool,
    ) -> None:
        super().__init__()
        width = max(channels_in[1:])
        n_degrees = len(channels_in)
        self.heads = heads
        self.up = EquivariantLinear(channels_in, (width,) * n_degrees)
        self.mlp = MLP(
            [width // heads, *hidden, width // heads], activation, final_activation, normalize
        )
        self.down = EquivariantLinear(
            (channels_in[0] + width, *(width,) * (n_degrees - 1)), channels_out
        )
        self.grid = (n_degrees - 1, *grid)

    def forward(self, y: Features) -> Features:
        """Map [N, 2l+1, channels_in[l]] to [N, 2l+1, channels_out[l]]."""
        to_grid = table_like(y[0], _published_to_grid, *self.grid)
        from_grid = table_like(y[0], _published_from_grid, *self.grid)
        values = to_grid @ stack_degrees(self.up(y))  # [N, G, C]
        heads = values.view(*values.shape[:2], self.heads, -1)
        mixed = self.mlp(heads).flatten(2)
        v = split_degrees(from_grid @ mixed)
        return self.down((torch.cat([y[0], v[0]], dim=2), *v[1:]))


class SphereProductUpdate(nn.Module):
    """Polynomials of functions on the sphere, gated by invariants: equivariant to rounding.

    Features become ``order`` functions on the sphere for each channel; their running products
    f1·f2, f1·f2·f3, … are projected back. Such a product of functions of degree L is a polynomial
    of degree order·L + L_out under the projection integral, so the smallest Gauss–Legendre grid
    of that degree makes it exact (28 points for L = 2, order 2) where the published mixer needs 306
    points for 1e-3. Products conserve the parity (−1)^l. Invariants pass an MLP that yields the
    scalars and one gate for each channel of higher degree.
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        channels_out: Sequence[int],
        order: int,
        hidden: int,
    ) -> None:
        super().__init__()
        lmax, lmax_out = len(channels_in) - 1, len(channels_out) - 1
        width = max(channels_in[1:])
        n_products = order - 1
        self.order = order
        self.backend: Backend = default_backend()
        self.channels_out = tuple(channels_out)
        self.up = EquivariantLinear(channels_in, (order * width,) * (lmax + 1))
        joined = [n + n_products * width for n in channels_in]
        self.down = EquivariantLinear(joined[: lmax_out + 1], channels_out)
        self.invariants = MLP([joined[0], hidden, sum(channels_out)])
        self.degrees = (lmax, lmax_out)
        self.scale = 1 / math.sqrt(lmax + 1)  # of the factors

    def forward(self, y: Features) -> Features:
        """Map [N, 2l+1, channels_in[l]] to [N, 2l+1, channels_out[l]]."""
        to_grid, from_grid = self.tables(y[0])
        u = stack_degrees(self.up(y))  # [N, (L+1)², order·C]
        v = split_degrees(sphere_products(u, to_grid, from_grid, self.order, self.backend))
        joined = tuple(torch.cat([a, b], dim=2) for a, b in zip(y, v, strict=False))
        linear = self.down(joined)
        gates = self.invariants(joined[0]).split(self.channels_out, dim=2)
        return (
            linear[0] + gates[0],
            *(part * (1 + g) for part, g in zip(linear[1:], gates[1:], strict=True)),
        )

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the matrices to the grid [G, (L+1)²] and back, like a tensor."""
        lmax, lmax_out = self.degrees
        grid = (self.order * lmax + lmax_out, lmax)
        to_grid = table_like(like, _minimal_to_grid, *grid)
        return to_grid, table_like(like, _minimal_from_grid, *grid)[: (lmax_out + 1) ** 2]


def _published_to_grid(lmax: int, n_latitude: int, n_longitude: int, quadrature: str) -> Tensor:
    return latitude_longitude_grid(lmax, n_latitude, n_longitude, quadrature).to_grid  # type: ignore[arg-type]


def _published_from_grid(lmax: int, n_latitude: int, n_longitude: int, quadrature: str) -> Tensor:
    return latitude_longitude_grid(lmax, n_latitude, n_longitude, quadrature).from_grid  # type: ignore[arg-type]


def _minimal_to_grid(degree: int, lmax: int) -> Tensor:
    return minimal_grid(degree, lmax).to_grid / math.sqrt(lmax + 1)


def _minimal_from_grid(degree: int, lmax: int) -> Tensor:
    return minimal_grid(degree, lmax).from_grid


class GateUpdate(nn.Module):
    """Gate nonlinearity of SevenNet and NequIP; expects one extra scalar for each gated channel."""

    def __init__(self, channels_out: Sequence[int]) -> None:
        super().__init__()
        self.channels_out = tuple(channels_out)

    def forward(self, y: Features) -> Features:
        """Map [N, 2l+1, C_l] with gates among the scalars to [N, 2l+1, channels_out[l]]."""
        return gate(y, self.channels_out)
