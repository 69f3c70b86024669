"""The convolution against e3nn, and its moment form against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.ops import ConvolutionSignature, convolution, neighborhood, radial_convolution
from mlip.so3 import spherical_harmonics

DOUBLE = torch.float64


def random_case(signature, counts, n_radial=3, seed=0):
    """Features, harmonics, basis, kernel and neighbours for given neighbour counts."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    n_nodes, n_edges = len(counts), sum(counts)
    target = torch.repeat_interleave(torch.arange(n_nodes), torch.tensor(counts))
    source = torch.randint(0, max(n_nodes, 1), (n_edges,), generator=generator)
    edge_index = torch.stack([source, target])
    x = tuple(randn(n_nodes, 2 * i + 1, n) for i, n in enumerate(signature.channels))
    harmonics = spherical_harmonics(signature.lmax_edge, randn(n_edges, 3))
    basis, kernel = randn(n_edges, n_radial), randn(n_radial, signature.n_weights)
    return x, harmonics, basis, kernel, edge_index


SIGNATURES = [
    ConvolutionSignature((4,), 2, (0, 1, 2), True),
    ConvolutionSignature((4, 3, 2), 2, (0, 1, 2), False),
    ConvolutionSignature((2, 3, 1), 3, (0, 1, 2, 3), True),
    ConvolutionSignature((4, 3, 2), 2, (0,), True),
    ConvolutionSignature((3, 0, 2), 1, (0, 1, 2), False),
]


@pytest.mark.parametrize("signature", SIGNATURES[:2] + SIGNATURES[3:4])
def test_definition_equals_e3nn(signature):
    o3 = pytest.importorskip("e3nn.o3")
    x, harmonics, basis, kernel, edge_index = random_case(signature, [3, 0, 4, 2])
    weights = basis @ kernel
    lmax = signature.lmax_edge
    irreps_in = o3.Irreps([(n, (i, 1)) for i, n in enumerate(signature.channels)])
    irreps_edge = o3.Irreps([(1, (i, 1)) for i in range(lmax + 1)])
    irreps_out = o3.Irreps([(signature.channels[a], (c, 1)) for a, _, c in signature.paths])
    instructions = [(a, b, i, "uvu", True) for i, (a, b, _) in enumerate(signature.paths)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)  # e3nn rounds its tables to the default precision
    try:
        product = o3.TensorProduct(
            irreps_in, irreps_edge, irreps_out, instructions, shared_weights=False,
            internal_weights=False, irrep_normalization="component", path_normalization="element",
        )  # fmt: skip
    finally:
        torch.set_default_dtype(default)
    flat = torch.cat([part.transpose(1, 2).flatten(1) for part in x], 1)
    messages = product(flat[edge_index[0]], harmonics, weights)
    summed = torch.zeros(len(flat), messages.shape[1], dtype=DOUBLE)
    summed.index_add_(0, edge_index[1], messages)
    ours = convolution(signature, x, harmonics, weights, neighborhood(edge_index, len(flat)))
    cursor = [0] * len(ours)
    for (a, _, c), chunk in zip(signature.paths, irreps_out.slices(), strict=True):
        n = signature.channels[a]
        part = ours[c][:, :, cursor[c] : cursor[c] + n].transpose(1, 2).flatten(1)
        cursor[c] += n
        torch.testing.assert_close(part, summed[:, chunk], atol=1e-12, rtol=0)


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("counts", [[3, 0, 9, 1], [0, 0], [5], [0, 20, 19, 1, 12]])
def test_moments_equal_definition(signature, counts):
    x, harmonics, basis, kernel, edge_index = random_case(signature, counts)
    neighbors = neighborhood(edge_index, len(counts))
    fast = radial_convolution(signature, x, harmonics, basis, kernel, neighbors)
    slow = radial_convolution(
        signature, x, harmonics, basis, kernel, neighbors, use_definition=True
    )
    assert len(fast) == len(slow) == len(signature.out_channels)
    for a, b, n in zip(fast, slow, signature.out_channels, strict=True):
        assert a.shape[2] == n
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_float32_moments_are_as_accurate_as_the_definition():
    signature = SIGNATURES[1]
    case = random_case(signature, [40] * 20, n_radial=8)
    x, harmonics, basis, kernel, edge_index = case
    neighbors = neighborhood(edge_index, 20)
    truth = radial_convolution(signature, x, harmonics, basis, kernel, neighbors)
    errors = {}
    for definition in (True, False):
        single = radial_convolution(
            signature, tuple(part.float() for part in x), harmonics.float(), basis.float(),
            kernel.float(), neighbors, use_definition=definition,
        )  # fmt: skip
        errors[definition] = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(single, truth, strict=True)
        )
    assert errors[False] <= 2 * errors[True]


def test_double_backward():
    signature = ConvolutionSignature((2, 1), 1, (0, 1), True)
    x, harmonics, basis, kernel, edge_index = random_case(signature, [2, 0, 3], n_radial=2)
    neighbors = neighborhood(edge_index, 3)

    def flat(a, b, c, d, e):
        out = radial_convolution(signature, (a, b), c, d, e, neighbors)
        return torch.cat([part.flatten(1) for part in out], 1)

    inputs = [t.clone().requires_grad_(True) for t in (*x, harmonics, basis, kernel)]
    assert torch.autograd.gradcheck(flat, inputs)
    assert torch.autograd.gradgradcheck(flat, inputs)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_neighborhood_holds_every_edge_once(counts):
    n_edges = sum(counts)
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    source = torch.arange(n_edges) % len(counts)
    neighbors = neighborhood(torch.stack([source, target]), len(counts))
    slots = [bucket.edges.flatten() for bucket in neighbors.padded.buckets]
    listed = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
    assert sorted(listed[listed < n_edges].tolist()) == list(range(n_edges))
    rows = torch.cat(
        [torch.where(b.edges < n_edges, 1, 0).sum(1) for b in neighbors.padded.buckets]
        + [torch.zeros(1, dtype=torch.int64)]
    )
    assert rows[neighbors.padded.restore].tolist() == counts
    padding = sum(b.edges.numel() for b in neighbors.padded.buckets)
    assert padding <= n_edges / 0.7 + len(counts)


def test_unit_weights_on_scalars_average_the_harmonics():
    signature = ConvolutionSignature((1,), 1, (0, 1), True)
    vectors = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]], dtype=DOUBLE)
    edge_index = torch.tensor([[0, 0, 0], [0, 0, 0]])
    x = (torch.ones(1, 1, 1, dtype=DOUBLE),)
    harmonics = spherical_harmonics(1, vectors)
    weights = torch.ones(3, 2, dtype=DOUBLE)
    scalars, vector = convolution(signature, x, harmonics, weights, neighborhood(edge_index, 1))
    assert scalars.item() == pytest.approx(3.0)
    assert vector.flatten().tolist() == pytest.approx([math.sqrt(3), 0.0, 0.0])
