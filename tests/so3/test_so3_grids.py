"""Sphere grids: exact quadrature by degree, round trips, the published matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.so3 import latitude_longitude_grid, minimal_grid, spherical_harmonics


def double_factorial(n: int) -> int:
    return math.prod(range(n, 0, -2))


def mean_of_monomial(a: int, b: int, c: int) -> float:
    """Return the mean of x^a y^b z^c over the unit sphere."""
    if a % 2 or b % 2 or c % 2:
        return 0.0
    odd = double_factorial(a - 1) * double_factorial(b - 1) * double_factorial(c - 1)
    return odd / double_factorial(a + b + c + 1)


def quadrature_error(grid, degree: int) -> float:
    """Return the largest error over all monomials of one degree."""
    x, y, z = grid.points.unbind(-1)
    return max(
        abs(
            (grid.weights * x**a * y**b * z ** (degree - a - b)).sum().item()
            - mean_of_monomial(a, b, degree - a - b)
        )
        for a in range(degree + 1)
        for b in range(degree - a + 1)
    )


@pytest.mark.parametrize(
    ("shape", "quadrature", "exact"),
    [
        ((18, 17), "soft", 16),
        ((6, 12), "soft", 5),
        ((8, 8), "soft", 7),
        ((5, 10), "gauss_legendre", 9),
        ((5, 7), "gauss_legendre", 6),
        ((1, 2), "gauss_legendre", 1),
    ],
)
def test_quadrature_is_exact_up_to_its_degree_and_not_beyond(shape, quadrature, exact) -> None:
    grid = latitude_longitude_grid(0, *shape, quadrature)
    assert all(quadrature_error(grid, degree) < 1e-14 for degree in range(exact + 1))
    assert max(quadrature_error(grid, degree) for degree in (exact + 1, exact + 2)) > 1e-9


@given(st.integers(0, 14))
@settings(max_examples=15, deadline=None)
def test_minimal_grid_is_exact_and_minimal(degree: int) -> None:
    grid = minimal_grid(degree)
    B, A = grid.weights.shape
    assert all(quadrature_error(grid, d) < 1e-14 for d in range(degree + 1))
    if A > 1:
        narrow = latitude_longitude_grid(0, B, A - 1, "gauss_legendre")
        assert max(quadrature_error(narrow, d) for d in range(degree + 1)) > 1e-9
    if B > 1:
        flat = latitude_longitude_grid(0, B - 1, A, "gauss_legendre")
        assert max(quadrature_error(flat, d) for d in range(degree + 1)) > 1e-9
    K = (degree // 2 + 1) ** 2
    torch.testing.assert_close(
        grid.from_grid @ grid.to_grid, torch.eye(K).double(), atol=1e-13, rtol=0
    )


@pytest.mark.parametrize(
    ("lmax", "shape", "quadrature"),
    [(3, (18, 17), "soft"), (2, (6, 5), "soft"), (6, (7, 13), "gauss_legendre")],
)
def test_from_grid_inverts_to_grid(lmax, shape, quadrature) -> None:
    grid = latitude_longitude_grid(lmax, *shape, quadrature)
    K, points = (lmax + 1) ** 2, shape[0] * shape[1]
    assert grid.points.shape == (*shape, 3)
    assert grid.weights.shape == shape
    assert grid.to_grid.shape == (points, K)
    assert grid.from_grid.shape == (K, points)
    assert {t.dtype for t in vars(grid).values()} == {torch.float64}
    product = grid.from_grid @ grid.to_grid
    torch.testing.assert_close(product, torch.eye(K).double(), rtol=0, atol=1e-13)


def test_points_run_over_latitude_then_longitude() -> None:
    grid = latitude_longitude_grid(2, 6, 5, "soft")
    beta, alpha = (np.arange(6) + 0.5) * np.pi / 6, 2 * np.pi * np.arange(5) / 5
    for b, a in ((0, 0), (2, 3), (5, 4)):
        expected = (
            math.sin(beta[b]) * math.sin(alpha[a]),
            -math.cos(beta[b]),
            math.sin(beta[b]) * math.cos(alpha[a]),
        )
        np.testing.assert_allclose(grid.points[b, a], expected, rtol=0, atol=1e-15)
        torch.testing.assert_close(
            grid.to_grid[b * 5 + a], spherical_harmonics(2, torch.tensor(expected).double())
        )


def test_product_of_two_functions_projects_exactly_on_the_minimal_grid() -> None:
    L = 3
    grid, fine = minimal_grid(3 * L, L), minimal_grid(6 * L, L)
    a, b = torch.linspace(-1, 1, 32).double().sin().reshape(2, 16)
    coarse, exact = (g.from_grid @ ((g.to_grid @ a) * (g.to_grid @ b)) for g in (grid, fine))
    torch.testing.assert_close(coarse, exact, rtol=0, atol=1e-13)


def test_equals_the_published_facet_grids(shared) -> None:
    names = {"soft": "soft", "gausslegendre": "gauss_legendre"}
    with np.load(shared / "golden/facet/parts.npz") as parts:
        cases = [name for name in parts.files if name.startswith("to_grid_")]
        assert len(cases) == 4
        for name in cases:
            case = name.removeprefix("to_grid_")
            degree, shape, quadrature = case.split("_")
            lmax, (B, A) = int(degree[1:]), map(int, shape.split("x"))
            grid = latitude_longitude_grid(lmax, B, A, names[quadrature])
            to_grid = grid.to_grid.T.reshape(-1, B, A).numpy()
            from_grid = grid.from_grid.T.reshape(B, A, -1).numpy()
            np.testing.assert_allclose(to_grid, parts[name], rtol=0, atol=1e-12)
            np.testing.assert_allclose(from_grid, parts[f"from_grid_{case}"], rtol=0, atol=1e-12)
            y = grid.points[:, 0, 1].numpy()
            np.testing.assert_allclose(y, parts[f"grid_y_{case}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5, 5, "soft"), "even"),
        ((1, 0, 5, "soft"), "even"),
        ((1, 0, 5, "gauss_legendre"), "n_latitude is 0"),
        ((3, 6, 9, "soft"), "exact up to degree 5; lmax = 3 needs 6"),
        ((3, 8, 6, "soft"), "exact up to degree 5; lmax = 3 needs 6"),
        ((1, 6, 5, "healpix"), "'healpix' is unknown"),
    ],
)
def test_bad_input_is_named(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        latitude_longitude_grid(*arguments)


def test_bad_minimal_grid_is_named() -> None:
    with pytest.raises(InputError, match="degree is -1"):
        minimal_grid(-1)
    with pytest.raises(InputError, match="lmax = 3 needs 6"):
        minimal_grid(4, 3)
