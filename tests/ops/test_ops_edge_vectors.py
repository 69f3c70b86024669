"""Vectors of edges by compiled code against sums of Python's exact fractions."""

from __future__ import annotations

import logging
import sys
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import backend, edge_vectors
from mlip.ops.cpu import edge_vectors as cpu
from mlip.ops.cpu import threads

DOUBLE = torch.float64


class Case:
    """Random edges of one or more structures in skewed cells."""

    def __init__(self, n_graphs: int = 1, n_edges: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        n_nodes = 4 * n_graphs
        self.positions = torch.randn(n_nodes, 3, generator=generator, dtype=DOUBLE)
        self.cell = torch.randn(n_graphs, 3, 3, generator=generator, dtype=DOUBLE)
        self.batch = torch.arange(n_nodes) // 4
        target = torch.randint(0, n_nodes, (n_edges,), generator=generator).sort().values
        source = 4 * self.batch[target] + torch.randint(0, 4, (n_edges,), generator=generator)
        self.index = torch.stack([source, target])
        self.shift = torch.randint(-3, 4, (n_edges, 3), generator=generator)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.positions, self.cell, self.index, self.shift, self.batch

    def exact(self) -> Tensor:
        """The vectors, one number after another, rounded once."""
        points, cells = self.positions.tolist(), self.cell.tolist()
        rows = []
        for (s, t), shift in zip(self.index.T.tolist(), self.shift.tolist(), strict=True):
            cell = cells[self.batch[t]]
            row = []
            for k in range(3):
                image = sum(n * Fraction(cell[a][k]) for a, n in enumerate(shift))
                row.append(float(image + Fraction(points[s][k]) - Fraction(points[t][k])))
            rows.append(row)
        return torch.tensor(rows, dtype=DOUBLE).view(-1, 3)


@pytest.mark.parametrize("name", ["torch", "numba", "auto"])
@pytest.mark.parametrize("n_graphs", [1, 3])
def test_equals_exact_sums(name, n_graphs):
    case = Case(n_graphs)
    found = edge_vectors(*case.inputs, backend=name)
    assert found.dtype == DOUBLE
    torch.testing.assert_close(found, case.exact(), rtol=0, atol=1e-14)


def test_views_are_inputs_like_any_other():
    case = Case()
    found = cpu.vectors(*(t.mT.contiguous().mT if t.dim() > 1 else t for t in case.inputs))
    assert torch.equal(found, cpu.vectors(*case.inputs))


def test_without_edges_there_are_none():
    assert edge_vectors(*Case(2, 0).inputs).shape == (0, 3)


@pytest.mark.parametrize("differentiated", ["positions", "cell"])
def test_derivatives_go_through_the_definition(differentiated):
    case = Case(2)
    tensor = getattr(case, differentiated).requires_grad_(True)
    weights = torch.arange(120, dtype=DOUBLE).view(40, 3).sin()
    (gradient,) = torch.autograd.grad((edge_vectors(*case.inputs) * weights).sum(), tensor)
    truth = torch.zeros_like(gradient)
    for (s, t), shift, weight in zip(case.index.T.tolist(), case.shift, weights, strict=True):
        if differentiated == "cell":
            truth[case.batch[t]] += torch.outer(shift.double(), weight)
        else:
            truth[s] += weight
            truth[t] -= weight
    torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-12)


def test_bits_do_not_depend_on_threads(monkeypatch):
    case = Case(3, 1000)
    monkeypatch.setattr(cpu, "SERIAL_EDGES", 1)
    found = []
    for n in (1, 2, 5):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        found.append(cpu.vectors(*case.inputs))
    assert all(torch.equal(found[0], each) for each in found[1:])
    torch.testing.assert_close(found[0], case.exact(), rtol=0, atol=1e-14)


def test_what_does_not_fit_is_an_error_not_a_crash():
    case = Case(2)
    positions, cell, index, shift, batch = case.inputs
    lost, negative = index.clone(), index.clone()
    lost[0, 3], negative[1, 0] = len(positions), -1
    for edges, structures in ((lost, batch), (negative, batch), (index, batch + 1)):
        with pytest.raises(InputError, match="one that does not exist"):
            cpu.vectors(positions, cell, edges, shift, structures)
    for wrong in (
        (positions[:, :2], cell, index, shift, batch),
        (positions, cell[0], index, shift, batch),
        (positions, cell, index[:1], shift, batch),
        (positions, cell, index, shift[:-1], batch),
        (positions, cell, index, shift, batch[:-1]),
    ):
        with pytest.raises(InputError, match="do not fit"):
            cpu.vectors(*wrong)


@pytest.mark.refusals
def test_a_kernel_that_errs_is_left_alone(monkeypatch, caplog):
    case = Case()
    module = sys.modules[edge_vectors.__module__]  # in the package its name is the function
    right = module._definition
    monkeypatch.setattr(module, "_kernel", lambda *arguments: 1.001 * right(*arguments))
    monkeypatch.setattr(backend, "_refused", {})
    monkeypatch.setenv("MLIP_BACKEND", "auto")
    with caplog.at_level(logging.INFO, logger="mlip"):
        found = edge_vectors(*case.inputs)
    torch.testing.assert_close(found, case.exact(), rtol=0, atol=1e-14)
    assert "vectors of edges, float64: plain PyTorch" in caplog.text
