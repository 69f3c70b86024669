"""Clebsch–Gordan tensors: equal to e3nn, orthogonal, invariant under rotations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.so3 import clebsch_gordan, spherical_harmonics

SMALL = [
    (a, b, c)
    for a, b in itertools.product(range(5), repeat=2)
    for c in range(abs(a - b), a + b + 1)
]
LARGE = [(6, 6, 6), (5, 6, 4), (6, 5, 11), (6, 6, 12), (6, 1, 5), (2, 6, 6), (10, 10, 10)]


def random_rotation(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q)


def harmonics_matrix(degree: int, rotation: torch.Tensor) -> torch.Tensor:
    """Solve Y(R p) = D Y(p) on random points: independent of the recurrence of the package."""
    generator = torch.Generator().manual_seed(7)
    points = torch.randn(8 * degree + 8, 3, generator=generator, dtype=torch.float64)
    start = degree**2
    before = spherical_harmonics(degree, points)[:, start:]
    after = spherical_harmonics(degree, points @ rotation.T)[:, start:]
    return torch.linalg.lstsq(before, after).solution.T


@pytest.mark.parametrize("degrees", SMALL + LARGE)
def test_equals_e3nn_with_sign(degrees: tuple[int, int, int]) -> None:
    o3 = pytest.importorskip("e3nn.o3")
    expected = o3.wigner_3j(*degrees, dtype=torch.float64)
    torch.testing.assert_close(clebsch_gordan(*degrees), expected, rtol=0, atol=1e-12)


def test_equals_the_published_facet_tensors(shared) -> None:
    with np.load(shared / "golden/facet/parts.npz") as parts:
        names = [name for name in parts.files if name.startswith("cg_")]
        assert len(names) > 30
        for name in names:
            ours = clebsch_gordan(*map(int, name.removeprefix("cg_"))).numpy()
            np.testing.assert_allclose(ours, parts[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("degrees", SMALL[::4] + LARGE)
def test_columns_are_orthogonal_and_norm_is_one(degrees: tuple[int, int, int]) -> None:
    tensor = clebsch_gordan(*degrees)
    for axis, degree in enumerate(degrees):
        matrix = tensor.movedim(axis, 0).flatten(1)
        expected = torch.eye(2 * degree + 1).double() / (2 * degree + 1)
        torch.testing.assert_close(matrix @ matrix.T, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("l1", "l2"), [(1, 1), (2, 1), (2, 3), (4, 3)])
def test_all_couplings_together_are_complete(l1: int, l2: int) -> None:
    columns = [
        math.sqrt(2 * l3 + 1) * clebsch_gordan(l1, l2, l3).flatten(0, 1)
        for l3 in range(abs(l1 - l2), l1 + l2 + 1)
    ]
    square = torch.cat(columns, dim=1)
    torch.testing.assert_close(
        square @ square.T, torch.eye(len(square)).double(), rtol=0, atol=1e-13
    )


@given(st.integers(0, 10**6), st.sampled_from(SMALL))
@settings(max_examples=40, deadline=None)
def test_invariant_under_rotation(seed: int, degrees: tuple[int, int, int]) -> None:
    rotation = random_rotation(seed)
    tensor = clebsch_gordan(*degrees)
    matrices = [harmonics_matrix(degree, rotation) for degree in degrees]
    rotated = torch.einsum("ijk,ai,bj,ck->abc", tensor, *matrices)
    torch.testing.assert_close(rotated, tensor, rtol=0, atol=1e-11)


def test_degree_one_couplings_are_dot_and_cross_product() -> None:
    a, b = torch.tensor([[0.3, -1.2, 0.7], [2.0, 0.4, -0.5]]).double()
    dot = torch.einsum("ijk,i,j->k", clebsch_gordan(1, 1, 0), a, b)
    cross = torch.einsum("ijk,i,j->k", clebsch_gordan(1, 1, 1), a, b)
    torch.testing.assert_close(dot.squeeze(), a @ b / math.sqrt(3))
    torch.testing.assert_close(cross, torch.linalg.cross(a, b) / math.sqrt(6))


def test_result_is_a_fresh_tensor() -> None:
    clebsch_gordan(2, 1, 2).fill_(9.0)
    assert clebsch_gordan(2, 1, 2).norm().item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("degrees", [(1, 1, 3), (3, 1, 1), (0, 2, 1), (-1, 1, 1), (1, 1, -1)])
def test_impossible_coupling_is_an_error(degrees: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="do not couple"):
        clebsch_gordan(*degrees)
