"""Models whose kernels are the CUDA text, run on the CPU, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from mlip.graph import AtomicGraph, atoms_to_graph
from mlip.models import create_model
from mlip.ops import backend
from mlip.ops.cpu import (
    double_backward,
    library,
    rotation,
    shared_operator,
    sphere,
    sphere_products,
)
from mlip.ops.cpu.runner import EdgeList
from mlip.ops.cuda import convolution as cuda_convolution
from mlip.ops.cuda import double_backward as cuda_double_backward
from mlip.ops.cuda import gated_product as cuda_gated_product
from mlip.ops.cuda import rotation as cuda_rotation
from mlip.ops.cuda import shared_operator as cuda_shared_operator
from mlip.ops.cuda import sphere_products as cuda_sphere_products
from mlip.potential import Potential
from tests.ops.host_cuda import needs_compiler

pytestmark = needs_compiler
FRAMES = [
    (rotation, cuda_rotation, ("gather", "scatter_add", "slopes_add")),
    (sphere, cuda_gated_product, ("GridKernels",)),
]
OPERATORS = [(shared_operator, cuda_shared_operator, ("gather", "scatter_add", "slopes"))]
NODES = [
    (library, cuda_convolution, ("convolve", "convolve_backward")),
    (double_backward, cuda_double_backward, ("second_derivatives",)),
    (sphere_products, cuda_sphere_products, ("products", "slopes")),
]
# numbers of channels that CPU kernels would not take
MODELS = {
    "facet": ({"hidden": [[8, 5]], "embedding": 8, "outputs": 8}, NODES),
    "equiformer_v3": (
        {"lmax": 2, "layers": 1, "channels": 6, "feed_forward_hidden": 5, "edge_channels": 8},
        FRAMES,
    ),
    "tdn": ({"lmax": 1, "channels": 6, "heads": 2}, OPERATORS),
}


def counted(function: Callable, calls: list[str], name: str) -> Callable:
    def call(*arguments, **options):
        calls.append(name)
        given = (
            (torch.from_numpy(a.rowptr), torch.from_numpy(a.source)) if isinstance(a, EdgeList)
            else (a,) for a in arguments
        )  # fmt: skip
        return function(*(a for each in given for a in each), **options)

    return call


def answers(potential: Potential, graph: AtomicGraph) -> list[Tensor]:
    """Energy and forces as in simulations, and the parameter gradient of a loss of forces."""
    found = potential(graph, stress=False)
    training = potential(graph, stress=False, create_graph=True)
    loss = training.forces.square().sum() + training.energy.sum()
    slopes = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
    slope = torch.cat([part.flatten() for part in slopes if part is not None])
    return [found.energy, found.forces, slope]


@pytest.mark.parametrize("name", MODELS)
def test_energies_forces_and_training_equal_plain_pytorch(on_host, monkeypatch, name):
    config, replacements = MODELS[name]
    torch.manual_seed(0)
    potential = Potential(create_model(name, {"elements": [1, 8], **config}).double())
    potential.eval()
    graph = atoms_to_graph(molecule("H2O"), potential.cutoff)
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    expected = answers(potential, graph)

    on_host()
    monkeypatch.setenv("MLIP_BACKEND", "numba")
    monkeypatch.setattr(backend, "refusal", lambda tensors, numba, cuda: cuda)  # noqa: ARG005
    calls: list[str] = []
    for replaced, kernels, functions in replacements:
        for function in functions:
            kernel = counted(getattr(kernels, function), calls, function)
            monkeypatch.setattr(replaced, function, kernel)
    found = answers(potential, graph)
    assert set(calls) == {function for *_, functions in replacements for function in functions}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
