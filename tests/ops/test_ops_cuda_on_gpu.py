"""Operators on a GPU as models call them: chosen by ``auto``, differentiated, in a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlip.nn.sphere_product import SphereBasis, gated_product
from mlip.ops import (
    ConvolutionSignature,
    RotationSignature,
    backend,
    edge_sum,
    envelope_softmax,
    forces_and_virial,
    neighborhood,
    operator_gather,
    operator_scatter,
    rotate_gather,
    rotate_scatter,
    sphere_products,
    structure_sum,
    sum_messages,
)
from mlip.so3 import degree_major, order_sizes

DEVICE = torch.device("cuda")
DOUBLE = torch.float64
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N_ATOMS, N_EDGES, CHANNELS = 5, 12, 3


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(DEVICE)


def ends(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, N_ATOMS, (rows, N_EDGES), generator=generator).to(DEVICE)


def rotations(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    signature, both = RotationSignature(2, 1), ends(2)
    of_column = torch.tensor([degree for degree, _ in degree_major(2, 2)])
    within = (torch.tensor(signature.degrees)[:, None] == of_column).to(DEVICE)

    def function(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
        matrix = matrix * within
        there = rotate_gather(signature, x, matrix, scale, both, name)
        bent = tuple(part + part**2 for part in there)
        return rotate_scatter(signature, bent, matrix, scale, both, N_ATOMS, name)

    inputs = [randn(N_ATOMS, 9, CHANNELS), randn(N_EDGES, *within.shape)]
    return function, [*inputs, randn(N_EDGES, 3, 2 * CHANNELS)]


def shared_operators(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    both = ends(2)

    def function(x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
        there = operator_gather(x, matrix, weights, both, name)
        return operator_scatter(there + there**2, matrix.mT, weights, both, N_ATOMS, name)

    return function, [randn(N_ATOMS, 4, CHANNELS), randn(N_EDGES, 9, 4), randn(N_EDGES, CHANNELS)]


def forces(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    edges, batch = ends(2), torch.arange(N_ATOMS, device=DEVICE) // 3

    def function(gradient: Tensor, vector: Tensor) -> Tensor:
        found = forces_and_virial(gradient, vector, edges, batch, N_ATOMS, 2, name)
        return torch.cat([part.flatten() for part in found])

    return function, [randn(N_EDGES, 3), randn(N_EDGES, 3)]


def convolutions(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    signature = ConvolutionSignature((CHANNELS, 2), 2, (0, 1, 2), natural_parity=True)
    edges = ends(2)
    edges = edges[:, edges[1].sort(stable=True).indices]
    near = neighborhood(edges, N_ATOMS)

    def function(x: Tensor, y: Tensor, harmonics: Tensor, basis: Tensor, kernel: Tensor) -> Tensor:
        inputs = (harmonics, basis, kernel, near)
        found = sum_messages(signature, (x, y), *inputs, backend=name)  # type: ignore[arg-type]
        return torch.cat([part.flatten() for part in found])

    features = [randn(N_ATOMS, 1, CHANNELS), randn(N_ATOMS, 3, 2)]
    return function, [
        *features,
        randn(N_EDGES, 9),
        randn(N_EDGES, 4),
        randn(4, signature.n_weights),
    ]


def high_convolutions(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    signature = ConvolutionSignature((1, 0, 0, 0, 0, CHANNELS), 2, (0, 5, 6), natural_parity=True)
    edges = ends(2)
    edges = edges[:, edges[1].sort(stable=True).indices]
    near = neighborhood(edges, N_ATOMS)
    absent = [torch.zeros(N_ATOMS, 2 * i + 1, 0, dtype=DOUBLE, device=DEVICE) for i in range(1, 5)]

    def function(x: Tensor, y: Tensor, harmonics: Tensor, basis: Tensor, kernel: Tensor) -> Tensor:
        inputs = (harmonics, basis, kernel, near)
        found = sum_messages(signature, (x, *absent, y), *inputs, backend=name)  # type: ignore[arg-type]
        return torch.cat([part.flatten() for part in found])

    kernel = randn(4, signature.n_weights)
    features = [randn(N_ATOMS, 1, 1), randn(N_ATOMS, 11, CHANNELS)]
    return function, [*features, randn(N_EDGES, 9), randn(N_EDGES, 4), kernel]


def products(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    tables = randn(20, 4), randn(9, 20)

    def function(u: Tensor) -> Tensor:
        return sphere_products(u, *tables, 3, name)

    return function, [randn(N_ATOMS, 4, 3 * CHANNELS)]


def gated(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    basis = SphereBasis(2, 1, in_frame=True)

    def function(gate: Tensor, *hidden: Tensor) -> Tensor:
        found = gated_product(basis, hidden, 0, gate, name)
        return torch.cat([part.flatten() for part in found])

    hidden = [randn(N_EDGES, 2 * CHANNELS * n) for n in order_sizes(2, 1)]
    return function, [randn(N_EDGES, CHANNELS), *hidden]


def edge_sums(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    target = ends(1)[0].sort().values

    def function(logits: Tensor, weights: Tensor) -> Tensor:
        shares = envelope_softmax(logits, weights.sigmoid(), target, N_ATOMS, 0.0, name)  # type: ignore[arg-type]
        return edge_sum(shares**2, target, N_ATOMS, name)  # type: ignore[arg-type]

    return function, [randn(N_EDGES, CHANNELS), randn(N_EDGES)]


OPERATORS = [
    convolutions,
    high_convolutions,
    rotations,
    shared_operators,
    forces,
    products,
    gated,
    edge_sums,
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_takes_the_kernel(operator, caplog, monkeypatch):
    monkeypatch.setattr(backend, "_refused", {})
    function, inputs = operator("auto")
    with caplog.at_level(logging.INFO, logger="mlip"):
        found = function(*inputs)
    assert "CUDA kernel, relative error" in caplog.text
    assert "plain PyTorch instead" not in caplog.text
    torch.testing.assert_close(found, operator("torch")[0](*inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("operator", OPERATORS)
def test_derivatives(operator):
    function, inputs = operator("cuda")
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    if operator is not gated:  # first derivatives only
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_graph_of_launches(operator):
    function, inputs = operator("cuda")
    expected = function(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = function(*inputs)
    inputs[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, function(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("n_graphs", [1, 7])
def test_sums_over_structures_are_the_same_in_every_run(n_graphs):
    batch = torch.arange(20_000, device=DEVICE) * n_graphs // 20_000
    values = randn(20_000, 2)
    found = [structure_sum(values, batch, n_graphs) for _ in range(10)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    truth = torch.zeros(n_graphs, 2, dtype=DOUBLE).index_add(0, batch.cpu(), values.cpu())
    torch.testing.assert_close(found[0].cpu(), truth, rtol=1e-12, atol=1e-9)
