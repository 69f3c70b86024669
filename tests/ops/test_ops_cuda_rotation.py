"""CUDA kernels of rotations, run on the CPU by the host shim, against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import RotationSignature, rotate_gather, rotate_scatter
from mlip.ops.cpu import rotation as cpu
from mlip.ops.cuda import rotation as cuda
from mlip.so3 import degree_major
from tests.ops.host_cuda import guarded, needs_compiler, same_bits, without_barrier

pytestmark = needs_compiler

DOUBLE = torch.float64
FORMS = list(itertools.product((1, 2), (True, False)))
BARRIERS = [
    ("rotate_gather", 0), ("rotate_scatter", 0), ("rotate_scatter", 1), ("scale_slopes", 0),
    ("matrix_slopes", 0),
]  # fmt: skip
PARTS = ("there", "back", "of_matrix", "of_scale")


class Case:
    """Random inputs: ends of an edge may be one atom; the first atom has many, the last no edge."""

    def __init__(
        self,
        signature: RotationSignature,
        n_ends: int = 2,
        by_degree: bool = True,
        channels: int = 5,
        dtype: torch.dtype = DOUBLE,
        n_edges: int = 50,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=DOUBLE)
            return guarded(numbers.to(dtype))[1]  # what lies outside is NaN

        self.signature, self.n_atoms = signature, 6
        of_column = torch.tensor([own for own, _ in degree_major(signature.lmax, signature.lmax)])
        self.within = torch.tensor(signature.degrees)[:, None] == of_column
        self.x = randn(self.n_atoms, signature.n_coefficients, channels)
        self.matrix = randn(n_edges, *self.within.shape) * self.within
        self.scale = randn(n_edges, signature.lmax + 1 if by_degree else 1, n_ends * channels)
        self.orders = [randn(n_edges, n, n_ends * channels) for n in signature.sizes]
        self.ends = torch.randint(0, self.n_atoms - 1, (n_ends, n_edges), generator=generator)
        self.ends[:, : n_edges // 2] = 0

    def truth(self, dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
        """The definition, and its derivatives by autograd."""
        x, matrix, scale = (t.to(dtype).requires_grad_() for t in (self.x, self.matrix, self.scale))
        orders = tuple(t.to(dtype) for t in self.orders)
        there = rotate_gather(self.signature, x, matrix, scale, self.ends, "torch")
        back = rotate_scatter(
            self.signature, orders, matrix, scale, self.ends, self.n_atoms, "torch"
        )
        form = torch.stack([(a * b).sum() for a, b in zip(there, orders, strict=True)]).sum()
        slopes = torch.autograd.grad(form, (matrix, scale))
        found = (_flat(there), back, slopes[0] * self.within, slopes[1])
        return {name: t.detach() for name, t in zip(PARTS, found, strict=True)}

    def kernels(self) -> dict[str, Tensor]:
        """The same by the kernels."""
        degrees = (self.signature.lmax, self.signature.mmax)
        shared = (self.matrix, self.scale, self.ends)
        there = cuda.cuda_gather(self.x, *shared, *degrees)
        back = cuda.cuda_scatter(self.orders, *shared, self.n_atoms, *degrees)
        slopes = cuda.cuda_slopes(self.x, self.orders, *shared, *degrees)
        return dict(zip(PARTS, (_flat(there), back, *slopes), strict=True))


def _flat(orders) -> Tensor:
    return torch.cat([part.flatten() for part in orders])


@pytest.mark.parametrize(("n_ends", "by_degree"), FORMS)
@pytest.mark.parametrize("channels", [5, 72])
def test_values_and_gradients_equal_the_definition(on_host, n_ends, by_degree, channels):
    on_host()
    case = Case(RotationSignature(2, 1), n_ends, by_degree, channels)
    found, truth = case.kernels(), case.truth()
    for name in PARTS:
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-12)
    assert not found["back"][-1].any()


def test_derivatives_by_finite_differences(on_host, monkeypatch):
    """The operators of PyTorch, with the kernels in the place of those for the CPU."""
    on_host()
    for name in ("gather", "scatter_add", "slopes_add"):
        monkeypatch.setattr(cpu, name, getattr(cuda, name))
    case = Case(RotationSignature(1, 1), channels=8, n_edges=2)

    def there_and_back(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
        matrix = matrix * case.within
        there = cpu.gather_op(x, matrix, scale, case.ends, 1, 1)
        bent = [part + part**2 / 4 for part in there]  # so that second derivatives are not zero
        return cpu.scatter_op(bent, matrix, scale, case.ends, case.n_atoms, 1, 1)

    inputs = [t.detach().requires_grad_() for t in (case.x, case.matrix, case.scale)]
    assert torch.autograd.gradcheck(there_and_back, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(there_and_back, inputs, fast_mode=True)


@pytest.mark.parametrize("operator", ["rotate_gather", "rotate_scatter", "rotate_slopes"])
def test_kernels_belong_to_the_operators(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mlip::{operator}", "CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_published_degrees_as_accurate_as_the_definition_and_the_same_bits(on_host, dtype):
    """In float32; threads run in several orders, and results must not know."""
    case = Case(RotationSignature(4, 2), channels=24, dtype=dtype, n_edges=40)
    assert same_bits(on_host, case.kernels)
    found = case.kernels()
    truth, plain = case.truth(), case.truth(dtype)
    for name in PARTS:
        error = (found[name].double() - truth[name]).norm() / truth[name].norm()
        allowed = (plain[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= 2 * allowed + (1e-15 if dtype == DOUBLE else 0)


def test_sums_and_slopes_are_added(on_host):
    on_host()
    case = Case(RotationSignature(2, 1), channels=3)
    shared = (case.matrix, case.scale, case.ends)
    found = [torch.ones_like(tensor) for tensor in (case.x, case.matrix, case.scale)]
    cuda.scatter_add(case.signature, found[0], case.orders, *shared)
    cuda.slopes_add(case.signature, case.x, case.orders, *shared, *found[1:])
    for name, added in zip(PARTS[1:], found, strict=True):
        torch.testing.assert_close(added - 1, case.truth()[name], rtol=0, atol=1e-12)


def test_views_are_inputs_like_any_other(on_host):
    on_host()
    case = Case(RotationSignature(2, 1), channels=4)
    truth = case.truth()
    case.x = torch.cat([case.x, case.x], dim=2)[:, :, 4:]
    case.matrix = case.matrix.mT.contiguous().mT
    case.ends = case.ends.T.contiguous().T
    found = case.kernels()
    for name in PARTS:
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-12)


def test_no_edges_and_no_atoms(on_host):
    on_host()
    case = Case(RotationSignature(1, 1), n_edges=0)
    found = case.kernels()
    assert found["there"].numel() == found["of_matrix"].numel() == found["of_scale"].numel() == 0
    assert found["back"].shape == case.x.shape
    assert not found["back"].any()
    case.n_atoms = 0
    assert case.kernels()["back"].shape == (0, 4, 5)


def test_what_does_not_fit_is_an_error(on_host):
    on_host()
    case = Case(RotationSignature(2, 1))
    for x, matrix, word in (
        (case.x[:, 1:], case.matrix, "x"),
        (case.x, case.matrix.float(), "precision"),
        (case.x, case.matrix[:-1], "scale"),
    ):
        with pytest.raises(InputError, match=f"(: |, ){word}"):
            cuda.cuda_gather(x, matrix, case.scale, case.ends, 2, 1)


@pytest.mark.parametrize(("kernel", "barrier"), BARRIERS)
def test_a_missing_barrier_is_found(on_host, kernel, barrier):
    """A control of the tests above: without a barrier they would be red."""
    case = Case(RotationSignature(1, 1), channels=40)
    assert not same_bits(on_host, case.kernels, change=without_barrier(kernel, barrier))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = Case(RotationSignature(4, 2), channels=128, dtype=dtype, n_edges=400)
    truth, plain = case.truth(), case.truth(dtype)
    for name in ("x", "matrix", "scale", "ends"):
        setattr(case, name, getattr(case, name).cuda())
    case.orders = [part.cuda() for part in case.orders]
    found, again = case.kernels(), case.kernels()
    for name in PARTS:
        assert torch.equal(found[name], again[name])
        error = (found[name].cpu().double() - truth[name]).norm()
        assert error <= 2 * (plain[name].double() - truth[name]).norm() + 1e-14 * truth[name].norm()
