"""Products of functions on the sphere by compiled code, against plain PyTorch and e3nn."""

from __future__ import annotations

import pytest
import torch

from mlip.errors import InputError
from mlip.nn.node_update import _minimal_from_grid, _minimal_to_grid
from mlip.ops import sphere_products
from mlip.ops.cpu.sphere_products import _run, products_op, slopes_op

DOUBLE = torch.float64
CASES = [(1, 1, 2), (2, 2, 3), (3, 1, 3), (2, 0, 2)]  # degrees of factors and products, factors


def tables(lmax: int, lmax_out: int, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = (order * lmax + lmax_out, lmax)
    return _minimal_to_grid(*grid), _minimal_from_grid(*grid)[: (lmax_out + 1) ** 2]


def coefficients(n: int, lmax: int, order: int, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, (lmax + 1) ** 2, order * channels, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels", [32, 7, 43])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_equals_plain_pytorch_with_two_derivatives(case, channels, dtype):
    to_grid, from_grid = tables(*case)
    u = coefficients(5, case[0], case[2], channels)

    def derivatives(name: str, kind: torch.dtype) -> list[torch.Tensor]:
        given = u.to(kind).requires_grad_()
        out = sphere_products(given, to_grid.to(kind), from_grid.to(kind), case[2], name)
        (slope,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), given)
        return [tensor.detach().double() for tensor in (out, slope, second)]

    truth = derivatives("torch", DOUBLE)
    plain, fast = (derivatives(name, dtype) for name in ("torch", "numba"))
    rounding = (16 if dtype == DOUBLE else 4) * torch.finfo(dtype).eps  # of the truth itself
    for found, known, exact in zip(fast, plain, truth, strict=True):
        allowed = 2 * (known - exact).norm() + rounding * exact.norm()
        assert (found - exact).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("channels", [1, 13, 35])
def test_nothing_is_written_behind_the_last_channel(channels, dtype):
    grid = tables(2, 1, 3)
    u, gradient = coefficients(3, 2, 3, channels), coefficients(3, 1, 2, channels)
    expected = u.clone().requires_grad_()
    out = sphere_products(expected, *grid, 3, "torch")
    (slopes,) = torch.autograd.grad(out, expected, gradient)
    single = [tensor.to(dtype) for tensor in (u, *grid)]
    tolerance = 1e-12 if dtype == DOUBLE else 1e-4
    for loop, given, truth in (("products", [], out), ("slopes", [gradient.to(dtype)], slopes)):
        whole = torch.zeros(truth.numel() + 32, dtype=dtype)
        found = whole[:-32].view(truth.shape)
        _run(loop, *single, 3, *given, found)
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
        assert not whole[-32:].any()


def test_products_are_those_of_gaunt_coefficients():
    """The product of two harmonics is a sum of Clebsch–Gordan products with known weights."""
    o3 = pytest.importorskip("e3nn.o3")
    to_grid, from_grid = tables(2, 2, 2)
    u = torch.zeros(1, 9, 32, dtype=DOUBLE)
    u[0, 2, :16], u[0, 2, 16:] = 1.0, 1.0  # y·y
    product = sphere_products(u, to_grid, from_grid, 2, "numba")[0, :, 0] * 3  # tables hold 1/√3
    direction = torch.nn.functional.normalize(torch.randn(20, 3, dtype=DOUBLE), dim=1)
    harmonics = o3.spherical_harmonics([0, 1, 2], direction, False, normalization="component")
    expected = harmonics[:, 2] ** 2
    torch.testing.assert_close(harmonics @ product, expected, rtol=0, atol=1e-12)


def test_derivatives_by_finite_differences():
    to_grid, from_grid = tables(1, 1, 3)
    u = coefficients(2, 1, 3, 9).requires_grad_()
    gradient = torch.randn(2, 4, 18, dtype=DOUBLE, requires_grad=True)
    torch.autograd.gradcheck(products_op, (u, to_grid, from_grid, 3), fast_mode=True)
    torch.autograd.gradgradcheck(products_op, (u, to_grid, from_grid, 3), fast_mode=True)
    torch.autograd.gradgradcheck(slopes_op, (u, gradient, to_grid, from_grid, 3), fast_mode=True)


def test_operators_are_well_formed():
    to_grid, from_grid = tables(1, 1, 2)
    u = coefficients(3, 1, 2).requires_grad_()
    gradient = torch.randn(3, 4, 16, dtype=DOUBLE)
    torch.library.opcheck(products_op, (u, to_grid, from_grid, 2))
    torch.library.opcheck(slopes_op, (u, gradient, to_grid, from_grid, 2))


def test_bits_do_not_depend_on_threads():
    to_grid, from_grid = tables(2, 2, 3)
    u = coefficients(301, 2, 3)
    gradient = torch.randn(301, 9, 32, dtype=DOUBLE)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            tensors = (u, gradient, to_grid, from_grid)
            found.append((products_op(u, to_grid, from_grid, 3), slopes_op(*tensors, 3)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])


def test_views_and_no_atoms():
    to_grid, from_grid = tables(1, 1, 2)
    wide = coefficients(4, 1, 4)
    view = wide[::2, :, :32]
    expected = sphere_products(view.contiguous(), to_grid, from_grid, 2, "torch")
    torch.testing.assert_close(sphere_products(view, to_grid, from_grid, 2, "numba"), expected)
    assert products_op(wide[:0], to_grid, from_grid, 4).shape == (0, 4, 48)


def test_wrong_shapes_are_named():
    to_grid, from_grid = tables(1, 1, 2)
    with pytest.raises(InputError, match="to_grid"):
        products_op(coefficients(2, 2, 2), to_grid, from_grid, 2)
    with pytest.raises(InputError, match="precision"):
        products_op(coefficients(2, 1, 2).float(), to_grid, from_grid, 2)
