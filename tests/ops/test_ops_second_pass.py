"""The CPU pass for second derivatives: against the definition, and where other code runs."""

from __future__ import annotations

import logging
import tracemalloc
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import ConvolutionSignature, backend
from mlip.ops.cpu import double_backward, program, second_runner, threads
from mlip.ops.cpu.convolution import kernel_convolution
from mlip.ops.cpu.double_backward import one_pass, packed_double_backward, sum_of_passes
from mlip.ops.cpu.library import layout
from mlip.ops.cpu.program import Asked
from mlip.ops.cpu.second_text import source_text
from tests.ops.test_ops_cuda_convolution import Case, relative
from tests.ops.test_ops_double_backward import ALL, probes, second, truth

ODD = ConvolutionSignature((16, 48, 16), 2, (0, 1, 2), natural_parity=True)
EVERY = ConvolutionSignature((16, 32), 2, (0, 1, 2))  # of both parities
THIRD = ConvolutionSignature((0, 16, 0, 16), 3, (0, 2, 3), natural_parity=True)
FOURTH = ConvolutionSignature((16, 0, 0, 0, 16), 4, (0, 4), natural_parity=True)
FIFTH = ConvolutionSignature((16, 16), 5, (0, 5), natural_parity=True)
SMALL = ConvolutionSignature((16, 16), 1, (0, 1), natural_parity=True)
TOLERANCE = {torch.float32: 4e-7, torch.float64: 1e-15}


@pytest.fixture
def calls(monkeypatch):
    """Which cotangents (x, Y, b, K) each of the two ways was called with."""
    made: dict[str, list[str]] = {}
    monkeypatch.setattr(double_backward, "agrees", lambda *_: True)
    for run in (one_pass, sum_of_passes):
        made[run.__name__] = []

        def record(arguments, along, *rest, run=run):
            given = "".join(c for c, t in zip("xYbK", along, strict=False) if t is not None)
            made[run.__name__].append(given)
            return run(arguments, along, *rest)

        monkeypatch.setattr(double_backward, run.__name__, record)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("signature", "n_radial", "given"),
    [
        (ODD, 0, "xYb"), (ODD, 9, "xYb"), (ODD, 9, "Yb"), (ODD, 4, "xYbK"), (EVERY, 0, "Yb"),
        (EVERY, 3, "xYb"), (THIRD, 8, "xYb"), (FOURTH, 8, "xYb"),
    ],
)  # fmt: skip
def test_equals_the_definition(calls, signature, n_radial, given, dtype):
    case = Case(signature, dtype, n_radial)
    along = probes(case, given)
    found = second(packed_double_backward, case, along)
    for value, expected in zip(found, truth(case, along), strict=True):
        assert expected.any()
        assert relative(value, expected) < TOLERANCE[dtype]
    rest = "K" if "K" in given else ""
    assert calls == {"one_pass": [given.replace("K", "")], "sum_of_passes": [rest]}


@pytest.fixture
def no_decisions(monkeypatch):
    """Forget what was compared in this process."""
    monkeypatch.setattr(backend, "_refused", {})
    monkeypatch.setattr(backend, "_uncovered", {})


@pytest.mark.refusals
@pytest.mark.usefixtures("no_decisions")
def test_a_wrong_pass_is_not_used(monkeypatch, caplog):
    case = Case(SMALL, torch.float64, 3)
    along = probes(case, "xYb")
    right = second_runner.second_derivatives

    def wrong(*arguments):
        right(*arguments)
        arguments[-1].features[0] *= 1.01

    monkeypatch.setattr(second_runner, "second_derivatives", wrong)
    found = second(packed_double_backward, case, along)
    for value, expected in zip(found, truth(case, along), strict=True):
        assert relative(value, expected) < TOLERANCE[torch.float64]
    (record,) = caplog.records
    assert "several passes instead of the CPU kernel" in record.getMessage()
    second(packed_double_backward, case, along)
    assert len(caplog.records) == 1
    ((name, how),) = backend.decisions().items()
    assert name.startswith("second derivatives of the convolution of channels (16, 16)")
    assert how.startswith("several passes: relative difference from several passes ")


@pytest.mark.usefixtures("no_decisions")
def test_what_was_compared_is_told(caplog):
    caplog.set_level(logging.INFO, logger="mlip")
    for n_radial in (0, 3):
        case = Case(SMALL, torch.float64, n_radial)
        second(packed_double_backward, case, probes(case, "xYb"))
    assert len(backend._refused) == 2
    ((name, how),) = backend.decisions().items()
    assert name.endswith("4 paths, in one pass, float64")
    assert how == "CPU kernel, agrees with several passes"
    for record in caplog.records:
        assert "in one pass, float64: CPU kernel, relative difference from" in record.getMessage()
        assert "error" not in record.getMessage()


