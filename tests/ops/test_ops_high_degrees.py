"""The convolution above degree 4, which goes through tables: against its definition."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from mlip.ops import ConvolutionSignature, backend, neighborhood, sum_messages
from mlip.ops.cpu import threads
from mlip.ops.cpu.library import packed_convolution, packed_convolution_backward
from mlip.ops.cpu.program import program
from mlip.ops.cpu.table_plan import WIDTHS, cuts, order
from tests.ops.test_ops_cpu_convolution import (
    DOUBLE,
    ROWS,
    Case,
    derivatives,
    equals_the_definition,
    packed,
)

ALL = ConvolutionSignature((3, 1, 2, 2, 1, 2, 3), 6, tuple(range(7)), True)
SIGNATURES = {
    "to 6, natural parity": ALL,
    "to 5, all parities": ConvolutionSignature((2, 1, 1, 1, 1, 9), 5, (0, 1, 2, 3, 4, 5), False),
    "gaps": ConvolutionSignature((8, 0, 8, 0, 0, 3, 16), 6, (0, 2, 5, 6), True),
    "scalars in": ConvolutionSignature((16,), 6, (0, 6), True),
    "high harmonics, low degrees out": ConvolutionSignature((1, 0, 0, 0, 4), 6, (0, 1, 2), False),
    "harmonics that no product needs": ConvolutionSignature((4, 4, 2), 6, (0, 1), False),
    "degree 8, low harmonics": ConvolutionSignature((0,) * 8 + (2,), 2, (7, 8), False),
}
FEW = ConvolutionSignature((1, 0, 0, 0, 0, 1), 1, (5, 6), False)
RADIAL = pytest.mark.parametrize("radial", [False, True], ids=["weights", "radial"])


@RADIAL
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SIGNATURES)
def test_values_and_two_derivatives_equal_the_definition(name, rows, radial):
    counts = [0, 70, 1] if rows == "huge" else ROWS[rows]
    case = Case(SIGNATURES[name], counts, n_radial=3)
    equals_the_definition(case, case.inputs(DOUBLE, radial))


@RADIAL
def test_float32_is_as_accurate_as_the_definition(radial):
    """At most twice the error of the definition in the same precision."""
    case = Case(SIGNATURES["gaps"], [40] * 20, n_radial=8)
    truth = derivatives(case.definition, case.inputs(DOUBLE, radial))
    single = case.inputs(torch.float32, radial)
    plain = derivatives(case.definition, single)
    fast = derivatives(case.kernels, single)

    def error(x: Tensor, true: Tensor) -> float:
        return float(torch.linalg.vector_norm(x - true) / torch.linalg.vector_norm(true))

    errors = [
        (error(a, t), error(b, t))
        for a, b, t in zip(fast, plain, truth, strict=True)
        if t.any()
    ]  # fmt: skip
    assert [(a, b) for a, b in errors if a > 2 * b + 1e-8] == []


@RADIAL
def test_finite_differences(radial):
    case = Case(FEW, [2, 0, 1], n_radial=2)
    inputs = [tensor for tensor in case.inputs(DOUBLE, radial) if tensor.numel()]
    empty = [(i, t) for i, t in enumerate(case.inputs(DOUBLE, radial)) if not t.numel()]

    def function(*inputs: Tensor) -> Tensor:
        given = list(inputs)
        for i, tensor in empty:
            given.insert(i, tensor)
        return case.kernels(*given)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@RADIAL
def test_operators_follow_the_rules_of_torch(radial):
    signature = ConvolutionSignature((8, 0, 0, 0, 0, 8), 1, (0, 5), True)
    arguments = packed(Case(signature, [2, 0, 3], n_radial=2), radial)
    torch.library.opcheck(packed_convolution, arguments)
    gradient = torch.ones_like(packed_convolution(*arguments)).requires_grad_(True)
    arguments = [*arguments[:4], gradient, *arguments[4:], [True, True, True, radial]]
    torch.library.opcheck(packed_convolution_backward, arguments)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["features", "edges"])
def test_one_kind_of_gradient_alone(wanted):
    case = Case(SIGNATURES["gaps"], ROWS["ragged"])
    inputs = case.inputs(DOUBLE, False)
    own = inputs[: len(case.features)] if wanted[0] else inputs[len(case.features) :]
    for tensor in inputs:
        tensor.requires_grad_(any(tensor is other for other in own))
    found, truth = (
        torch.autograd.grad(function(*inputs).square().sum(), own, materialize_grads=True)
        for function in (case.kernels, case.definition)
    )
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_results_do_not_depend_on_threads_or_on_the_run(monkeypatch):
    """Large enough for several chunks; compared bit for bit."""
    signature = ConvolutionSignature((16, 0, 0, 0, 0, 16), 1, (5,), True)
    case = Case(signature, [60] * 300, n_radial=4)
    inputs = case.inputs(torch.float32, True)
    results = []
    for n in (1, 2, 2):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        results.append(derivatives(case.kernels, inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_number_leaves_its_atom():
    """Tiles of few edges leave lanes of the one before, here not numbers, without effect."""
    case = Case(SIGNATURES["gaps"], [16, 3, 1])
    inputs = case.inputs(DOUBLE, False)
    n = len(case.features)
    with torch.no_grad():
        inputs[n][:16] = torch.nan
    out = case.kernels(*inputs)
    sums = [part.view(case.n_nodes, -1) for part in split(case, out)]
    assert all(part[0].isnan().all() and not part[1:].isnan().any() for part in sums)
    energy = torch.stack([part[1:].square().sum() for part in sums]).sum()
    harmonics, weights = torch.autograd.grad(energy, inputs[n : n + 2])
    assert not harmonics[16:].isnan().any()
    assert not weights[16:].isnan().any()


def split(case: Case, out: Tensor) -> list[Tensor]:
    """One part for each degree that is there."""
    sizes = [
        case.n_nodes * (2 * degree + 1) * n
        for degree, n in enumerate(case.signature.out_channels)
    ]  # fmt: skip
    return [part for part in out.split(sizes) if part.numel()]


def test_one_module_serves_all_sets_of_paths():
    first, second = (
        program(SIGNATURES[name].paths, SIGNATURES[name].lmax_edge, "float64", False)
        for name in ("gaps", "degree 8, low harmonics")
    )
    assert first.code is second.code
    low = ConvolutionSignature((8, 8), 1, (0, 1), True)
    assert not program(low.paths, 1, "float64", False).tables


def test_panels_have_the_widths_that_code_is_written_for():
    for degree in range(30):
        rows = [range(low, high) for low, high in cuts(2 * degree + 1)]
        assert [row for part in rows for row in part] == list(range(2 * degree + 1))
        assert {len(part) for part in rows} <= set(WIDTHS)
        assert sorted(order(degree)) == list(range(2 * degree + 1))


def test_auto_takes_the_kernel_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_refused", {})
    case = Case(SIGNATURES["gaps"], ROWS["ragged"])
    *features, harmonics, basis, kernel = case.inputs(torch.float32, True)
    edges = neighborhood(torch.stack([case.source, case.target]), case.n_nodes)
    with caplog.at_level(logging.INFO, logger="mlip"):
        for name in ("auto", "numba"):
            sum_messages(SIGNATURES["gaps"], tuple(features), harmonics, basis, kernel, edges, name)
    (record,) = caplog.records
    assert "CPU kernel, relative error" in record.getMessage()
