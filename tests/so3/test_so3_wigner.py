"""Wigner matrices and edge frames: against e3nn, harmonics and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.so3 import rotation_to_axis, spherical_harmonics, wigner_matrices

UP = torch.tensor([0.0, 1.0, 0.0]).double()
AXES = torch.cat([torch.eye(3), -torch.eye(3)]).double()
POLES = torch.tensor(
    [[0, 1, 0], [0, -1, 0], [1e-9, 2, 0], [1e-8, -1, 1e-9], [1e-4, 1, 1e-3], [0, -3, 1e-3]]
).double()


def random_vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def random_rotations(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q * torch.linalg.det(q)[:, None, None]


def special_rotations() -> torch.Tensor:
    """Identity, half turns about axes and diagonals, quarter turns, and the inversion of each."""
    eye = torch.eye(3).double()
    axes = torch.cat([eye, torch.tensor([[1.0, 1, 0], [1, 0, -1], [1, 1, 1]]).double()])
    axes = axes / axes.norm(dim=-1, keepdim=True)
    half = 2 * axes[:, :, None] * axes[:, None, :] - eye
    quarter = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]).double()
    proper = torch.cat([eye[None], half, quarter[None], quarter[[1, 2, 0]][:, [1, 2, 0]][None]])
    return torch.cat([proper, -proper])


@pytest.fixture
def float64_default():
    """Let e3nn, which builds its generators in the default dtype, work in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64_default")
def test_equals_e3nn() -> None:
    o3 = pytest.importorskip("e3nn.o3")
    angles = (3 * random_vectors(20)).unbind(-1)
    matrices = wigner_matrices(8, o3.angles_to_matrix(*angles))
    for degree, matrix in enumerate(matrices):
        torch.testing.assert_close(matrix, o3.wigner_D(degree, *angles), rtol=0, atol=1e-12)


def test_equals_the_published_equiformer_matrices(shared) -> None:
    with np.load(shared / "golden/equiformer_v3/primitives.npz") as parts:
        expected = [torch.from_numpy(parts[f"wigner_D_angles/D{d}"]) for d in range(7)]
    for ours, theirs in zip(wigner_matrices(6, expected[1]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotations", [special_rotations(), random_rotations(10)])
def test_rotates_the_harmonics(rotations: torch.Tensor) -> None:
    points = random_vectors(30)
    before = spherical_harmonics(6, points)
    after = spherical_harmonics(6, torch.einsum("rij,pj->rpi", rotations, points))
    for degree, matrix in enumerate(wigner_matrices(6, rotations)):
        block = slice(degree**2, (degree + 1) ** 2)
        torch.testing.assert_close(
            after[..., block],
            torch.einsum("rab,pb->rpa", matrix, before[:, block]),
            rtol=0,
            atol=1e-12,
        )


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_composition_and_orthogonality(seed: int) -> None:
    first, second = random_rotations(2, seed)
    for a, b, ab in zip(
        wigner_matrices(6, first),
        wigner_matrices(6, second),
        wigner_matrices(6, first @ second),
        strict=True,
    ):
        torch.testing.assert_close(a @ b, ab, rtol=0, atol=1e-12)
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)).double(), rtol=0, atol=1e-12)


