"""Harmonics and radial functions of edges by compiled code, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from mlip.nn.radial import polynomial_envelope
from mlip.ops.cpu import edge_functions, threads
from mlip.ops.cpu.edge_functions import EdgeFunctions
from mlip.so3 import spherical_harmonics

CUTOFF = 5.0
CASES = [(0, 3, 5), (1, 1, 3), (2, 8, 5), (3, 8, 6), (5, 2, 4)]  # degree, functions, order


def functions(lmax: int, n_radial: int, order: int, dtype: torch.dtype) -> EdgeFunctions:
    frequencies = 0.63 * torch.arange(1, n_radial + 1, dtype=torch.float64) + 0.01
    return EdgeFunctions(lmax, frequencies.to(dtype), CUTOFF, order)


def vectors(n: int = 300) -> torch.Tensor:
    """Some are longer than the cutoff, some along axes."""
    generator = torch.Generator().manual_seed(0)
    found = 2 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return torch.cat([found, 1.5 * torch.eye(3, dtype=torch.float64), torch.tensor([[0, -2.0, 0]])])


def plain(f: EdgeFunctions, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    envelope = polynomial_envelope(r / f.cutoff, f.order)
    return spherical_harmonics(f.lmax, d), 2 * torch.sin(f.frequencies * r) / r * envelope


def evaluated(f: EdgeFunctions, dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
    """Values and gradient for random cotangents."""
    d = vectors().to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    values = f.values(d.detach()) if fast else plain(f, d)
    seeds = [
        torch.randn(v.shape, generator=generator, dtype=torch.float64).to(dtype)
        for v in values[:2]
    ]  # fmt: skip
    if fast:
        gradient = f.gradient(d.detach(), values[2], *seeds)
    else:
        total = sum((value * seed).sum() for value, seed in zip(values, seeds, strict=True))
        (gradient,) = torch.autograd.grad(total, d)
    return [tensor.detach().double() for tensor in (*values[:2], gradient)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradient(case, dtype):
    truth = evaluated(functions(*case, torch.float64), torch.float64, fast=False)
    known = evaluated(functions(*case, dtype), dtype, fast=False)
    found = evaluated(functions(*case, dtype), dtype, fast=True)
    rounding = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    for a, b, exact in zip(found, known, truth, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm() + rounding * exact.norm()


def test_nothing_is_left_beyond_the_cutoff():
    f = functions(2, 4, 5, torch.float64)
    d = torch.tensor([[0.0, 0.0, CUTOFF], [4.0, 4.0, 0.0]], dtype=torch.float64)
    harmonics, basis, waves = f.values(d)
    assert not basis.any()
    assert not f.gradient(d, waves, torch.zeros_like(harmonics), torch.ones_like(basis)).any()


def test_a_vector_without_direction_has_the_harmonics_of_the_definition():
    f = functions(2, 1, 5, torch.float64)
    d = torch.zeros(1, 3, dtype=torch.float64)
    assert torch.equal(f.values(d)[0], spherical_harmonics(2, d))


def test_threads_do_not_change_a_bit(monkeypatch):
    f = functions(3, 8, 5, torch.float32)
    monkeypatch.setattr(edge_functions, "SERIAL_EDGES", 0)
    runs = []
    for n in (1, 2, 5):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        runs.append(evaluated(f, torch.float32, fast=True))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_no_edges():
    f = functions(2, 3, 5, torch.float32)
    harmonics, basis, waves = f.values(torch.empty(0, 3))
    assert harmonics.shape == (0, 9)
    assert basis.shape == (0, 3)
    assert f.gradient(torch.empty(0, 3), waves, harmonics, basis).shape == (0, 3)


def test_vectors_need_not_be_contiguous():
    f = functions(2, 3, 5, torch.float64)
    d = vectors()
    for a, b in zip(f.values(d.T.contiguous().T)[:2], f.values(d)[:2], strict=True):
        assert torch.equal(a, b)
