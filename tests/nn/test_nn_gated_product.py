"""Gated products on the sphere, compiled and plain, against quadrature on a fine grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.nn.sphere_product import SphereBasis, gated_product, grid_matrices, sphere_tables
from mlip.ops.cpu.sphere import GridKernels, _run
from mlip.ops.sphere_tables import factorise
from mlip.so3 import degree_major, order_major, order_sizes

DOUBLE = torch.float64


def inputs(lmax: int, mmax: int, width: int, extra: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = order_sizes(lmax, mmax)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    hidden = [randn(6, 2 * width * n + (extra if i == 0 else 0)) for i, n in enumerate(sizes)]
    return randn(6, width), hidden


def on_fine_grid(lmax: int, mmax: int, extra: int, gate: Tensor, *hidden: Tensor) -> Tensor:
    """Multiply on an equiangular grid far finer than needed."""
    there, back = grid_matrices(SphereBasis(lmax, mmax, True, (6 * lmax + 2, 6 * mmax + 3)))
    rows = torch.cat([hidden[0][:, extra:], *hidden[1:]], dim=1)
    first, second = rows.unflatten(1, (-1, 2 * gate.shape[1])).chunk(2, dim=2)
    return back @ ((there @ first) * (there @ second)) * gate[:, None]


@pytest.mark.parametrize(("lmax", "mmax"), [(4, 2), (6, 2), (2, 2), (3, 0)])
@pytest.mark.parametrize("width", [16, 20, 3])
@pytest.mark.parametrize("variable", ["numba", "torch"])
def test_values_and_gradients(monkeypatch, lmax, mmax, width, variable):
    monkeypatch.setenv("MLIP_BACKEND", variable)
    extra = 11
    gate, hidden = inputs(lmax, mmax, width, extra)
    leaves = [tensor.requires_grad_() for tensor in (gate, *hidden)]
    found = torch.cat(gated_product(SphereBasis(lmax, mmax, True), hidden, extra, gate), dim=1)
    expected = on_fine_grid(lmax, mmax, extra, *leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variable", ["numba", "torch"])
def test_coefficients_of_atoms(monkeypatch, variable):
    """Degree-major, in one tensor: the same numbers as in a frame."""
    monkeypatch.setenv("MLIP_BACKEND", variable)
    gate, hidden = inputs(3, 3, 8, 0)
    stored = degree_major(3, 3)
    order = [order_major(3, 3).index(pair) for pair in stored]
    rows = torch.cat(hidden, dim=1).unflatten(1, (-1, 16))[:, order]
    (found,) = gated_product(SphereBasis(3, 3, False), [rows.flatten(1)], 0, gate)
    expected = on_fine_grid(3, 3, 0, gate, *hidden)[:, order]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("width", [1, 13, 35])
def test_nothing_is_written_behind_the_last_channel(width, dtype):
    basis, extra = SphereBasis(3, 2, True), 5
    gate, hidden = inputs(3, 2, width, extra)
    kernels = GridKernels(3, 2, True, sphere_tables(basis), gate.to(dtype))
    rows = kernels.module.ROWS
    shapes = [*((6, n, width) for n in rows), *(tuple(part.shape) for part in (*hidden, gate))]
    places = []
    for shape in shapes:
        whole = torch.zeros(torch.Size(shape).numel() + 32, dtype=dtype)
        places.append((whole[:-32].view(shape), whole[-32:]))
    out, slopes = ([place for place, _ in part] for part in (places[:5], places[5:]))
    given = (extra, gate.to(dtype), [tensor.to(dtype) for tensor in hidden])
    _run(kernels.module.product, rows, *given, out)
    _run(kernels.module.gradient, rows, *given, out, *(t.numpy().reshape(-1) for t in slopes))

    leaves = [tensor.requires_grad_() for tensor in (gate, *hidden)]
    truth = on_fine_grid(3, 2, extra, *leaves)
    of_gate, *of_hidden = torch.autograd.grad(truth.square().sum() / 2, leaves)
    tolerance = 1e-11 if dtype == DOUBLE else 1e-3
    found = [torch.cat(out, dim=1), *slopes]
    for a, b in zip(found, (truth, *of_hidden, of_gate), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert not any(behind.any() for _, behind in places)


def test_published_grids_are_done_plainly(monkeypatch):
    basis = SphereBasis(4, 2, True, (14, 8))
    gate, hidden = inputs(4, 2, 16, 0)
    found = torch.cat(gated_product(basis, hidden, 0, gate), dim=1)
    torch.testing.assert_close(found, on_fine_grid(4, 2, 0, gate, *hidden), rtol=0, atol=1e-11)
    monkeypatch.setenv("MLIP_BACKEND", "numba")
    with pytest.raises(ValueError, match="the grid is a published one"):
        gated_product(basis, hidden, 0, gate)


def test_only_grids_of_circles_are_factorised():
    there, back = grid_matrices(SphereBasis(4, 2, True))
    with pytest.raises(ValueError, match="no product of latitudes and longitudes"):
        factorise(there[torch.randperm(len(there), generator=torch.Generator())], back, 4, 2, 7)
