"""CUDA kernels of gated products on the sphere, run by the host shim, against the plain grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlip.nn.sphere_product import SphereBasis, gated_product, sphere_tables
from mlip.ops import backend
from mlip.ops import gated_product as operator
from mlip.ops.cuda.gated_product import GridKernels
from mlip.ops.cuda.program import Program
from mlip.ops.sphere_tables import block_sizes
from tests.ops.host_cuda import guarded, needs_compiler, same_bits

DOUBLE = torch.float64
BASES = [
    SphereBasis(2, 1, in_frame=True),
    SphereBasis(3, 2, in_frame=True),
    SphereBasis(2, 2, in_frame=False),
    SphereBasis(3, 0, in_frame=True),
    SphereBasis(2, 2, in_frame=True, points=(6, 5)),  # too coarse for exact products
]


class Case:
    """Random functions; what lies outside of them is NaN, as are the numbers before them."""

    def __init__(
        self,
        basis: SphereBasis,
        n_rows: int = 3,
        width: int = 5,
        extra: int = 7,
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=DOUBLE)
            return guarded(numbers.to(dtype))[1]

        sizes = block_sizes(*basis[:3])
        self.basis, self.extra, self.gate = basis, extra, randn(n_rows, width)
        more = [extra, *(0 for _ in sizes[1:])]
        self.hidden = [randn(n_rows, m + 2 * width * n) for n, m in zip(sizes, more, strict=True)]
        self.hidden[0][:, :extra] = torch.nan
        self.gradients = [randn(n_rows, n, width) for n in sizes]

    def truth(self, dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
        """The definition on the whole grid, and its gradients by autograd."""
        gate, *hidden = leaves = [t.to(dtype).requires_grad_() for t in (self.gate, *self.hidden)]
        out = gated_product(self.basis, hidden, self.extra, gate, "torch")
        slopes = torch.autograd.grad(out, leaves, [part.to(dtype) for part in self.gradients])
        return _named([part.detach() for part in out], slopes)

    def kernels(self) -> dict[str, Tensor]:
        """The same by the kernels."""
        kernels = GridKernels(*self.basis[:3], sphere_tables(self.basis), self.gate)
        tensors = (self.extra, self.gate, self.hidden)
        return _named(kernels.product(*tensors), kernels.slopes(*tensors, self.gradients))


def _named(out, slopes) -> dict[str, Tensor]:
    products = {f"product {i}": part for i, part in enumerate(out)}
    return {**products, **{f"slope {i}": part for i, part in enumerate(slopes)}}


@needs_compiler
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("n_rows", "width", "extra"), [(3, 5, 7), (2, 67, 0), (1, 1, 1)])
def test_values_and_gradients_equal_the_definition(on_host, basis, n_rows, width, extra):
    on_host()
    case = Case(basis, n_rows, width, extra)
    found, truth = case.kernels(), case.truth()
    assert set(found) == set(truth)
    for name, part in truth.items():
        size = float(part.abs().max())
        torch.testing.assert_close(found[name], part, rtol=0, atol=1e-12 * size)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("basis", [SphereBasis(4, 2, True), SphereBasis(4, 4, False)])
def test_published_degrees_as_accurate_as_the_definition_and_the_same_bits(on_host, basis, dtype):
    """In float32; threads run in several orders, and results must not know."""
    case = Case(basis, n_rows=7, width=24, dtype=dtype)
    assert same_bits(on_host, case.kernels)
    found, truth, plain = case.kernels(), case.truth(), case.truth(dtype)
    for name, exact in truth.items():
        error = (found[name].double() - exact).norm() / exact.norm()
        allowed = (plain[name].double() - exact).norm() / exact.norm()
        assert error <= 2 * allowed + (1e-14 if dtype == DOUBLE else 0)


@needs_compiler
@pytest.mark.parametrize("basis", BASES[:3])
def test_derivatives_by_finite_differences(on_host, monkeypatch, basis):
    on_host()
    monkeypatch.setattr(operator, "_kernels", lambda gate: GridKernels)  # noqa: ARG005
    case = Case(basis, n_rows=2, width=2, extra=0)
    leaves = [tensor.requires_grad_() for tensor in (case.gate, *case.hidden)]

    def product(gate: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        return operator.gated_product(*basis[:3], sphere_tables(basis), 0, gate, hidden)

    assert torch.autograd.gradcheck(product, leaves, fast_mode=True)


@needs_compiler
def test_views_and_no_rows(on_host):
    on_host()
    case = Case(BASES[0], n_rows=4, width=3)
    truth = case.truth()
    case.gate = torch.cat([case.gate, case.gate], dim=1)[:, 3:]
    case.hidden = [tensor.T.contiguous().T for tensor in case.hidden]
    case.gradients = [torch.stack([tensor, tensor], dim=3)[..., 1] for tensor in case.gradients]
    for name, part in case.kernels().items():
        torch.testing.assert_close(part, truth[name], rtol=0, atol=1e-12)
    found = Case(BASES[0], n_rows=0, width=3).kernels()
    assert [len(part) for part in found.values()] == [0] * 7


def test_tensors_on_a_gpu_go_to_the_kernels(monkeypatch):
    """Any width and every grid; with tensors that have a device but no numbers."""
    launched: list[str] = []

    class Recorder:
        def launch(self, kernel: str, *arguments) -> None:  # noqa: ARG002
            launched.append(kernel)

    monkeypatch.setattr(backend, "cuda_missing", lambda: None)
    monkeypatch.setattr(Program, "_module", lambda self, device: Recorder())  # noqa: ARG005
    for basis in BASES:
        tables = sphere_tables(basis)()
        monkeypatch.setattr("mlip.nn.sphere_product.factorise", lambda *_, found=tables: found)
        with FakeTensorMode():
            sizes = block_sizes(*basis[:3])
            gate = torch.empty(4, 5, device="cuda")
            hidden = [torch.empty(4, 10 * n, device="cuda") for n in sizes]
            out = gated_product(basis, hidden, 0, gate, "cuda")
            assert [tuple(part.shape) for part in out] == [(4, n, 5) for n in sizes]
    assert launched == ["gated_product<float>"] * len(BASES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("basis", [SphereBasis(6, 2, True), SphereBasis(6, 6, False)])
def test_on_a_gpu(basis, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = Case(basis, n_rows=300, width=33, dtype=dtype)
    truth, plain = case.truth(), case.truth(dtype)
    case.gate = case.gate.cuda()
    case.hidden = [tensor.cuda() for tensor in case.hidden]
    case.gradients = [tensor.cuda() for tensor in case.gradients]
    found, again = case.kernels(), case.kernels()
    for name, exact in truth.items():
        assert torch.equal(found[name], again[name])
        error = (found[name].cpu().double() - exact).norm()
        assert error <= 2 * (plain[name].double() - exact).norm() + 1e-14 * exact.norm()
