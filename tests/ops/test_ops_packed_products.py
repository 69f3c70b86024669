"""Products of functions on the sphere circle by circle, against those on the points of a grid."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from mlip.ops import sphere_products
from mlip.ops.cpu import packed_products, threads
from mlip.ops.cpu.packed_products import PackedProducts
from mlip.so3 import minimal_grid

ATOMS, CHANNELS, SCALE = 7, 40, 0.7  # the last vector is half full in float32
CASES = [(1, 1, 2), (2, 2, 3), (2, 0, 3), (3, 1, 3), (2, 2, 4), (4, 4, 2)]  # degrees, factors


def packed(x: torch.Tensor) -> torch.Tensor:
    """Lay [N, (L+1)², C] degree after degree."""
    lmax = int(x.shape[1] ** 0.5) - 1
    parts = [x[:, degree**2 : (degree + 1) ** 2].reshape(-1) for degree in range(lmax + 1)]
    return torch.cat(parts)


def truth(lmax: int, lmax_out: int, order: int) -> list[torch.Tensor]:
    """Factors, products, a seed, and the slopes of the factors, in float64 on an exact grid."""
    generator = torch.Generator().manual_seed(0)

    def random(degree: int, parts: int) -> torch.Tensor:
        shape = (ATOMS, (degree + 1) ** 2, parts * CHANNELS)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, seed = random(lmax, order).requires_grad_(), random(lmax_out, order - 1)
    grid = minimal_grid(order * lmax + lmax_out, max(lmax, lmax_out))
    to_grid = SCALE * grid.to_grid[:, : (lmax + 1) ** 2]
    out = sphere_products(u, to_grid, grid.from_grid[: (lmax_out + 1) ** 2], order, "torch")
    (slopes,) = torch.autograd.grad(out, u, seed)
    return [packed(x.detach()) for x in (u, out, seed, slopes)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_slopes(case, dtype):
    u, out, seed, slopes = truth(*case)
    products = PackedProducts(*case, SCALE, CHANNELS)
    found = products.products(u.to(dtype), ATOMS)
    assert (found - out).norm() < 8 * torch.finfo(dtype).eps * out.norm()
    found = products.slopes(u.to(dtype), seed.to(dtype), ATOMS)
    assert (found - slopes).norm() < 8 * torch.finfo(dtype).eps * slopes.norm()


def test_threads_do_not_change_a_bit(monkeypatch):
    u, _, seed, _ = truth(2, 2, 3)
    products = PackedProducts(2, 2, 3, SCALE, CHANNELS)
    monkeypatch.setattr(packed_products, "SERIAL", 0)
    runs = []
    for n in (1, 3):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        runs.append((products.products(u, ATOMS), products.slopes(u, seed, ATOMS)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_atoms():
    products = PackedProducts(2, 1, 3, SCALE, CHANNELS)
    none = torch.empty(0)
    assert products.products(none, 0).shape == products.slopes(none, none, 0).shape == (0,)
