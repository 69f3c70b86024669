"""A small potential in a file, and structures that it can treat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ase.build import bulk
from ase.io import write

from mlip.models.facet import Facet
from mlip.models.facet_config import FacetConfig
from mlip.potential import Potential


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Random weights with a weak scale and short-range repulsion: soft, but it holds."""
    config = FacetConfig(elements=(14, 29), cutoff=4.0, hidden=((8, 4, 4), (8, 4, 4)), embedding=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Facet(config)
    potential = Potential(network, scale=0.1, zbl=True, metadata={"licence": "none, a test"})
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    potential.save(path)
    return path


@pytest.fixture
def structures(tmp_path) -> Path:
    """Two rattled crystals."""
    frames = [bulk("Cu", "fcc", a=3.6, cubic=True), bulk("Si", "diamond", a=5.43)]
    for atoms in frames:
        atoms.rattle(0.05, seed=1)
    path = tmp_path / "in.extxyz"
    write(path, frames)
    return path
