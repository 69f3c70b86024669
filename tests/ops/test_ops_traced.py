"""What compilers see of every operator: one node, and derivatives that survive tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from mlip.benchmarks.kernel_cases import BUILDERS, Case, Sizes, cases

FAMILIES = {
    "convolution": "mlip.convolution",
    "radial_convolution": "mlip.convolution",
    "rotate_gather": "mlip.rotate_gather",
    "rotate_scatter": "mlip.rotate_scatter",
    "operator_gather": "mlip.operator_gather",
    "operator_scatter": "mlip.operator_scatter",
    "sphere_products": "mlip.sphere_products",
    "segment_sum": "mlip.segment_sum",
    "segment_softmax": "mlip.segment_shares",
    "forces_and_virial": "mlip.forces_and_virial",
}


def case_of(name: str) -> Case:
    (case,) = cases([name], Sizes(5, 16, 8, 1, torch.zeros(0, dtype=torch.float64)))
    return case


def slopes(case: Case, backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """First derivatives of a nonlinear function of the result, as forces are of an energy."""
    out = case.run(backend, *inputs)
    energy = torch.stack([torch.tanh(part).square().sum() for part in out]).sum()
    return torch.autograd.grad(energy, inputs, create_graph=True)


def loss_gradients(case: Case, function, inputs: list[Tensor]) -> list[Tensor]:
    """Derivatives of a loss of those, as training on forces takes them."""
    masked = [
        part * case.masks[i] if i in case.masks else part
        for i, part in enumerate(function(*inputs))
    ]
    loss = torch.stack([part.square().sum() for part in masked]).sum()
    found = list(torch.autograd.grad(loss, inputs))
    return [part * case.masks[i] if i in case.masks else part for i, part in enumerate(found)]


def test_every_operator_is_here():
    assert set(FAMILIES) == set(BUILDERS) - {"gated_product"}  # first derivatives, no operator


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_slopes_keep_their_derivatives(name):
    """``make_fx`` puts ``detach`` on saved tensors, which cuts the gradients of a force loss.

    Decomposing it to an alias gives them back. The truth is plain PyTorch, untraced.
    """
    case = case_of(name)
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    traced = make_fx(
        lambda *tensors: slopes(case, "numba", *tensors),
        tracing_mode="symbolic",
        decomposition_table=core_aten_decompositions(),
        _allow_non_fake_inputs=True,
    )(*inputs)
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert targets.count(f"{FAMILIES[name]}.default") == 1
    truth = loss_gradients(case, lambda *tensors: slopes(case, "torch", *tensors), inputs)
    for found, expected in zip(loss_gradients(case, traced, inputs), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_on_auto(name):
    """The choice of the back end is a constant of the trace; there is no break in the graph."""
    case = case_of(name)
    compiled = torch.compile(
        lambda *tensors: case.run("auto", *tensors), fullgraph=True, backend="eager"
    )
    for found, expected in zip(
        compiled(*case.inputs), case.run("torch", *case.inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.compiler.reset()
