"""CUDA kernels of shared operators, run on the CPU by the host shim, against float64 sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import operator_gather, operator_scatter
from mlip.ops.cuda import shared_operator as cuda
from tests.ops.host_cuda import guarded, needs_compiler, same_bits, without_barrier

pytestmark = needs_compiler

DOUBLE = torch.float64
PARTS = ("there", "back", "of_matrix", "of_weights")
BARRIERS = [
    ("operator_gather", 0), ("operator_scatter", 0), ("operator_scatter", 1),
    ("operator_slopes", 0), ("operator_slopes", 1), ("operator_slopes", 2),
]  # fmt: skip


class Case:
    """Random inputs: ends of an edge may be one atom; the first atom has many, the last no edge."""

    def __init__(
        self,
        rows: int = 9,
        columns: int = 4,
        n_ends: int = 2,
        channels: int = 5,
        dtype: torch.dtype = DOUBLE,
        n_edges: int = 70,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=DOUBLE)
            return guarded(numbers.to(dtype))[1]  # what lies outside is NaN

        self.n_atoms = 6
        self.matrix, self.weights = randn(n_edges, rows, columns), randn(n_edges, channels)
        self.x, self.y = randn(self.n_atoms, columns, channels), randn(n_edges, rows, channels)
        self.ends = torch.randint(0, self.n_atoms - 1, (n_ends, n_edges), generator=generator)
        self.ends[:, : n_edges // 2] = 0

    def truth(self, dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
        """The definition, and its derivatives by autograd."""
        x, matrix, weights = (
            t.to(dtype).requires_grad_() for t in (self.x, self.matrix, self.weights)
        )
        y = self.y.to(dtype)
        there = operator_gather(x, matrix, weights, self.ends, "torch")
        back = operator_scatter(y, matrix.mT, weights, self.ends, self.n_atoms, "torch")
        slopes = torch.autograd.grad((there * y).sum(), (matrix, weights))
        return {name: t.detach() for name, t in zip(PARTS, (there, back, *slopes), strict=True)}

    def kernels(self) -> dict[str, Tensor]:
        """The same by the kernels."""
        there = cuda.gather(self.x, self.matrix, self.weights, self.ends)
        back = cuda.scatter(self.y, self.matrix.mT, self.weights, self.ends, self.n_atoms)
        slopes = cuda.slopes(self.x, self.y, self.matrix, self.weights, self.ends)
        return dict(zip(PARTS, (there, back, *slopes), strict=True))


@pytest.mark.parametrize("n_ends", [1, 3])
@pytest.mark.parametrize("channels", [1, 5, 136])
def test_values_and_gradients_equal_the_definition(on_host, n_ends, channels):
    on_host()
    case = Case(n_ends=n_ends, channels=channels)
    found, truth = case.kernels(), case.truth()
    for name in PARTS:
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-11)
    assert not found["back"][-1].any()


def test_features_of_edges(on_host):
    on_host()
    case = Case()
    x = torch.randn(70, 4, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    found = cuda.apply(x, case.matrix, case.weights)
    truth = torch.einsum("eri,eic,ec->erc", case.matrix, x, case.weights)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_as_accurate_as_the_definition_and_the_same_bits(on_host, dtype):
    """In float32; threads run in several orders, and results must not know."""
    case = Case(16, 16, channels=40, dtype=dtype, n_edges=30)
    assert same_bits(on_host, case.kernels)
    found = case.kernels()
    truth, plain = case.truth(), case.truth(dtype)
    for name in PARTS:
        error = (found[name].double() - truth[name]).norm() / truth[name].norm()
        allowed = (plain[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= 2 * allowed + (1e-15 if dtype == DOUBLE else 0)


def test_views_are_inputs_like_any_other(on_host):
    on_host()
    case = Case(channels=4)
    truth = case.truth()
    case.x = torch.cat([case.x, case.x], dim=2)[:, :, 4:]
    case.matrix = case.matrix.mT.contiguous().mT
    case.ends = case.ends.T.contiguous().T
    found = case.kernels()
    for name in PARTS:
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-12)
    assert found["of_matrix"].stride() == case.matrix.stride()


def test_sums_are_added(on_host):
    on_host()
    case = Case()
    x = torch.ones_like(case.x)
    cuda.scatter_add(x, case.y, case.matrix.mT, case.weights, case.ends)
    torch.testing.assert_close(x - 1, case.truth()["back"], rtol=0, atol=1e-12)


def test_no_edges_and_no_atoms(on_host):
    on_host()
    case = Case(n_edges=0)
    found = case.kernels()
    assert found["there"].numel() == found["of_matrix"].numel() == found["of_weights"].numel() == 0
    assert found["back"].shape == case.x.shape
    assert not found["back"].any()
    case.n_atoms = 0
    assert case.kernels()["back"].shape == (0, 4, 5)


def test_what_does_not_fit_is_an_error(on_host):
    on_host()
    case = Case()
    for x, matrix, word in (
        (case.x[:, 1:], case.matrix, "x"),
        (case.x.float(), case.matrix, "precision"),
        (case.x, case.matrix[:-1], "operator"),
    ):
        with pytest.raises(InputError, match=f"(: |, ){word}"):
            cuda.gather(x, matrix, case.weights, case.ends)


@pytest.mark.parametrize(("kernel", "barrier"), BARRIERS)
def test_a_missing_barrier_is_found(on_host, kernel, barrier):
    """A control of the tests above: without a barrier they would be red."""
    case = Case(4, 3, channels=70)
    assert not same_bits(on_host, case.kernels, change=without_barrier(kernel, barrier))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = Case(16, 16, channels=64, dtype=dtype, n_edges=400)
    truth, plain = case.truth(), case.truth(dtype)
    for name in ("x", "y", "matrix", "weights", "ends"):
        setattr(case, name, getattr(case, name).cuda())
    found, again = case.kernels(), case.kernels()
    for name in PARTS:
        assert torch.equal(found[name], again[name])
        error = (found[name].cpu().double() - truth[name]).norm()
        assert error <= 2 * (plain[name].double() - truth[name]).norm() + 1e-14 * truth[name].norm()
