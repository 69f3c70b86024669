"""Potentials with sane physics for tests of simulations: a Morse crystal and a small network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from mlip.models import create_model
from mlip.models.facet import Facet
from mlip.models.facet_config import FacetConfig
from mlip.ops import segment_sum
from mlip.potential import Potential


class MorseModel(nn.Module):
    """Pair energies of copper after Girifalco and Weizer (1959), smooth at the cutoff."""

    def __init__(self, cutoff: float = 6.0, poison: float | None = None) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.elements = (29,)
        self.poison = poison
        self.depth = nn.Parameter(torch.tensor(0.3429, dtype=torch.float64))
        self.config = SimpleNamespace(model_dump=lambda **_: {"cutoff": cutoff})

    def forward(self, graph) -> torch.Tensor:
        distance = graph.edge_vector.norm(dim=1)
        x = distance / self.cutoff
        envelope = torch.where(x < 1, 1 - 10 * x**3 + 15 * x**4 - 6 * x**5, torch.zeros_like(x))
        attraction = torch.exp(-1.3588 * (distance - 2.866))
        energy = 0.5 * self.depth * (attraction**2 - 2 * attraction) * envelope
        if self.poison is not None:
            energy = energy + torch.where(distance < self.poison, torch.nan, 0.0)
        return segment_sum(energy, graph.edge_index[1], graph.num_nodes)


@pytest.fixture
def morse() -> Potential:
    """Smooth pair potential of copper, float64."""
    return Potential(MorseModel())


@pytest.fixture
def poisoned() -> Potential:
    """The same, but NaN when a pair comes closer than 2.3 Å."""
    return Potential(MorseModel(poison=2.3))


@pytest.fixture(scope="session")
def facet() -> Potential:
    """A small network with random weights for copper and silicon, float32."""
    config = FacetConfig(elements=(14, 29), cutoff=4.0, hidden=((8, 4, 4), (8, 4, 4)), embedding=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Facet(config)
    return Potential(model, scale=0.1, zbl=True, reference_energies={14: -5.0, 29: -3.0}).eval()


def direct_potential(**changes) -> Potential:
    """A small network with random weights for copper whose forces come from heads, float32."""
    settings = {
        "elements": (29,), "cutoff": 4.0, "layers": 1, "lmax": 2, "channels": 4, "heads": 1,
        "attention_hidden": 4, "alpha_channels": 2, "value_channels": 2, "feed_forward_hidden": 4,
        "edge_channels": 4, "n_radial": 4, "prediction": "direct",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Potential(create_model("equiformer_v3", settings | changes)).eval()


@pytest.fixture
def direct() -> Potential:
    """Forces and stress of heads."""
    return direct_potential()


@pytest.fixture
def direct_without_stress() -> Potential:
    """Forces of heads, no stress."""
    return direct_potential(direct_stress=False)


@pytest.fixture
def copper() -> Atoms:
    """Rattled copper, 8 atoms, periodic."""
    atoms = bulk("Cu", "fcc", a=3.6) * (2, 2, 2)
    atoms.rattle(0.05, seed=3)
    return atoms
