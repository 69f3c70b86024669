"""Grids on the sphere as latitudes times longitudes, for products of functions.

With latitudes θ and signed orders μ, a function is a(θ, φ) = Σ_μ A_μ(θ) u_μ(φ), where
A_μ(θ) = Σ_l P_lμ(θ) a_lμ: the product over φ becomes a short sum over pairs of orders,
C_μ = Σ t_{μ μ1 μ2} A_μ1 B_μ2, and the projection a sum over latitudes, c_lμ = Σ_θ Q_lμ(θ) C_μ(θ).
t = Σ_φ u_μ u_μ1 u_μ2 is symmetric in all three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip.so3 import degree_major, order_major, order_sizes

NEGLIGIBLE = 1e-13  # entries of the tables that are zero but for rounding


class SphereTables(NamedTuple):
    """Factors of the matrices to a grid and back.

    there: P, [latitudes, n]. back: Q, [n, latitudes]. pairs: (μ, μ1, μ2, t) that are not zero.
    """

    there: Tensor
    back: Tensor
    pairs: tuple[tuple[int, int, int, float], ...]


def factorise(
    to_grid: Tensor, from_grid: Tensor, lmax: int, mmax: int, longitudes: int
) -> SphereTables:
    """Split float64 matrices [G, n] and [n, G], order-major, into latitudes and orders.

    Raises:
        ValueError: they are not those of a grid of latitudes and so many longitudes.
    """
    sizes = order_sizes(lmax, mmax)
    there = to_grid.view(-1, longitudes, to_grid.shape[1])
    back = from_grid.view(from_grid.shape[0], -1, longitudes)
    waves, first = [], 0
    for size in sizes:  # u_μ: how a coefficient of that order varies with φ, with norm 1
        rows = there[:, :, first : first + size].permute(0, 2, 1).reshape(-1, longitudes)
        row = rows[rows.norm(dim=1).argmax()]
        waves.append(row / row.norm())
        first += size
    of_row = torch.tensor([mu for mu, size in enumerate(sizes) for _ in range(size)])
    u = torch.stack(waves)  # [μ, φ]
    p = torch.einsum("tfn,nf->tn", there, u[of_row])
    q = torch.einsum("ntf,nf->nt", back, u[of_row])
    whole = p[:, None, :] * u[of_row].T, q[:, :, None] * u[of_row][:, None]
    for found, given in zip(whole, (there, back), strict=True):
        if not torch.allclose(found, given, rtol=0, atol=1e-11 * float(given.abs().max())):
            raise ValueError("the grid is no product of latitudes and longitudes")
    t = torch.einsum("af,bf,cf->abc", u, u, u)
    pairs = tuple(
        (*index, float(t[tuple(index)])) for index in (t.abs() > NEGLIGIBLE).nonzero().tolist()
    )
    return SphereTables(p, q, pairs)


def block_sizes(lmax: int, mmax: int, in_frame: bool) -> tuple[int, ...]:
    """Count the rows of the arrays that hold a function: one for each order, or one for all."""
    sizes = order_sizes(lmax, mmax)
    return sizes if in_frame else (sum(sizes),)


def places(lmax: int, mmax: int, in_frame: bool) -> list[tuple[int, int, int]]:
    """List order, array and row in the array of each coefficient, in the order-major sequence."""
    sizes = order_sizes(lmax, mmax)
    rows = [(mu, mu, row) for mu, size in enumerate(sizes) for row in range(size)]
    if in_frame:
        return rows
    sequence, stored = order_major(lmax, mmax), degree_major(lmax, mmax)
    return [(mu, 0, stored.index(pair)) for (mu, _, _), pair in zip(rows, sequence, strict=True)]


def rounded(table: Tensor) -> list[list[float]]:
    """Return the entries of a table, 0 for those that are zero but for rounding."""
    smallest = NEGLIGIBLE * float(table.abs().max())
    return torch.where(table.abs() > smallest, table, 0.0).tolist()
