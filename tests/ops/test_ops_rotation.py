"""Rotation into the frames of edges: CPU kernels against loops and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.nn.edge_frames import EdgeFrameBuilder
from mlip.ops import RotationSignature, rotate_gather, rotate_scatter
from mlip.ops.cpu import threads
from mlip.ops.cpu.rotation import _Call, gather_op, scatter_add, scatter_op, slopes_add, slopes_op
from mlip.ops.rotation import add_slopes, add_to_ends
from mlip.so3 import degree_major, order_major

DOUBLE = torch.float64
SIGNATURES = [RotationSignature(*degrees) for degrees in ((2, 2), (4, 2), (3, 0), (6, 2))]
FORMS = list(itertools.product((1, 2), (True, False)))


class Case:
    """Random inputs: ends of an edge may be one atom, atoms may have no edge."""

    def __init__(
        self,
        signature: RotationSignature,
        n_ends: int = 2,
        by_degree: bool = True,
        n_edges: int = 7,
        channels: int = 8,
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)

        self.signature, self.n_atoms, self.n_ends = signature, 4, n_ends
        builder = EdgeFrameBuilder(signature.lmax, signature.mmax)
        self.matrix = builder(randn(n_edges, 3)).matrix
        self.x = randn(self.n_atoms, signature.n_coefficients, channels)
        rows = signature.lmax + 1 if by_degree else 1
        self.scale = randn(n_edges, rows, n_ends * channels)
        self.ends = torch.randint(0, self.n_atoms - 1, (n_ends, n_edges), generator=generator)
        self.orders = tuple(randn(n_edges, n, n_ends * channels) for n in signature.sizes)
        of_column = [degree for degree, _ in degree_major(signature.lmax, signature.lmax)]
        self.within = torch.tensor(signature.degrees)[:, None] == torch.tensor(of_column)

    def gathered(self, x: Tensor, matrix: Tensor, scale: Tensor) -> list[Tensor]:
        """Evaluate the definition of the module, one edge and one row after another."""
        edges = []
        for e in range(len(matrix)):
            rows = []
            for row, (degree, _) in enumerate(
                order_major(self.signature.lmax, self.signature.mmax)
            ):
                ends = [matrix[e, row] @ x[self.ends[p, e]] for p in range(self.n_ends)]
                rows.append(torch.cat(ends) * scale[e, degree if scale.shape[1] > 1 else 0])
            edges.append(torch.stack(rows))
        return list(torch.stack(edges).split(self.signature.sizes, dim=1))

    def form(self, x: Tensor, matrix: Tensor, scale: Tensor, orders: list[Tensor]) -> Tensor:
        """The four-linear form, whose derivatives are the operators."""
        pairs = zip(self.gathered(x, matrix, scale), orders, strict=True)
        return torch.stack([(a * b).sum() for a, b in pairs]).sum()


@pytest.mark.parametrize(("n_ends", "by_degree"), FORMS)
@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_both_operators_are_derivatives_of_the_form(signature, n_ends, by_degree, backend):
    case = Case(signature, n_ends, by_degree)
    found = rotate_gather(signature, case.x, case.matrix, case.scale, case.ends, backend)
    expected = case.gathered(case.x, case.matrix, case.scale)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    leaves = [t.clone().requires_grad_() for t in (case.x, case.matrix, case.scale)]
    slopes = torch.autograd.grad(case.form(*leaves, case.orders), leaves)
    back = rotate_scatter(
        signature, case.orders, case.matrix, case.scale, case.ends, case.n_atoms, backend
    )
    torch.testing.assert_close(back, slopes[0], rtol=0, atol=1e-12)
    assert not back[-1].any()


@pytest.mark.parametrize(("n_ends", "by_degree"), FORMS)
@pytest.mark.parametrize("variable", ["torch", "auto"])
def test_slopes_and_sums_are_added(monkeypatch, n_ends, by_degree, variable):
    monkeypatch.setenv("MLIP_BACKEND", variable)
    case = Case(RotationSignature(4, 2), n_ends, by_degree)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.matrix, case.scale)]
    expected = torch.autograd.grad(case.form(*leaves, case.orders), leaves)
    found = [torch.ones_like(tensor) for tensor in leaves]
    inputs = (case.matrix, case.scale, case.ends)
    add_to_ends(case.signature, found[0], case.orders, *inputs)
    add_slopes(case.signature, case.x, case.orders, *inputs, found[1], found[2])
    for i in (0, 2):
        torch.testing.assert_close(found[i] - 1, expected[i], rtol=0, atol=1e-12)
    difference = (found[1] - 1 - expected[1]) * case.within
    assert difference.abs().max() < 1e-12


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros, and the numbers behind them in memory."""
    size = torch.Size(shape).numel()
    whole = torch.zeros(size + 32, dtype=dtype)
    return whole[:size].view(shape), whole[size:]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(("n_ends", "by_degree"), FORMS)