@pytest.mark.usefixtures("no_decisions")
def test_wrong_inputs_do_not_count_as_a_fault_of_the_pass():
    case = Case(SMALL, torch.float64, 3)
    right, case.source = case.source, case.source + len(case.rowptr)
    with pytest.raises(InputError):
        second(packed_double_backward, case, probes(case, "xYb"))
    case.source = right
    second(packed_double_backward, case, probes(case, "xYb"))
    assert list(backend._refused.values()) == [None]


@pytest.mark.parametrize("n_radial", [0, 8])
def test_float32_is_as_accurate_as_the_definition(n_radial):
    """At most twice the error of the definition in the same precision."""
    case = Case(ODD, torch.float32, n_radial)
    along = probes(case, "xYb")
    found = second(packed_double_backward, case, along)
    plain, exact = truth(case, along, torch.float32), truth(case, along)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert relative(a, c) < 2 * relative(b, c)


@pytest.mark.parametrize("n_radial", [0, 4])
def test_only_what_is_wanted(n_radial):
    """Every choice of results gives those that all together give."""
    case = Case(SMALL, torch.float64, n_radial)
    along = probes(case, "xYb")
    names = [i for i in range(5) if n_radial or i != 3]
    whole = dict(zip(names, second(packed_double_backward, case, along), strict=True))
    for choice in product([False, True], repeat=5):
        kept = [i for i in names if choice[i]]
        part = second(packed_double_backward, case, along, list(choice))
        for i, value in zip(kept, part, strict=True):
            torch.testing.assert_close(value, whole[i], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("signature", "given"), [(ODD, "x"), (ODD, "Y"), (ODD, "xb"), (ODD, "YK"), (FIFTH, "xYb")]
)
def test_elsewhere_passes_are_summed(calls, signature, given):
    case = Case(signature, torch.float64, 4)
    along = probes(case, given)
    found = second(packed_double_backward, case, along)
    for value, expected in zip(found, truth(case, along), strict=True):
        if expected.any():
            assert relative(value, expected) < 1e-14
        else:
            assert not value.any()
    assert calls == {"one_pass": [], "sum_of_passes": [given]}


@pytest.mark.parametrize("n_radial", [0, 4])
def test_threads_and_chunks_do_not_change_a_bit(monkeypatch, n_radial):
    case = Case(SMALL, torch.float32, n_radial)
    n, each = 300, 70
    generator = torch.Generator().manual_seed(0)
    case.rowptr = torch.arange(n + 1) * each
    case.source = torch.randint(0, n, (n * each,), generator=generator)
    case.features = [torch.randn(n, 2 * i + 1, 16, generator=generator) for i in range(2)]
    for name in ("harmonics", "radial"):
        width = getattr(case, name).shape[1]
        setattr(case, name, torch.randn(n * each, width, generator=generator))
    case.gradient = torch.randn(layout(case.text).out_size(n), generator=generator)
    along = probes(case, "xYb")
    results = []
    for count in (1, 2, 3, 3):
        monkeypatch.setattr(threads, "available_threads", lambda count=count: count)
        results.append(second(packed_double_backward, case, along))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)
    graph = (case.rowptr, case.source, case.text)
    needs = [t is not None for t in (*case.inputs, case.gradient)]
    doubles = [
        [None if t is None else t.double() for t in group]
        for group in ((*case.inputs, case.gradient), along)
    ]
    sums = sum_of_passes(doubles[0], doubles[1], graph, needs)
    for value, expected in zip(results[0], [t for t in sums if t is not None], strict=True):
        assert relative(value, expected) < 2e-6


def test_channels_are_padded(calls):
    """The second derivatives of features as models have them."""
    signature = replace(ODD, channels=(5, 40, 3))
    case = Case(signature, torch.float64, 4)
    x = [t.requires_grad_() for t in case.features]
    rest = [t.requires_grad_() for t in (case.harmonics, case.radial, case.kernel)]

    def kernels(x: Tensor, *rest: Tensor) -> Tensor:
        sizes = [part.numel() for part in case.features]
        parts = zip(x.split(sizes), case.features, strict=True)
        features = tuple(part.view(like.shape) for part, like in parts)
        found = kernel_convolution(signature, features, *rest, case.rowptr, case.source)
        return torch.cat([part.flatten() for part in found])

    results = []
    for function in (kernels, case.definition):
        out = function(torch.cat([t.flatten() for t in x]), *rest)
        first = torch.autograd.grad(out.square().sum(), [*x, *rest[:2]], create_graph=True)
        results.append(torch.autograd.grad(sum(t.square().sum() for t in first), [*x, *rest]))
    for value, expected in zip(*results, strict=True):
        assert relative(value, expected) < 1e-13
    assert calls["one_pass"] == ["xYb"]


