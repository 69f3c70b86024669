"""Training with kernels and with plain PyTorch gives the same curve, to rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mlip.graph import AtomicGraph, atoms_to_graph, batch_graphs
from mlip.models import create_model
from mlip.potential import Potential
from tests.contract.base import ELEMENTS, cluster, crystal

STEPS = 6
MODELS: dict[str, dict[str, Any]] = {
    "facet": {"hidden": ((16, 16),), "embedding": 8, "outputs": 8},
    "tdn": {
        "layers": 1,
        "lmax": 1,
        "channels": 16,
        "heads": 2,
        "n_radial": 5,
        "radial_hidden": (8,),
        "average_degree": 20.0,
    },
    "equiformer_v3": {
        "layers": 1,
        "lmax": 2,
        "mmax": 1,
        "channels": 16,
        "attention_hidden": 16,
        "heads": 2,
        "alpha_channels": 8,
        "value_channels": 8,
        "feed_forward_hidden": 16,
        "edge_channels": 8,
        "n_radial": 5,
        "average_degree": 20.0,
    },
}


class Curve(NamedTuple):
    """Loss of every step, and the change of all weights, float64."""

    losses: Tensor
    change: Tensor


def loss_of(potential: Potential, graph: AtomicGraph) -> Tensor:
    """Forces and stress towards fixed numbers: every gradient is a second derivative."""
    found = potential(graph, create_graph=True)
    wanted = torch.linspace(-1, 1, found.forces.numel(), dtype=torch.float64).mul(9).sin()
    forces = (found.forces - wanted.view_as(found.forces)).square().mean()
    return forces + 100 * found.stress[0].square().mean()


def trained(name: str, dtype: torch.dtype) -> Curve:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, {"elements": ELEMENTS, "cutoff": 4.2, **MODELS[name]})
    potential = Potential(model).to_dtype(dtype)
    graph = batch_graphs([atoms_to_graph(make(), potential.cutoff) for make in (crystal, cluster)])
    weights = [p for p in potential.parameters() if p.requires_grad]
    start = torch.cat([p.detach().double().flatten() for p in weights])
    optimizer = torch.optim.SGD(weights, lr=3e-3, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(potential, graph)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.detach())
    end = torch.cat([p.detach().double().flatten() for p in weights])
    return Curve(torch.stack(losses), end - start)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_training_curves_agree_to_rounding(name, monkeypatch):
    """In float64 by the rounding of float64; in float32 as near the truth as plain PyTorch is."""
    curves: dict[tuple[str, torch.dtype], Curve] = {}
    for backend in ("torch", "numba"):
        monkeypatch.setenv("MLIP_BACKEND", backend)
        for dtype in (torch.float64, torch.float32):
            curves[backend, dtype] = trained(name, dtype)
    truth = curves["torch", torch.float64]
    assert truth.losses[-1] < truth.losses[0]
    for found, expected in zip(curves["numba", torch.float64], truth, strict=True):
        assert distance(found, expected) < 1e-12
    for fast, plain, expected in zip(
        curves["numba", torch.float32], curves["torch", torch.float32], truth, strict=True
    ):
        assert distance(fast, expected) < 3 * distance(plain, expected) + 1e-6