@pytest.mark.parametrize("channels", [1, 7, 20, 41])
def test_any_number_of_channels(channels, n_ends, by_degree, dtype):
    """With and without a whole vector; nothing is read or written behind the last channel."""
    signature = RotationSignature(3, 2)
    exact = Case(signature, n_ends, by_degree, channels=channels)
    case = Case(signature, n_ends, by_degree, channels=channels, dtype=dtype)
    case.matrix = case.matrix.to(dtype)
    leaves = [t.clone().requires_grad_() for t in (exact.x, exact.matrix, exact.scale)]
    expected = torch.autograd.grad(exact.form(*leaves, exact.orders), leaves)

    inputs = (case.matrix, case.scale, case.ends)
    places = [guarded(tuple(part.shape), dtype) for part in (*case.orders, *leaves)]
    *there, of_x, of_matrix, of_scale = [found for found, _ in places]
    call = _Call(signature, case.x, there, *inputs)
    call.run(call.module.gather, call.n_edges, 1)
    scatter_add(signature, of_x, case.orders, *inputs)
    slopes_add(signature, case.x, case.orders, *inputs, of_matrix, of_scale)

    known = [*exact.gathered(exact.x, exact.matrix, exact.scale), *expected]
    known[-2] = known[-2] * case.within
    tolerance = 1e-12 if dtype == DOUBLE else 1e-4
    for found, truth in zip((*there, of_x, of_matrix, of_scale), known, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
    assert not any(behind.any() for _, behind in places)


def composed(case: Case, x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """There, something nonlinear, and back, so that second derivatives are not zero."""
    matrix = matrix * case.within
    there = gather_op(x, matrix, scale, case.ends, case.signature.lmax, case.signature.mmax)
    bent = [part + part**2 / 4 for part in there]
    return scatter_op(
        bent, matrix, scale, case.ends, case.n_atoms, case.signature.lmax, case.signature.mmax
    )


@pytest.mark.parametrize(("by_degree", "channels"), [(True, 8), (False, 8), (True, 11)])
def test_finite_differences(by_degree, channels):
    case = Case(RotationSignature(1, 1), 2, by_degree, n_edges=2, channels=channels)
    inputs = [t.detach().requires_grad_() for t in (case.x, case.matrix, case.scale)]

    def function(*inputs: Tensor) -> Tensor:
        return composed(case, *inputs).sum((0, 2))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_operators_follow_the_rules_of_torch():
    case = Case(RotationSignature(2, 1))
    x, matrix, scale = (t.detach().requires_grad_() for t in (case.x, case.matrix, case.scale))
    orders = [part.detach().requires_grad_() for part in case.orders]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gather_op, (x, matrix, scale, case.ends, 2, 1), test_utils=tests)
    torch.library.opcheck(
        scatter_op, (orders, matrix, scale, case.ends, case.n_atoms, 2, 1), test_utils=tests
    )
    torch.library.opcheck(slopes_op, (x, orders, matrix, scale, case.ends, 2, 1), test_utils=tests)


@pytest.mark.parametrize("n_ends", [1, 2])
def test_float32_is_as_accurate_as_the_definition(n_ends):
    case = Case(RotationSignature(4, 2), n_ends, n_edges=40, channels=16)
    single = [t.float() for t in (case.x, case.matrix, case.scale)]
    signature, ends = case.signature, case.ends

    def errors(backend: str) -> tuple[float, float]:
        there = rotate_gather(signature, *single, ends, backend)
        back = rotate_scatter(signature, there, *single[1:], ends, case.n_atoms, backend)
        exact = rotate_gather(signature, case.x, case.matrix, case.scale, ends, "torch")
        home = rotate_scatter(
            signature, exact, case.matrix, case.scale, ends, case.n_atoms, "torch"
        )
        first = torch.cat(there, dim=1).double() - torch.cat(exact, dim=1)
        return float(first.norm()), float((back.double() - home).norm())

    for kernel, plain in zip(errors("numba"), errors("torch"), strict=True):
        assert kernel <= 2 * plain


@pytest.mark.parametrize("channels", [64, 72])
def test_results_do_not_depend_on_threads(monkeypatch, channels):
    case = Case(RotationSignature(4, 2), n_edges=300, channels=channels, dtype=torch.float32)
    inputs = (case.matrix, case.scale, case.ends)

    def run(n_threads: int) -> list[Tensor]:
        monkeypatch.setattr(threads, "available_threads", lambda: n_threads)
        there = gather_op(case.x, *inputs, 4, 2)
        back = scatter_op(there, *inputs, case.n_atoms, 4, 2)
        return [*there, back, *slopes_op(case.x, list(case.orders), *inputs, 4, 2)]

    first = run(1)
    for n_threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(n_threads), strict=True))


