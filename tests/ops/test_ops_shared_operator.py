"""One matrix an edge for all channels: CPU kernels against loops and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import operator_apply, operator_gather, operator_scatter, shared_operator
from mlip.ops.cpu import shared_operator as cpu
from mlip.ops.cpu import threads
from mlip.ops.cpu.shared_operator import apply_op, gather_op, scatter_op, slopes_op
from mlip.ops.shared_operator import add_to_ends, operator_slopes

DOUBLE = torch.float64
SHAPES = [(4, 4), (9, 9), (16, 16), (25, 25), (9, 4), (1, 16)]


class Case:
    """Random inputs: ends of an edge may be one atom, atoms may have no edge."""

    def __init__(
        self,
        rows: int = 9,
        columns: int = 4,
        n_ends: int = 2,
        n_edges: int = 7,
        channels: int = 8,
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)

        self.n_atoms = 4
        self.matrix = randn(n_edges, rows, columns)
        self.weights = randn(n_edges, channels)
        self.x = randn(self.n_atoms, columns, channels)
        self.y = randn(n_edges, rows, channels)
        self.ends = torch.randint(0, self.n_atoms - 1, (n_ends, n_edges), generator=generator)

    def gathered(self, x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
        """Evaluate the definition of the module, one edge and one row after another."""
        edges = []
        for e, own in enumerate(matrix):
            rows = [sum(row @ x[end] for end in self.ends[:, e]) * weights[e] for row in own]
            edges.append(torch.stack(rows))
        return torch.stack(edges)

    def form(self, x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
        """The four-linear form, whose derivatives are the operators."""
        return (self.gathered(x, matrix, weights) * self.y).sum()

    def slopes(self) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (self.x, self.matrix, self.weights)]
        return torch.autograd.grad(self.form(*leaves), leaves)


@pytest.mark.parametrize("n_ends", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_operators_are_derivatives_of_the_form(monkeypatch, shape, n_ends, backend):
    monkeypatch.setenv("MLIP_BACKEND", backend)
    case = Case(*shape, n_ends)
    found = operator_gather(case.x, case.matrix, case.weights, case.ends)
    expected = case.gathered(case.x, case.matrix, case.weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    of_x, of_matrix, of_weights = case.slopes()
    back = operator_scatter(case.y, case.matrix.mT, case.weights, case.ends, case.n_atoms)
    torch.testing.assert_close(back, of_x, rtol=0, atol=1e-12)
    assert not back[-1].any()
    added = torch.ones_like(case.x)
    add_to_ends(added, case.y, case.matrix.mT, case.weights, case.ends)
    torch.testing.assert_close(added - 1, of_x, rtol=0, atol=1e-12)
    slopes = operator_slopes(case.x, case.y, case.matrix, case.weights, case.ends)
    torch.testing.assert_close(slopes[0], of_matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes[1], of_weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 20, 41])
def test_any_number_of_channels(channels, transposed, dtype):
    """With and without a whole vector; nothing is read or written behind the last channel."""
    exact = Case(9, 4, channels=channels)
    case = Case(9, 4, channels=channels, dtype=dtype)
    matrix = case.matrix.mT.contiguous().mT if transposed else case.matrix
    of_x, of_matrix, of_weights = exact.slopes()
    truth = [
        exact.gathered(exact.x, exact.matrix, exact.weights),
        of_x,
        of_matrix.mT if transposed else of_matrix,
        of_weights,
    ]
    places = []
    for tensor in truth:
        whole = torch.zeros(tensor.numel() + 32, dtype=dtype)
        places.append((whole[:-32].view(tensor.shape), whole[-32:]))
    there, back, *slopes = [found for found, _ in places]
    call = cpu._Call(case.x, there, matrix, case.weights, case.ends)
    call.run(call.module.gather, call.n_edges, 1, call.whole)
    cpu.scatter_add(back, case.y, matrix.mT, case.weights, case.ends)
    call = cpu._Call(case.x, case.y, matrix, case.weights, case.ends)
    call.run(call.module.slopes, call.n_edges, 1, *(part.numpy().reshape(-1) for part in slopes))
    tolerance = 1e-12 if dtype == DOUBLE else 1e-4
    for found, known in zip((there, back, *slopes), truth, strict=True):
        torch.testing.assert_close(found.double(), known, rtol=tolerance, atol=tolerance)
    assert not any(behind.any() for _, behind in places)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_features_of_edges_are_multiplied_one_by_one(monkeypatch, shape, backend):
    """The same form with an atom of its own for every edge: values and all first derivatives."""
    monkeypatch.setenv("MLIP_BACKEND", backend)
    case = Case(*shape, n_ends=1, n_edges=5)
    case.ends = torch.arange(5)[None]
    case.x = torch.linspace(-3, 4, 5 * shape[1] * 8, dtype=DOUBLE).sin().view(5, shape[1], 8)
    inputs = [t.clone().requires_grad_() for t in (case.x, case.matrix, case.weights)]
    found = operator_apply(*inputs)
    expected = case.gathered(case.x, case.matrix, case.weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slopes = torch.autograd.grad(found, inputs, case.y)
    for ours, theirs in zip(slopes, case.slopes(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def composed(case: Case, x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
    """There, something nonlinear, and back, so that second derivatives are not zero."""
    there = gather_op(x, matrix, weights, case.ends)
    bent = there + there**2 / 4
    return scatter_op(bent, matrix.mT, weights, case.ends, case.n_atoms)


def test_finite_differences():
    case = Case(4, 3, n_edges=2)
    inputs = [t.detach().requires_grad_() for t in (case.x, case.matrix, case.weights)]

    def function(*inputs: Tensor) -> Tensor:
        return composed(case, *inputs)

    def of_edges(x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
        return apply_op(apply_op(x, matrix, weights).square(), matrix.mT, weights)

    edges = [case.x[:2].detach().requires_grad_(), *inputs[1:]]
    for checked, at in ((function, inputs), (of_edges, edges)):
        assert torch.autograd.gradcheck(checked, at, fast_mode=True)
        assert torch.autograd.gradgradcheck(checked, at, fast_mode=True)


def test_operators_follow_the_rules_of_torch():
    case = Case()
    x, y, matrix, weights = (
        t.detach().requires_grad_() for t in (case.x, case.y, case.matrix, case.weights)
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(apply_op, (x[:1].expand(7, -1, -1), matrix, weights), test_utils=tests)
    torch.library.opcheck(gather_op, (x, matrix, weights, case.ends), test_utils=tests)
    arguments = (y, matrix.mT, weights, case.ends, case.n_atoms)
    torch.library.opcheck(scatter_op, arguments, test_utils=tests)
    torch.library.opcheck(slopes_op, (x, y, matrix, weights, case.ends), test_utils=tests)


def test_float32_is_as_accurate_as_the_definition():
    case = Case(16, 16, n_edges=40, channels=32)
    single = [t.float() for t in (case.x, case.y, case.matrix, case.weights)]
    x, y, matrix, weights = single
    exact = (
        operator_gather(case.x, case.matrix, case.weights, case.ends, "torch"),
        *case.slopes(),
    )

    def errors(backend: str) -> list[float]:
        found = (
            operator_gather(x, matrix, weights, case.ends, backend),
            operator_scatter(y, matrix.mT, weights, case.ends, case.n_atoms, backend),
            *(
                slopes_op(x, y, matrix, weights, case.ends)
                if backend == "numba"
                else operator_slopes(x, y, matrix, weights, case.ends)
            ),
        )
        return [float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)]

    for kernel, plain in zip(errors("numba"), errors("torch"), strict=True):
        assert 0 < kernel <= 2 * plain


@pytest.mark.parametrize("channels", [64, 72])
def test_results_depend_neither_on_threads_nor_on_how_they_are_written(monkeypatch, channels):
    case = Case(16, 16, n_edges=300, channels=channels, dtype=torch.float32)
    inputs = (case.matrix, case.weights, case.ends)

    def run(n_threads: int, cache: int) -> list[Tensor]:
        monkeypatch.setattr(threads, "available_threads", lambda: n_threads)
        monkeypatch.setattr(cpu, "CACHE", cache)
        there = gather_op(case.x, *inputs)
        back = scatter_op(there, *inputs, case.n_atoms)
        return [there, back, *slopes_op(case.x, case.y, *inputs)]

    first = run(1, 2**40)
    for n_threads, cache in ((2, 2**40), (5, 2**40), (1, 0), (3, 0)):
        found = run(n_threads, cache)
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_views_are_inputs_like_any_other():
    case = Case(9, 9, n_edges=9)
    wide = torch.cat([case.x, case.x], dim=2)[:, :, 8:]
    whole = torch.cat([case.matrix, case.matrix], dim=2)
    weights = case.weights[:1].expand(9, -1)
    ends = case.ends.T.contiguous().T
    for matrix in (case.matrix, case.matrix.mT.contiguous().mT, whole[:, :, 9:]):
        found = gather_op(wide, matrix, weights, ends)
        expected = operator_gather(case.x, case.matrix, weights, case.ends, "torch")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        slope = slopes_op(wide, case.y, matrix, case.weights, ends)[0]
        torch.testing.assert_close(slope, case.slopes()[1], rtol=0, atol=1e-12)


def test_no_edges_are_no_case_for_a_kernel():
    case = Case(n_edges=0)
    inputs = (case.matrix, case.weights, case.ends)
    assert operator_gather(case.x, *inputs).shape == (0, 9, 8)
    back = operator_scatter(case.y, case.matrix.mT, *inputs[1:], case.n_atoms)
    assert back.shape == case.x.shape
    assert not back.any()
    assert gather_op(case.x, *inputs).shape == (0, 9, 8)
    assert operator_apply(case.x[:0], *inputs[:2]).shape == (0, 9, 8)


def test_what_does_not_fit_is_an_error_not_a_crash():
    case = Case()
    lost = case.ends.clone()
    lost[1, 3] = case.n_atoms
    for wrong, word in (
        ((case.x, case.matrix, case.weights, lost), "ends"),
        ((case.x, case.matrix[:-1], case.weights, case.ends), "operator"),
        ((case.x[:, :-1], case.matrix, case.weights, case.ends), "x"),
        ((case.x.float(), case.matrix, case.weights, case.ends), "precision"),
        ((case.x, case.matrix, case.weights, case.ends.int()), "index type"),
    ):
        with pytest.raises(InputError, match=f"(: |, ){word}"):
            gather_op(*wrong)
    with pytest.raises(InputError, match="ends do not fit"):
        apply_op(case.x, case.matrix, case.weights)


def test_high_degrees_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(shared_operator, "MOST_COEFFICIENTS", 8)
    case = Case()
    with pytest.raises(InputError, match="9 coefficients are more than 8"):
        operator_gather(case.x, case.matrix, case.weights, case.ends, "numba")
    operator_gather(case.x, case.matrix, case.weights, case.ends)


def test_torch_compile_sees_one_operator():
    case = Case()
    inputs = [t.detach().requires_grad_() for t in (case.x, case.matrix, case.weights)]

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
