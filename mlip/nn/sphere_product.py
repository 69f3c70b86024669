"""Products of functions on the sphere, and the activations that are made of them or of gates.

"SwiGLU-S²" of EquiformerV3 (arXiv 2604.09130). The product of two functions of degree L, projected
back to degree L, is a polynomial of degree 3L under the integral, so a fine enough grid gives it
exactly: every such grid gives the same numbers, and the smallest one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from mlip.nn.so3_layers import add_to_scalars
from mlip.ops import table_like
from mlip.ops.backend import (
    CHECK_EDGES,
    Backend,
    compare,
    default_backend,
    disturbed,
    of_width,
    use_kernel,
)
from mlip.ops.gated_product import gated_product as compiled_product
from mlip.ops.sphere_tables import SphereTables, factorise
from mlip.so3 import degree_major, latitude_longitude_grid, order_major, order_sizes


class SphereBasis(NamedTuple):
    """Coefficients of functions on the sphere and the grid on which they are multiplied.

    lmax, mmax: highest degree and order; in_frame: order-major coefficients, otherwise
    degree-major. points: latitudes and longitudes of the published equiangular grid, or None for
    the smallest Gauss–Legendre grid on which products are exact.
    """

    lmax: int
    mmax: int
    in_frame: bool
    points: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"product on the sphere, degrees ≤ {self.lmax}, orders ≤ {self.mmax}"


def is_exact(lmax: int, mmax: int, points: tuple[int, int]) -> bool:
    """Tell whether an equiangular grid (latitudes, longitudes) projects products exactly."""
    return points[0] > 3 * lmax and points[1] > 3 * mmax


def grid_matrices(basis: SphereBasis) -> tuple[Tensor, Tensor]:
    """Build the float64 matrices to the grid [G, n] and back [n, G].

    Harmonics carry 1/√((2l+1)(L+1)) on the way there and its inverse on the way back; degrees
    above mmax, which lack orders, √((2l+1)/(2 mmax+1)) both ways.
    """
    lmax, mmax = basis.lmax, basis.mmax
    if basis.points is None:
        shape = (3 * lmax // 2 + 1, 3 * mmax + 1)
        grid = latitude_longitude_grid(lmax, *shape, "gauss_legendre", mmax=mmax)
    else:
        grid = latitude_longitude_grid(lmax, *basis.points, "soft", mmax=mmax)
    pairs = degree_major(lmax, mmax)
    components = torch.tensor([2.0 * degree + 1 for degree, _ in pairs], dtype=torch.float64)
    scale = torch.sqrt(components * (lmax + 1))
    missing = torch.sqrt(torch.clamp(components / (2 * mmax + 1), min=1.0))
    to_grid = grid.to_grid * (missing / scale)
    from_grid = grid.from_grid * (missing * scale)[:, None]
    if not basis.in_frame:
        return to_grid, from_grid
    order = [pairs.index(pair) for pair in order_major(lmax, mmax)]
    return to_grid[:, order], from_grid[order]


def sphere_product(basis: SphereBasis, first: Tensor, second: Tensor) -> Tensor:
    """Multiply two functions [N, n, C] on the sphere and project back to [N, n, C]."""
    to_grid = table_like(first, _to_grid, basis)
    from_grid = table_like(first, _from_grid, basis)
    return from_grid @ ((to_grid @ first) * (to_grid @ second))


def swiglu_s2(basis: SphereBasis, x: Tensor, scalars: Tensor) -> Tensor:
    """Apply SwiGLU-S²: σ(g) · (a ∘ b), and silu(s₁)·s₂ added to l = 0, ∘ the product on the sphere.

    Args:
        basis: of the coefficients.
        x: [N, n, 2C]; a then b.
        scalars: [N, 3C]; s₁, s₂, g.

    Returns:
        [N, n, C].
    """
    first, second = x.chunk(2, dim=2)
    scalars, gate = swiglu_scalars(scalars)
    product = sphere_product(basis, first, second) * gate[:, None]
    return add_to_scalars(product, scalars)


def swiglu_scalars(scalars: Tensor) -> tuple[Tensor, Tensor]:
    """Compute silu(s₁)·s₂ and σ(g) of `swiglu_s2`: [N, C] each."""
    s1, s2, gate = scalars.chunk(3, dim=1)
    return torch.nn.functional.silu(s1) * s2, torch.sigmoid(gate)


def gated_product(
    basis: SphereBasis,
    hidden: Sequence[Tensor],
    extra: int,
    gate: Tensor,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """Multiply the halves of the channels of functions on the sphere, times a gate.

    By compiled code where it can run, which has first derivatives only.

    Args:
        basis: of the coefficients.
        hidden: [N, rows·2C]; one tensor for each of the orders 0, +1, −1, … in a frame, otherwise
            one for all. The first begins with ``extra`` numbers.
        extra: those.
        gate: [N, C].
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        For each tensor [N, rows, C].
    """
    lmax, mmax = basis.lmax, basis.mmax
    published = "the grid is a published one" if basis.points is not None else None

    def fast(gate: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        tables = sphere_tables(basis)
        return compiled_product(lmax, mmax, basis.in_frame, tables, extra, gate, hidden)

    def plain(gate: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat([hidden[0][:, extra:], *hidden[1:]], dim=1)
        first, second = joined.unflatten(1, (-1, 2 * gate.shape[1])).chunk(2, dim=2)
        product = sphere_product(basis, first, second) * gate[:, None]
        return product.split(order_sizes(lmax, mmax), dim=1) if basis.in_frame else (product,)

    def check() -> tuple[float, float]:
        some = disturbed([tensor[:CHECK_EDGES] for tensor in hidden])
        return compare(plain, fast, [gate[:CHECK_EDGES], *some])

    backend = backend or default_backend()
    name = of_width(basis, gate.shape[1], gate.dtype)
    use = len(gate) and use_kernel(backend, name, [gate, *hidden], check, published)
    return (fast if use else plain)(gate, *hidden)


@lru_cache(maxsize=64)
def sphere_tables(basis: SphereBasis) -> Callable[[], SphereTables]:
    """Return what splits the matrices of a basis, the same object for the same basis."""
    lmax, mmax = basis.lmax, basis.mmax
    longitudes = basis.points[1] if basis.points else 3 * mmax + 1
    matrices = partial(grid_matrices, basis._replace(in_frame=True))
    return lambda: factorise(*matrices(), lmax, mmax, longitudes)


def gate_by_degree(x: Tensor, scalars: Tensor, degrees: Tensor) -> Tensor:
    """Apply silu to l = 0 and multiply each degree l > 0 by σ of its own scalars.

    Args:
        x: [N, n, C], first coefficient l = 0.
        scalars: [N, L·C], degree by degree.
        degrees: [n] degree of each coefficient.
    """
    gates = torch.sigmoid(scalars).unflatten(1, (-1, x.shape[2]))  # [N, L, C]
    higher = x[:, 1:] * gates.index_select(1, degrees[1:] - 1)
    return torch.cat([torch.nn.functional.silu(x[:, :1]), higher], dim=1)


def _to_grid(basis: SphereBasis) -> Tensor:
    return grid_matrices(basis)[0].contiguous()


def _from_grid(basis: SphereBasis) -> Tensor:
    return grid_matrices(basis)[1].contiguous()
