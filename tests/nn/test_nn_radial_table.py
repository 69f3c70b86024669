"""Splines in place of radial networks: against the network, finite differences, and in use."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import Tensor
from typer.testing import CliRunner

from mlip import Calculator
from mlip.cli.app import app
from mlip.errors import InputError
from mlip.models import create_model
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.radial import uniform_gaussians
from mlip.nn.radial_table import RadialTable
from mlip.potential import Potential

CUTOFF = 5.0


def basis(distance: Tensor) -> Tensor:
    return uniform_gaussians(distance, 12, CUTOFF)


@pytest.fixture
def network() -> EdgeRadialMLP:
    torch.manual_seed(0)
    network = EdgeRadialMLP(3, 12, 16, 37).double().requires_grad_(False)
    network.source_embedding.weight.normal_()
    network.target_embedding.weight.normal_()
    return network


@pytest.mark.parametrize("variable", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_those_of_the_network(monkeypatch, network, variable, dtype):
    monkeypatch.setenv("MLIP_BACKEND", variable)
    generator = torch.Generator().manual_seed(1)
    distance = torch.rand(200, generator=generator, dtype=torch.float64) * CUTOFF
    distance[:2] = torch.tensor([0.0, CUTOFF])
    source, target = torch.randint(0, 3, (2, 200), generator=generator)
    exact = network(basis(distance), source, target)
    network.tabulate(basis, CUTOFF)
    network.table.add([(0, 1), (2, 2)])
    network.table.add(
        [(a, b) for a in range(3) for b in range(3) if (a, b) not in ((0, 1), (2, 2))]
    )
    found = network(distance[:, None].to(dtype), source, target)
    assert found.dtype == dtype
    tolerance = {torch.float64: 3 * network.table.error, torch.float32: 1e-4}[dtype]
    assert (found - exact).abs().max() < tolerance * exact.abs().max()
    assert 0 < network.table.error < 1e-7


@pytest.mark.parametrize("variable", ["auto", "torch"])
def test_derivatives_are_those_of_the_splines(monkeypatch, network, variable):
    monkeypatch.setenv("MLIP_BACKEND", variable)
    network.tabulate(basis, CUTOFF)
    network.table.add([(0, 1)])
    distance = torch.tensor([[0.4], [1.7], [4.9]], dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])
    assert torch.autograd.gradcheck(lambda r: network(r, *rows), (distance,))


def test_intervals_double_until_the_error_is_small():
    def sharp(distance: Tensor, source: int, target: int) -> Tensor:  # noqa: ARG001
        return torch.tanh((distance - 2 - source) * (3 + 30 * source))[:, None]

    table = RadialTable(sharp, CUTOFF, 2)
    table.add([(0, 0)])
    before = table.size
    table.add([(1, 0)])
    assert table.size > 2 * before  # the first pair was made finer as well
    assert table.error < 1e-7
    distance = torch.linspace(0, CUTOFF, 999, dtype=torch.float64)
    for source in (0, 1):
        rows = torch.full((999,), source), torch.zeros(999, dtype=torch.int64)
        found = table(distance, *rows)
        torch.testing.assert_close(found, sharp(distance, source, 0), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def potential() -> Potential:
    torch.manual_seed(0)
    settings = {
        "elements": (29, 47), "layers": 2, "lmax": 2, "mmax": 1, "channels": 16, "cutoff": 4.0,
        "attention_hidden": 16, "heads": 2, "alpha_channels": 4, "value_channels": 8,
        "feed_forward_hidden": 8, "edge_channels": 8,
    }  # fmt: skip
    model = create_model("equiformer_v3", settings)
    return Potential(model).to_dtype(torch.float64).requires_grad_(False)


@pytest.fixture
def alloy():
    atoms = bulk("Cu", a=3.7, cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.symbols[0] = "Ag"
    return atoms


def test_calculator_with_splines(potential, alloy, caplog):
    alloy.calc = Calculator(potential)
    exact = alloy.get_potential_energy(), alloy.get_forces(), alloy.get_stress()
    with caplog.at_level("INFO", logger="mlip"):
        alloy.calc = Calculator(potential, tabulate=True)
        assert alloy.get_potential_energy() == pytest.approx(exact[0], abs=1e-7)
        np.testing.assert_allclose(alloy.get_forces(), exact[1], atol=1e-7)
        np.testing.assert_allclose(alloy.get_stress(), exact[2], atol=1e-8)
    assert alloy.get_potential_energy() != exact[0]
    reports = [text for text in caplog.messages if "Cu, Ag: largest error" in text]
    assert len(reports) == 1
    assert "radial networks as splines" in alloy.calc.description
    assert potential.model.tabulated is None

    moved = [alloy.copy() for _ in range(2)]
    for sign, atoms in zip((1, -1), moved, strict=True):
        atoms.positions[1, 2] += sign * 1e-4
        atoms.calc = alloy.calc
    energies = [atoms.get_potential_energy() for atoms in moved]
    slope = (energies[1] - energies[0]) / 2e-4
    assert alloy.get_forces()[1, 2] == pytest.approx(slope, abs=1e-8)

    again = pickle.loads(pickle.dumps(alloy.calc))
    assert again.parameters["tabulate"]
    assert again.get_potential_energy(alloy) == pytest.approx(
        alloy.get_potential_energy(), abs=1e-12
    )


def test_models_without_radial_networks_are_refused():
    with pytest.raises(InputError, match="tabulate is for EquiformerV3; this potential is a Facet"):
        Calculator("mlearn-facet", tabulate=True)


def test_md_prints_the_error(potential, alloy, tmp_path):
    potential.save(tmp_path / "v3.safetensors")
    alloy.write(tmp_path / "alloy.extxyz")
    command = ["md", str(tmp_path / "alloy.extxyz"), "-p", str(tmp_path / "v3.safetensors")]
    result = CliRunner().invoke(
        app, [*command, "--steps", "2", "--temperature", "10", "--tabulate"]
    )
    assert result.exit_code == 0, result.output
    assert "radial networks as splines, Cu, Ag: largest error" in result.output
