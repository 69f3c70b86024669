"""The gated linear map of inference is that of training, with first derivatives."""

from __future__ import annotations

import pytest
import torch

from mlip.nn.gated_values import gated_values
from mlip.nn.tensor_attention import GatedLinear, first_and_rest

DOUBLE = torch.float64


def random(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


@pytest.fixture
def layer():
    layer = GatedLinear(6).double()
    with torch.no_grad():
        layer.weight.copy_(random(12, 6))
        layer.bias.copy_(random(12))
    return layer


@pytest.mark.parametrize("n_edges", [0, 1, 7])
def test_values_and_gradients_are_those_of_the_layer(layer, n_edges):
    x = random(n_edges, 4, 6).requires_grad_()
    scalars, values = gated_values(x, layer.weight, layer.bias)
    torch.testing.assert_close(scalars, x[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(values, layer(x), rtol=1e-13, atol=1e-13)
    along = random(n_edges, 6), random(n_edges, 4, 6)
    (found,) = torch.autograd.grad([scalars, values], x, along)
    first, rest = first_and_rest(x)
    expected = first.squeeze(1), layer.gated(first, rest)
    (truth,) = torch.autograd.grad(expected, x, along)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_one_result_alone_has_a_gradient_too(layer):
    x = random(3, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gated_values(x, layer.weight, layer.bias)[0], x)
    assert torch.autograd.gradcheck(lambda x: gated_values(x, layer.weight, layer.bias)[1], x)


def test_weights_are_constants_and_second_derivatives_are_refused(layer):
    x = random(3, 4, 6).requires_grad_()
    _, values = gated_values(x, layer.weight, layer.bias)
    (gradient,) = torch.autograd.grad(values.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert layer.weight.grad is None
