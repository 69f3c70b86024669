"""Every model runs where Numba and llvmlite cannot be imported, in plain PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from ase.build import bulk

from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.potential import Potential

MODELS = {
    "facet": {"hidden": ((16, 16),), "embedding": 16, "outputs": 16},
    "tdn": {"lmax": 1, "channels": 16, "layers": 1},
    "equiformer_v3": {"lmax": 2, "channels": 16, "layers": 1},
}
WITHOUT = """
import json, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
from tests.models.test_models_without_numba import MODELS, answer
print(json.dumps({name: answer(name) for name in MODELS}))
"""


def answer(name: str) -> list[float]:
    """Energy, and forces in a line."""
    torch.manual_seed(0)
    potential = Potential(create_model(name, {"elements": (29,), "cutoff": 4.0, **MODELS[name]}))
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    found = potential.to_dtype(torch.float64).eval()(atoms_to_graph(atoms, 4.0))
    return [float(found.energy), *found.forces.flatten().tolist()]


def test_models_run(monkeypatch, repository):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, cwd=repository
    )
    found = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    for name in MODELS:
        with torch.random.fork_rng(devices=[]):
            assert found[name] == pytest.approx(answer(name), rel=1e-10, abs=1e-12)
