"""Forces and virial by compiled code against loops over edges and finite differences."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import backend, edge_gradient, forces_and_virial
from mlip.ops.cpu import edge_gradient as cpu
from mlip.ops.cpu import threads
from mlip.ops.cpu.edge_gradient import slopes_op, sums_op

DOUBLE = torch.float64


class Case:
    """Random edges of a few structures; the last atom has none, one atom is its own neighbour."""

    def __init__(self, n_edges: int = 9, n_nodes: int = 5, dtype: torch.dtype = DOUBLE) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)

        index = torch.randint(0, n_nodes - 1, (2, n_edges), generator=generator)
        index[:, :1] = 1
        order = torch.sort(index[1], stable=True).indices
        self.index, self.batch = index[:, order], torch.arange(n_nodes) // 2
        self.n_nodes, self.n_graphs = n_nodes, int(self.batch[-1]) + 1
        self.gradient, self.vector = randn(n_edges, 3), randn(n_edges, 3)
        self.force, self.strain = randn(n_nodes, 3), randn(self.n_graphs, 3, 3)
        self.sizes = (self.n_nodes, self.n_graphs)

    def loops(self) -> tuple[Tensor, Tensor]:
        """Forces and virial, one edge and one number after another."""
        forces = torch.zeros(self.n_nodes, 3, dtype=DOUBLE)
        virial = torch.zeros(self.n_graphs, 3, 3, dtype=DOUBLE)
        for e, (source, target) in enumerate(self.index.T.tolist()):
            for i in range(3):
                forces[target, i] += self.gradient[e, i].double()
                forces[source, i] -= self.gradient[e, i].double()
                for j in range(3):
                    half = self.gradient[e, i].double() * self.vector[e, j].double() / 2
                    virial[self.batch[target], i, j] += half
                    virial[self.batch[target], j, i] += half
        return forces, virial


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("n_edges", [0, 1, 9, 60])
@pytest.mark.parametrize("name", ["torch", "numba"])
def test_equals_loops_over_edges(name, n_edges, shuffled):
    case = Case(n_edges)
    if shuffled:
        case.index = case.index[:, torch.randperm(n_edges)]
    found = forces_and_virial(case.gradient, case.vector, case.index, case.batch, *case.sizes, name)
    for a, b in zip(found, case.loops(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert not found[0][-1].any()
    if name == "numba":
        direct = sums_op(case.gradient, case.vector, case.index, case.batch, *case.sizes)
        torch.testing.assert_close(direct, case.loops(), rtol=0, atol=1e-13)


def test_views_are_inputs_like_any_other():
    case = Case(12)
    gradient = case.gradient[:1].expand(12, 3)
    vector = torch.cat([case.vector, case.vector], 1)[:, 3:]
    index = case.index.T.contiguous().T
    case.gradient = gradient.clone()
    found = sums_op(gradient, vector, index, case.batch, *case.sizes)
    torch.testing.assert_close(found, case.loops(), rtol=0, atol=1e-13)


def test_derivatives_by_finite_differences():
    case = Case(4, 3)
    gradient, vector = case.gradient.requires_grad_(), case.vector.requires_grad_()
    force, strain = case.force.requires_grad_(), case.strain.requires_grad_()

    def sums(g, d):
        return sums_op(g, d, case.index, case.batch, *case.sizes)

    def slopes(a, b, g, d):
        return slopes_op(a, b, g, d, case.index, case.batch)

    assert torch.autograd.gradcheck(sums, (gradient, vector))
    assert torch.autograd.gradgradcheck(sums, (gradient, vector))
    assert torch.autograd.gradcheck(slopes, (force, strain, gradient, vector))
    assert torch.autograd.gradgradcheck(slopes, (force, strain, gradient, vector))


def test_force_training_gets_the_gradients_of_the_definition():
    """Differentiate a loss of forces and virial by a parameter of the energy and by vectors."""
    case = Case(60)

    def slope(name: str) -> Tensor:
        scale = torch.tensor([0.7, 1.3, 0.9], dtype=DOUBLE, requires_grad=True)
        vectors = case.vector.clone().requires_grad_()
        energy = (vectors * scale).square().sum(1).sqrt().sin().sum()
        (gradient,) = torch.autograd.grad(energy, vectors, create_graph=True)
        parts = forces_and_virial(gradient, vectors, case.index, case.batch, *case.sizes, name)
        loss = sum(part.square().sum() for part in parts)
        return torch.cat([t.flatten() for t in torch.autograd.grad(loss, (scale, vectors))])

    torch.testing.assert_close(slope("numba"), slope("torch"), rtol=1e-12, atol=1e-12)


def test_operators_follow_the_rules_of_torch():
    case = Case()
    gradient, vector = case.gradient.requires_grad_(), case.vector.requires_grad_()
    torch.library.opcheck(sums_op, (gradient, vector, case.index, case.batch, *case.sizes))
    force, strain = case.force.requires_grad_(), case.strain.requires_grad_()
    inputs = (force, strain, gradient, vector, case.index, case.batch)
    torch.library.opcheck(slopes_op, inputs)


def test_bits_do_not_depend_on_threads(monkeypatch):
    case = Case(4000, 50)
    monkeypatch.setattr(cpu, "CHUNK_EDGES", 300)
    found = []
    for n in (1, 2, 5):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        sums = sums_op(case.gradient, case.vector, case.index, case.batch, *case.sizes)
        slopes = slopes_op(
            case.force, case.strain, case.gradient, case.vector, case.index, case.batch
        )
        found.append((*sums, *slopes))
    assert all(torch.equal(a, b) for f in found[1:] for a, b in zip(found[0], f, strict=True))
    for a, b in zip(found[0], case.loops(), strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_float32_is_as_accurate_as_the_definition():
    case = Case(3000, 20, torch.float32)
    inputs = (case.gradient, case.vector, case.index, case.batch, *case.sizes)
    found = {name: forces_and_virial(*inputs, name) for name in ("torch", "numba")}
    for plain, kernel, exact in zip(found["torch"], found["numba"], case.loops(), strict=True):
        assert kernel.dtype == torch.float32
        assert 0 < (kernel.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_what_does_not_fit_is_an_error_not_a_crash():
    case = Case()
    lost = case.index.clone()
    lost[0, 3] = case.n_nodes
    negative = case.index.clone()
    negative[1, 0] = -1
    for index, batch in ((lost, case.batch), (negative, case.batch), (case.index, case.batch + 2)):
        with pytest.raises(InputError, match="one that does not exist"):
            sums_op(case.gradient, case.vector, index, batch, *case.sizes)
        with pytest.raises(InputError, match="one that does not exist"):
            slopes_op(case.force, case.strain, case.gradient, case.vector, index, batch)
    for gradient, index, word in (
        (case.gradient[:-1], case.index, "edge_gradient"),
        (case.gradient.float(), case.index, "precision"),
        (case.gradient, case.index.int(), "index type"),
        (case.gradient, case.index[:1], "edge_index"),
    ):
        with pytest.raises(InputError, match=f"edges: {word}"):
            sums_op(gradient, case.vector, index, case.batch, *case.sizes)


@pytest.mark.refusals
def test_a_kernel_that_errs_is_left_alone(monkeypatch, caplog):
    case = Case()

    def wrong(*arguments):
        forces, virial = edge_gradient._definition(*arguments)
        return forces * 1.001, virial

    monkeypatch.setattr(edge_gradient, "_kernel", wrong)
    monkeypatch.setattr(backend, "_refused", {})
    monkeypatch.setenv("MLIP_BACKEND", "auto")
    with caplog.at_level(logging.INFO, logger="mlip"):
        found = forces_and_virial(case.gradient, case.vector, case.index, case.batch, *case.sizes)
    torch.testing.assert_close(found, case.loops(), rtol=0, atol=1e-13)
    assert "forces and virial of edges, float64: plain PyTorch" in caplog.text
