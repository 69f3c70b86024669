"""Spherical harmonics: values against e3nn, derivatives against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.so3 import spherical_harmonics

AXES = torch.cat([torch.eye(3), -torch.eye(3)]).double()
NEAR_POLE = torch.tensor([[1e-9, 1.0, 0.0], [0.0, -1.0, 1e-7], [1e-13, 3.0, -1e-13]]).double()


def random_vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("degree", range(11))
def test_equals_e3nn(degree: int, normalize: bool) -> None:
    o3 = pytest.importorskip("e3nn.o3")
    vectors = torch.cat([random_vectors(200), AXES, NEAR_POLE])
    if not normalize:
        vectors = (
            vectors / vectors.norm(dim=-1, keepdim=True) * torch.linspace(0.5, 1.2, 209)[:, None]
        )
    ours = spherical_harmonics(degree, vectors, normalize=normalize)
    theirs = o3.spherical_harmonics(
        list(range(degree + 1)), vectors, normalize=normalize, normalization="component"
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_equals_the_published_facet_harmonics(shared) -> None:
    with np.load(shared / "golden/facet/parts.npz") as parts:
        vectors = torch.from_numpy(parts["edge_vec"])
        expected = torch.from_numpy(parts["edge_sh_l3"])
    swapped = vectors[:, [2, 1, 0]]  # that model takes x and z in the other order
    torch.testing.assert_close(spherical_harmonics(3, swapped), expected, rtol=0, atol=1e-12)


def test_first_degree_is_x_y_z() -> None:
    harmonics = spherical_harmonics(1, AXES)
    torch.testing.assert_close(harmonics[:, 0], torch.ones(6).double())
    torch.testing.assert_close(harmonics[:, 1:], math.sqrt(3) * AXES)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3).filter(lambda v: math.hypot(*v) > 1e-3),
    st.integers(0, 8),
)
@settings(max_examples=60, deadline=None)
def test_squared_norm_of_a_degree_is_2l_plus_1(vector: list[float], degree: int) -> None:
    block = spherical_harmonics(degree, torch.tensor(vector, dtype=torch.float64))[degree**2 :]
    assert block.square().sum().item() == pytest.approx(2 * degree + 1, abs=1e-11)


def test_solid_harmonics_are_homogeneous_and_harmonic() -> None:
    vectors = torch.cat([random_vectors(5), AXES[:2], torch.zeros(1, 3).double()])
    scale = 1.7
    degrees = torch.tensor([d for d in range(6) for _ in range(2 * d + 1)]).double()
    torch.testing.assert_close(
        spherical_harmonics(5, scale * vectors, normalize=False),
        spherical_harmonics(5, vectors, normalize=False) * scale**degrees,
    )
    for vector in vectors:
        for component in range(36):
            hessian = torch.autograd.functional.hessian(
                lambda v, c=component: spherical_harmonics(5, v, normalize=False)[c], vector
            )
            assert abs(hessian.trace().item()) < 1e-9 * (1 + hessian.abs().max().item())


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_equals_finite_difference_at_axes_and_poles(normalize: bool) -> None:
    vectors = torch.cat([AXES, NEAR_POLE, random_vectors(5)])
    step = 1e-3
    for vector in vectors:
        jacobian = torch.autograd.functional.jacobian(
            lambda v: spherical_harmonics(6, v, normalize=normalize), vector
        )
        for axis in range(3):
            shift = torch.zeros(3).double()
            shift[axis] = step
            weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}  # eighth order
            difference = sum(
                w
                * (
                    spherical_harmonics(6, vector + n * shift, normalize=normalize)
                    - spherical_harmonics(6, vector - n * shift, normalize=normalize)
                )
                for n, w in weights.items()
            )
            error = (jacobian[:, axis] - difference / step).abs().max()
            assert error < 1e-10 * (1 + jacobian.abs().max())


@pytest.mark.parametrize("normalize", [True, False])
def test_first_and_second_derivatives_pass_gradcheck(normalize: bool) -> None:
    vectors = torch.cat([AXES[:5], NEAR_POLE[:1], random_vectors(2)]).requires_grad_()

    def function(v: torch.Tensor) -> torch.Tensor:
        return spherical_harmonics(4, v, normalize=normalize)

    assert torch.autograd.gradcheck(function, vectors)
    assert torch.autograd.gradgradcheck(function, vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vector_has_only_degree_zero_and_zero_derivatives(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [0.3, 0.2, 0.1]], dtype=dtype)
    if dtype == torch.float64:
        vectors[1, 0] = 1e-200
    vectors.requires_grad_()
    harmonics = spherical_harmonics(4, vectors)
    expected = torch.zeros(25, dtype=dtype)
    expected[0] = 1
    assert torch.equal(harmonics[0], expected)
    assert torch.equal(harmonics[1], expected)
    (first,) = torch.autograd.grad(
        harmonics.square().sum(1).sum() + harmonics.sum(), vectors, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), vectors)
    assert first[:2].abs().max() == 0
    assert second[:2].abs().max() == 0
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_leading_shape_are_kept(dtype: torch.dtype) -> None:
    for shape in ((3,), (0, 3), (2, 4, 3)):
        result = spherical_harmonics(3, torch.ones(shape, dtype=dtype))
        assert result.dtype == dtype
        assert result.shape == (*shape[:-1], 16)


@pytest.mark.parametrize("lmax", [2, 3, 6])
def test_float32_error_is_within_twice_that_of_e3nn(lmax: int) -> None:
    o3 = pytest.importorskip("e3nn.o3")
    vectors = random_vectors(5000).float()

    def oracle(v: torch.Tensor) -> torch.Tensor:
        return o3.spherical_harmonics(list(range(lmax + 1)), v, True, "component")

    truth = oracle(vectors.double())
    error = spherical_harmonics(lmax, vectors) - truth
    assert error.square().mean() < 4 * (oracle(vectors) - truth).square().mean()
    assert error.abs().max() < 1e-5


def test_compiles_to_one_graph() -> None:
    compiled = torch.compile(
        lambda v: spherical_harmonics(3, v), backend="aot_eager", fullgraph=True
    )
    vectors = random_vectors(7).requires_grad_()
    torch.testing.assert_close(compiled(vectors), spherical_harmonics(3, vectors))


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="lmax is -1"):
        spherical_harmonics(-1, torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"\(3, 2\)"):
        spherical_harmonics(2, torch.zeros(3, 2))
    with pytest.raises(InputError, match="int64"):
        spherical_harmonics(2, torch.zeros(2, 3, dtype=torch.int64))
