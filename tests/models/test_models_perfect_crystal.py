"""Kernels run on perfect crystals, where features and gradients vanish by symmetry.

A comparison with plain PyTorch then has nothing but rounding to look at. A refused kernel fails a
test by the fixture in ``conftest.py``.
"""

from __future__ import annotations

import pytest
import torch
from ase.build import bulk

pytest.importorskip("numba")

from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.ops.backend import decisions
from mlip.potential import Potential

COMMON = {"elements": (14, 29), "cutoff": 4.2}
MODELS = {
    "facet": {"hidden": ((16, 16, 16),) * 2},
    "facet, odd channels": {"hidden": ((16, 8, 4),)},
    "facet, gates": {"node_update": "gate", "hidden": ((16, 16),) * 2},
    "facet, radial network": {"radial_hidden": (8,), "hidden": ((16, 16),) * 2},
    "tdn": {"lmax": 2, "channels": 16, "layers": 2},
    "equiformer_v3": {"lmax": 2, "channels": 16, "layers": 2},
}
CRYSTALS = {"fcc": bulk("Cu", cubic=True), "one atom": bulk("Cu"), "diamond": bulk("Si")}


@pytest.mark.parametrize("crystal", CRYSTALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_kernels_run_on_perfect_crystals(name, dtype, crystal, training, monkeypatch):
    for kept in ("_refused", "_uncovered"):
        monkeypatch.setattr(f"mlip.ops.backend.{kept}", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = create_model(name.split(",")[0], {**COMMON, **MODELS[name]})
    potential = Potential(model).to_dtype(dtype).train(training)
    graph = atoms_to_graph(CRYSTALS[crystal], potential.cutoff)
    found = potential(graph, create_graph=training)
    if training:
        (found.energy.square().sum() + found.forces.square().sum()).backward()
    assert any(how.startswith("CPU kernel") for how in decisions().values())
    softmax = decisions().get(
        f"softmax over the edges of atoms, {str(dtype).split('.')[1]}", "none"
    )
    expected = "none" if name.startswith("facet") else "CPU kernel"
    assert softmax.startswith(expected)