def test_views_are_inputs_like_any_other():
    case = Case(RotationSignature(3, 1), n_edges=9)
    wide = torch.cat([case.x, case.x], dim=2)[:, :, 8:]
    matrix = case.matrix.mT.contiguous().mT
    scale = case.scale[:1].expand(9, -1, -1)
    ends = case.ends.T.contiguous().T
    found = rotate_gather(case.signature, wide, matrix, scale, ends, "numba")
    expected = rotate_gather(case.signature, case.x, case.matrix, scale, case.ends, "torch")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_edges_are_no_case_for_a_kernel():
    case = Case(RotationSignature(2, 1), n_edges=0)
    inputs = (case.matrix, case.scale, case.ends)
    there = rotate_gather(case.signature, case.x, *inputs)
    assert [part.shape for part in there] == [(0, n, 16) for n in case.signature.sizes]
    back = rotate_scatter(case.signature, there, *inputs, case.n_atoms)
    assert back.shape == case.x.shape
    assert not back.any()


def test_what_does_not_fit_is_an_error_not_a_crash():
    case = Case(RotationSignature(2, 1))
    lost = case.ends.clone()
    lost[1, 3] = case.n_atoms
    for wrong, word in (
        ((case.x, case.matrix, case.scale, lost), "ends"),
        ((case.x, case.matrix[:, :-1], case.scale, case.ends), "matrix"),
        ((case.x, case.matrix, case.scale[:, :2], case.ends), "scale"),
        ((case.x[:, :-1], case.matrix, case.scale, case.ends), "x"),
        ((case.x.float(), case.matrix, case.scale, case.ends), "precision"),
        ((case.x, case.matrix, case.scale, case.ends.int()), "index type"),
    ):
        with pytest.raises(InputError, match=f"(: |, ){word}"):
            gather_op(*wrong, 2, 1)


def test_torch_compile_sees_one_operator():
    case = Case(RotationSignature(2, 1))
    inputs = [t.detach().requires_grad_() for t in (case.x, case.matrix, case.scale)]

    def function(*inputs: Tensor) -> Tensor:
        return composed(case, *inputs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs).square().sum(), inputs),
        torch.autograd.grad(function(*inputs).square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
