"""CUDA kernels of running products on the sphere, run by the host shim, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.nn.node_update import _minimal_from_grid, _minimal_to_grid
from mlip.ops import sphere_products
from mlip.ops.cpu import sphere_products as cpu
from mlip.ops.cuda import sphere_products as cuda
from tests.ops.host_cuda import guarded, needs_compiler, same_bits, without_barrier

pytestmark = needs_compiler

DOUBLE = torch.float64
PARTS = ("products", "slopes")
RAGGED = [
    # rows, rows of the products, points, factors, atoms, channels
    (5, 3, 37, 2, 3, 5),
    (4, 9, 7, 3, 2, 67),
    (6, 6, 70, 4, 1, 1),
    (1, 2, 1, 5, 3, 43),
]


class Case:
    """Random functions and matrices; what lies outside of them is NaN."""

    def __init__(
        self,
        rows: int,
        out_rows: int,
        points: int,
        order: int,
        n_atoms: int = 3,
        channels: int = 5,
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=DOUBLE)
            return guarded(numbers.to(dtype))[1]

        self.order = order
        self.u = randn(n_atoms, rows, order * channels)
        self.gradient = randn(n_atoms, out_rows, (order - 1) * channels)
        self.to_grid, self.from_grid = randn(points, rows), randn(out_rows, points)

    def truth(self, dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
        """The definition, and its gradient by autograd."""
        u = self.u.to(dtype).requires_grad_()
        tables = self.to_grid.to(dtype), self.from_grid.to(dtype)
        out = sphere_products(u, *tables, self.order, "torch")
        (slopes,) = torch.autograd.grad(out, u, self.gradient.to(dtype))
        return {"products": out.detach(), "slopes": slopes}

    def kernels(self) -> dict[str, Tensor]:
        """The same by the kernels."""
        tables = (self.to_grid, self.from_grid, self.order)
        found = cuda.products(self.u, *tables), cuda.slopes(self.u, self.gradient, *tables)
        return dict(zip(PARTS, found, strict=True))


def on_a_grid(
    lmax: int, lmax_out: int, order: int, dtype: torch.dtype, n_atoms: int, channels: int
) -> Case:
    """A case with the matrices of the smallest exact grid."""
    grid = (order * lmax + lmax_out, lmax)
    to_grid = _minimal_to_grid(*grid)
    from_grid = _minimal_from_grid(*grid)[: (lmax_out + 1) ** 2]
    sizes = to_grid.shape[1], len(from_grid), len(to_grid), order
    case = Case(*sizes, n_atoms, channels, dtype)
    case.to_grid, case.from_grid = to_grid.to(dtype), from_grid.to(dtype)
    return case


@pytest.mark.parametrize("sizes", RAGGED)
def test_values_and_gradients_equal_the_definition(on_host, sizes):
    on_host()
    case = Case(*sizes)
    found, truth = case.kernels(), case.truth()
    for name in PARTS:
        size = float(truth[name].abs().max())
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-13 * size)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("degrees", [(3, 1, 3), (2, 2, 2)])
def test_exact_grids_as_accurate_as_the_definition_and_the_same_bits(on_host, degrees, dtype):
    """In float32; threads run in several orders, and results must not know."""
    case = on_a_grid(*degrees, dtype, n_atoms=9, channels=32)
    assert same_bits(on_host, case.kernels)
    found, truth, plain = case.kernels(), case.truth(), case.truth(dtype)
    for name in PARTS:
        error = (found[name].double() - truth[name]).norm() / truth[name].norm()
        allowed = (plain[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= 2 * allowed + (1e-15 if dtype == DOUBLE else 0)


def test_derivatives_by_finite_differences(on_host, monkeypatch):
    """The operators of PyTorch, with the kernels in the place of those for the CPU."""
    on_host()
    for name in PARTS:
        monkeypatch.setattr(cpu, name, getattr(cuda, name))
    case = Case(4, 3, 6, 3, n_atoms=2, channels=2)
    tables = (case.to_grid, case.from_grid, 3)
    u, gradient = case.u.requires_grad_(), case.gradient.requires_grad_()
    assert torch.autograd.gradcheck(cpu.products_op, (u, *tables), fast_mode=True)
    assert torch.autograd.gradgradcheck(cpu.products_op, (u, *tables), fast_mode=True)
    assert torch.autograd.gradgradcheck(cpu.slopes_op, (u, gradient, *tables), fast_mode=True)


@pytest.mark.parametrize("operator", ["sphere_products", "sphere_products_backward"])
def test_kernels_belong_to_the_operators(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mlip::{operator}", "CUDA")


def test_views_and_no_atoms(on_host):
    on_host()
    case = Case(4, 4, 9, 2, n_atoms=4, channels=3)
    truth = case.truth()
    case.u = torch.cat([case.u, case.u], dim=2)[:, :, 6:]
    case.gradient = case.gradient.transpose(0, 1).contiguous().transpose(0, 1)
    case.from_grid = case.from_grid.T.contiguous().T
    found = case.kernels()
    for name in PARTS:
        torch.testing.assert_close(found[name], truth[name], rtol=0, atol=1e-12)
    case.u, case.gradient = case.u[:0], case.gradient[:0]
    assert [tuple(part.shape) for part in case.kernels().values()] == [(0, 4, 3), (0, 4, 6)]


def test_what_does_not_fit_is_an_error(on_host):
    on_host()
    case = Case(4, 4, 9, 2)
    for u, to_grid, word in (
        (case.u[:, :, 1:], case.to_grid, "u"),
        (case.u, case.to_grid[:, 1:], "to_grid"),
        (case.u, case.to_grid.float(), "precision"),
    ):
        with pytest.raises(InputError, match=f"(: |, ){word}"):
            cuda.products(u, to_grid, case.from_grid, 2)
    with pytest.raises(InputError, match="gradient"):
        cuda.slopes(case.u, case.gradient[1:], case.to_grid, case.from_grid, 2)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(on_host, barrier):
    """A control of the tests above: without a barrier they would be red."""
    case = Case(9, 9, 70, 3, channels=50)
    assert not same_bits(on_host, case.kernels, change=without_barrier("for_points", barrier))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = on_a_grid(3, 1, 3, dtype, n_atoms=300, channels=33)
    truth, plain = case.truth(), case.truth(dtype)
    for name in ("u", "gradient", "to_grid", "from_grid"):
        setattr(case, name, getattr(case, name).cuda())
    found, again = case.kernels(), case.kernels()
    for name in PARTS:
        assert torch.equal(found[name], again[name])
        error = (found[name].cpu().double() - truth[name]).norm()
        assert error <= 2 * (plain[name].double() - truth[name]).norm() + 1e-14 * truth[name].norm()