def test_identity_and_inversion() -> None:
    eye = torch.eye(3).double()
    for degree, (same, odd) in enumerate(
        zip(wigner_matrices(6, eye), wigner_matrices(6, -eye), strict=True)
    ):
        expected = torch.eye(2 * degree + 1).double()
        torch.testing.assert_close(same, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(odd, (-1) ** degree * expected, rtol=0, atol=1e-13)


def test_shapes_and_dtypes() -> None:
    rotation = random_rotations(6).reshape(2, 3, 3, 3).float()
    matrices = wigner_matrices(3, rotation)
    assert [m.shape for m in matrices] == [(2, 3, k, k) for k in (1, 3, 5, 7)]
    assert {m.dtype for m in matrices} == {torch.float32}
    assert [len(wigner_matrices(lmax, rotation)) for lmax in (0, 1, 2)] == [1, 2, 3]
    assert wigner_matrices(2, rotation[:0])[2].shape == (0, 3, 5, 5)
    exact = wigner_matrices(3, rotation.double())
    for ours, truth in zip(matrices, exact, strict=True):
        assert (ours.double() - truth).abs().max() < 2e-6


def test_derivatives_of_wigner_matrices_pass_gradcheck() -> None:
    rotation = special_rotations()[[0, 2]].requires_grad_()

    def function(r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(wigner_matrices(3, r)[1:])

    assert torch.autograd.gradcheck(function, rotation)
    assert torch.autograd.gradgradcheck(function, rotation)


def test_frame_takes_the_vector_to_plus_y() -> None:
    vectors = torch.cat([random_vectors(100), AXES, POLES])
    frames = rotation_to_axis(vectors)
    length = vectors.norm(dim=-1, keepdim=True)
    rotated = (frames @ vectors.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(rotated / length, UP.expand_as(vectors), rtol=0, atol=1e-14)
    eye = torch.eye(3).double().expand_as(frames)
    torch.testing.assert_close(frames @ frames.mT, eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.linalg.det(frames), torch.ones(112).double())


def test_harmonics_in_the_frame_have_only_order_zero() -> None:
    vectors = torch.cat([random_vectors(20), AXES, POLES])
    harmonics = spherical_harmonics(6, vectors)
    for degree, matrix in enumerate(wigner_matrices(6, rotation_to_axis(vectors))):
        block = harmonics[:, degree**2 : (degree + 1) ** 2]
        expected = torch.zeros_like(block)
        expected[:, degree] = math.sqrt(2 * degree + 1)
        local = (matrix @ block.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(local, expected, rtol=0, atol=1e-12)


def test_frame_derivatives_equal_finite_differences_at_the_poles() -> None:
    off_switch = torch.tensor([[1.0, 1e-2, 0.0], [0.3, -0.1, 0.9]]).double()
    step = 1e-3
    for vector in torch.cat([POLES, off_switch]):
        jacobian = torch.autograd.functional.jacobian(rotation_to_axis, vector)
        assert torch.isfinite(jacobian).all()
        for axis in range(3):
            shift = torch.zeros(3).double()
            shift[axis] = step
            weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}  # eighth order
            difference = sum(
                w * (rotation_to_axis(vector + n * shift) - rotation_to_axis(vector - n * shift))
                for n, w in weights.items()
            )
            torch.testing.assert_close(jacobian[..., axis], difference / step, rtol=0, atol=1e-9)


def test_frame_second_derivatives_pass_gradcheck() -> None:
    vectors = torch.cat([POLES[:3], random_vectors(2)]).requires_grad_()
    assert torch.autograd.gradcheck(rotation_to_axis, vectors)
    assert torch.autograd.gradgradcheck(rotation_to_axis, vectors)


def test_invariant_of_the_frame_is_exact_through_the_pole_and_the_switch() -> None:
    """A value independent of roll has derivatives that see neither the pole nor the switch."""
    feature = torch.linspace(-1, 1, 25).double()
    vectors = torch.cat([AXES, POLES, random_vectors(3)]).requires_grad_()
    matrices = wigner_matrices(4, rotation_to_axis(vectors))
    local = [matrices[d] @ feature[d**2 : (d + 1) ** 2] for d in range(5)]
    value = sum(v[:, d] ** 2 for d, v in enumerate(local)).sum()
    harmonics = spherical_harmonics(4, vectors)
    direct = sum(
        (harmonics[:, d**2 : (d + 1) ** 2] @ feature[d**2 : (d + 1) ** 2]) ** 2 / (2 * d + 1)
        for d in range(5)
    ).sum()
    for ours, truth in (
        (value, direct),
        (torch.autograd.grad(value, vectors)[0], torch.autograd.grad(direct, vectors)[0]),
    ):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vector_has_the_identity_frame_and_zero_derivatives(dtype: torch.dtype) -> None:
    vectors = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    frame = rotation_to_axis(vectors)
    assert torch.equal(frame[0], torch.eye(3, dtype=dtype))
    weights = torch.arange(9, dtype=dtype).reshape(3, 3)
    (first,) = torch.autograd.grad((frame * weights).sum(), vectors, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), vectors)
    assert torch.equal(first, torch.zeros_like(first))
    assert torch.equal(second, torch.zeros_like(second))


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="lmax is -2"):
        wigner_matrices(-2, torch.eye(3))
    with pytest.raises(InputError, match=r"\(3, 2\)"):
        wigner_matrices(1, torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"\(4, 2\)"):
        rotation_to_axis(torch.zeros(4, 2))
    with pytest.raises(InputError, match="int64"):
        rotation_to_axis(torch.zeros(4, 3, dtype=torch.int64))