def test_views_are_inputs_like_any_other():
    case = Case(SMALL, torch.float64, 4)
    along = probes(case, "xYb")
    expected = second(packed_double_backward, case, along)
    for name in ("harmonics", "radial", "kernel"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    along[1:3] = [tensor.t().contiguous().t() for tensor in along[1:3]]
    for a, b in zip(second(packed_double_backward, case, along), expected, strict=True):
        assert torch.equal(a, b)


def test_no_edges():
    case = Case(SMALL, torch.float64, 4)
    case.rowptr = torch.zeros_like(case.rowptr)
    case.source, case.harmonics, case.radial = case.source[:0], case.harmonics[:0], case.radial[:0]
    found = second(packed_double_backward, case, probes(case, "xYb"))
    assert [t.shape for t in found] == [t.shape for t in (*case.inputs, case.gradient)]
    assert not any(t.any() for t in found)


@pytest.mark.parametrize("wrong", ["source", "x", "Y", "b", "precision"])
def test_what_does_not_fit_is_an_error_not_a_crash(wrong):
    case = Case(SMALL, torch.float64, 4)
    along = probes(case, "xYb")
    if wrong == "source":
        case.source = case.source + len(case.rowptr)
    elif wrong == "precision":
        along[1] = along[1].float()
    else:
        i = "xYb".index(wrong)
        along[i] = along[i][:-1]
    with pytest.raises(InputError):
        second(packed_double_backward, case, along)


def test_first_derivatives_need_no_second_module(monkeypatch):
    """It costs seconds to compile, which inference must not pay."""
    asked: list[Asked] = []

    def record(*key):
        asked.append(key[-1])
        return program.second_module(*key)

    monkeypatch.setattr(second_runner, "second_module", record)
    case = Case(SMALL, torch.float64, 4)
    leaves = [t.requires_grad_() for t in case.inputs]
    out = double_backward.packed_convolution(*leaves, case.rowptr, case.source, case.text)
    first = torch.autograd.grad(out.square().sum(), leaves[:3], create_graph=True)
    assert asked == []
    torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
    assert set(asked) == {Asked(along=True, radial=True, harmonics=True, kernel=True, slopes=True)}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("n_radial", [0, 4])
def test_weights_that_come_from_memory_are_asked_for_in_advance(monkeypatch, n_radial, kernel):
    """Made from radial functions, frozen or not, they lie in the cache."""
    texts: list[str] = []

    def record(*key):
        texts.append(source_text(*key))
        return program.second_module(*key)

    monkeypatch.setattr(second_runner, "second_module", record)
    case = Case(SMALL, torch.float64, n_radial)
    second(packed_double_backward, case, probes(case, "xYb"), [True, True, True, kernel, True])
    assert texts
    assert {"k.prefetch(" in text for text in texts} == {n_radial == 0}


def peak_memory(case: Case, wanted: list[bool]) -> int:
    """Bytes that the pass and its results take at most."""
    arguments = (*case.inputs, case.gradient)
    tracemalloc.start()
    one_pass(arguments, probes(case, "xYb")[:3], (case.rowptr, case.source, case.text), wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def many_edges(case: Case, each: int) -> None:
    """Give every atom so many edges."""
    n = len(case.rowptr) - 1
    case.rowptr = torch.arange(n + 1) * each
    case.source = torch.arange(n * each) % n
    case.harmonics = torch.ones(n * each, 4)
    case.radial = torch.ones(n * each, case.radial.shape[1])


def test_weights_of_all_edges_are_never_stored(monkeypatch):
    """With radial functions, work space does not grow with edges times weights."""
    spaces: list[int] = []

    class Recorded:
        def __init__(self, *key):
            self.code = program.second_module(*key)

        def second_pass(self, *arguments):
            spaces.append(self.code.second_pass(*arguments).size)

    monkeypatch.setattr(second_runner, "second_module", Recorded)
    case = Case(SMALL, torch.float32, 4)
    for each in (10, 500):
        many_edges(case, each)
        peak = peak_memory(case, ALL)
    assert spaces[0] == spaces[1]
    assert peak < case.radial.shape[0] * case.signature.n_weights * 4


def test_slopes_of_given_weights_that_nobody_wants_take_no_memory():
    case = Case(SMALL, torch.float32, 0)
    many_edges(case, 10)
    wanted = [True, True, False, False, True]
    peak_memory(case, wanted)  # code is compiled or read
    many_edges(case, 500)
    assert peak_memory(case, wanted) < case.radial.nbytes / 2
