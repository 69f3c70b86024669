"""CUDA kernels of forces and virial, run on the CPU by the host shim, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import forces_and_virial
from mlip.ops.cuda import edge_gradient as cuda
from tests.ops.host_cuda import guarded, needs_compiler, same_bits, without_barrier

pytestmark = needs_compiler

DOUBLE = torch.float64
PARTS = ("forces", "virial", "of_gradient", "of_vector")


class Case:
    """Random edges in any order of atoms in any order; the last atom and structure have none."""

    def __init__(self, n_edges: int = 300, n_nodes: int = 9, dtype: torch.dtype = DOUBLE) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=DOUBLE)
            return guarded(numbers.to(dtype))[1]  # what lies outside is NaN

        self.sizes = (n_nodes, 4)
        self.index = torch.randint(0, max(1, n_nodes - 1), (2, n_edges), generator=generator)
        self.batch = torch.arange(n_nodes) % 3
        self.gradient, self.vector = randn(n_edges, 3), randn(n_edges, 3)
        self.force, self.strain = randn(n_nodes, 3), randn(4, 3, 3)

    def truth(self, dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
        """The definition, and its derivatives by autograd."""
        gradient, vector = (t.to(dtype).requires_grad_() for t in (self.gradient, self.vector))
        sums = forces_and_virial(gradient, vector, self.index, self.batch, *self.sizes, "torch")
        probes = (self.force.to(dtype), self.strain.to(dtype))
        slopes = torch.autograd.grad(sums, (gradient, vector), probes)
        return {name: t.detach() for name, t in zip(PARTS, (*sums, *slopes), strict=True)}

    def kernels(self) -> dict[str, Tensor]:
        """The same by the kernels."""
        edges = (self.gradient, self.vector, self.index, self.batch)
        found = (*cuda.cuda_sums(*edges, *self.sizes),)
        found += cuda.cuda_slopes(self.force, self.strain, *edges)
        return dict(zip(PARTS, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(("n_edges", "n_nodes"), [(300, 9), (40, 300), (1, 1), (0, 3)])
def test_as_accurate_as_the_definition_and_the_same_bits(on_host, n_edges, n_nodes, dtype):
    case = Case(n_edges, n_nodes, dtype)
    assert same_bits(on_host, case.kernels)
    found = case.kernels()
    truth, plain = case.truth(), case.truth(dtype)
    for name in PARTS:
        error = (found[name].double() - truth[name]).norm()
        allowed = (plain[name].double() - truth[name]).norm()
        assert error <= 2 * allowed + 1e-15 * truth[name].norm()
    assert not found["virial"][-1].any()


def test_what_does_not_fit_is_an_error(on_host):
    on_host()
    case = Case()
    with pytest.raises(InputError, match="edge_gradient"):
        cuda.cuda_sums(case.gradient[1:], case.vector, case.index, case.batch, *case.sizes)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(on_host, barrier):
    """A control of the test above: without a barrier it would be red."""
    case = Case(n_nodes=400)
    change = without_barrier("structure_sums", barrier)
    assert not same_bits(on_host, case.kernels, change=change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = Case(40000, 1000, dtype)
    truth, plain = case.truth(), case.truth(dtype)
    for name in ("gradient", "vector", "index", "batch", "force", "strain"):
        setattr(case, name, getattr(case, name).cuda())
    found, again = case.kernels(), case.kernels()
    for name in PARTS:
        assert torch.equal(found[name], again[name])
        error = (found[name].cpu().double() - truth[name]).norm()
        assert error <= 2 * (plain[name].double() - truth[name]).norm() + 1e-14 * truth[name].norm()
