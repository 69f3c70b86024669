"""Sums and softmax over the edges of atoms: kernels against the definitions."""

from __future__ import annotations

import pytest
import torch

from mlip.ops import edge_sum, envelope_softmax, segment_sum
from mlip.ops.backend import decisions
from mlip.ops.cpu import threads
from mlip.ops.cpu.segments import (
    csr_segment_softmax,
    csr_segment_sum,
    segment_rows,
    segment_shares,
)

DOUBLE = torch.float64
COUNTS = {"ragged": [3, 0, 40, 1, 0], "empty": [0, 0], "one": [4], "huge": [1, 20000, 0, 7]}


def graph(counts):
    counts = torch.tensor(counts)
    index = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return index, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def randn(*shape, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


@pytest.mark.parametrize("shape", [(), (5,), (3, 2)])
@pytest.mark.parametrize("rows", COUNTS)
def test_sum_equals_definition(rows, shape):
    index, rowptr = graph(COUNTS[rows])
    values = randn(len(index), *shape)
    expected = segment_sum(values, index, len(rowptr) - 1)
    torch.testing.assert_close(csr_segment_sum(values, index, rowptr), expected, atol=1e-11, rtol=0)
    for backend in ("numba", "torch", "auto"):
        found = edge_sum(values, index, len(rowptr) - 1, backend)
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("rows", COUNTS)
def test_softmax_and_its_derivatives_equal_the_definition(rows, epsilon):
    index, rowptr = graph(COUNTS[rows])
    logits, weights = 4 * randn(len(index), 3), randn(len(index)).abs()
    weights[1::5] = 0  # at the cutoff

    def both(function, *graph, **options):
        z, w = logits.clone().requires_grad_(True), weights.clone().requires_grad_(True)
        out = function(z, w, *graph, epsilon, **options)
        probe = randn(*out.shape)
        first = torch.autograd.grad((out * probe).sum(), (z, w), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (z, w))
        return [out.detach(), *(t.detach() for t in first), *second]

    fast = both(csr_segment_softmax, index, rowptr)
    truth = both(envelope_softmax, index, len(rowptr) - 1, backend="torch")
    public = both(envelope_softmax, index, len(rowptr) - 1, backend="numba")
    assert all(torch.equal(a, b) for a, b in zip(fast, public, strict=True))
    for found, expected in zip(fast, truth, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_rules_of_torch_and_finite_differences():
    index, rowptr = graph([3, 0, 2])
    values = randn(5, 2).requires_grad_(True)
    nodes, weights = randn(3, 2).requires_grad_(True), randn(5).abs().requires_grad_(True)
    torch.library.opcheck(csr_segment_sum, (values, index, rowptr))
    torch.library.opcheck(segment_rows, (nodes, index, rowptr))
    torch.library.opcheck(segment_shares, (values, weights, index, rowptr, 0.0))

    def softmax(z, w):
        return csr_segment_softmax(z, w, index, rowptr, 0.0)

    assert torch.autograd.gradcheck(softmax, (values, weights))
    assert torch.autograd.gradgradcheck(softmax, (values, weights))
    assert torch.autograd.gradgradcheck(lambda v: csr_segment_sum(v, index, rowptr) ** 2, values)


def test_bits_do_not_depend_on_threads(monkeypatch):
    index, rowptr = graph([40] * 300)
    values, weights = randn(len(index), 8, dtype=torch.float32), randn(len(index)).abs().float()
    found = []
    for n in (1, 2, 3):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        sums = csr_segment_sum(values, index, rowptr)
        found.append((sums, csr_segment_softmax(values, weights, index, rowptr, 0.0)))
    assert all(torch.equal(a, b) for f in found[1:] for a, b in zip(found[0], f, strict=True))
    exact = segment_sum(values.double(), index, 300)
    plain = segment_sum(values, index, 300)
    error = torch.linalg.vector_norm(found[0][0].double() - exact)
    assert error <= 2 * torch.linalg.vector_norm(plain.double() - exact)


def test_equal_edges_are_no_reason_to_refuse_a_kernel():
    """In a crystal all logits of an atom may be equal: derivatives vanish up to rounding."""
    index, _ = graph([6] * 20)
    logits = torch.full((120, 4), 0.3, requires_grad=True)
    weights = torch.full((120,), 0.5, requires_grad=True)
    out = envelope_softmax(logits, weights, index, 20, 1e-16, "auto")
    out.square().sum().backward()
    edge_sum(torch.zeros(120, 3), index, 20, "auto")
    torch.testing.assert_close(out, torch.full_like(out, 1 / 6))
    chosen = {k: v for k, v in decisions().items() if "edges of atoms, float32" in k}
    assert len(chosen) == 2
    assert all("agrees" in text for text in chosen.values())


def test_where_there_are_no_edges_nothing_is_decided(monkeypatch):
    for kept in ("_refused", "_uncovered"):
        monkeypatch.setattr(f"mlip.ops.backend.{kept}", {})
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(edge_sum(torch.zeros(0, 3), none, 2, "auto"), torch.zeros(2, 3))
    found = envelope_softmax(torch.zeros(0, 3), torch.zeros(0), none, 2, 1e-16, "auto")
    assert found.shape == (0, 3)
    assert not decisions()


@pytest.mark.parametrize("backend", ["auto", "numba"])
def test_edges_in_any_order_are_summed_right(backend):
    index, _ = graph([3, 0, 4])
    logits, weights = randn(7, 2), randn(7).abs()
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    sums = edge_sum(logits, index, 3, backend)
    shares = envelope_softmax(logits, weights, index, 3, 1e-3, backend)
    mixed = logits[order], weights[order], index[order]
    torch.testing.assert_close(edge_sum(mixed[0], mixed[2], 3, backend), sums)
    found = envelope_softmax(*mixed, 3, 1e-3, backend)
    torch.testing.assert_close(found, shares[order])
