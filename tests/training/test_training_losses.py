"""Loss terms: closed forms, missing labels, additivity over processes, error sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip.datasets import Structure, structure_to_graph
from mlip.graph import batch_graphs
from mlip.penalty import penalty
from mlip.potential import Prediction
from mlip.training.config import LossConfig
from mlip.training.losses import (
    Weights,
    label_counts,
    loss_terms,
    residuals,
    structure_losses,
    weighted_loss,
    weights_at,
)
from mlip.training.metrics import GPA, ErrorSums, batch_sums

WEIGHTS = Weights(2.0, 3.0, 5.0)
CONFIG = LossConfig()


def graph_of(atoms: Atoms, **labels):
    labels = {"energy": -1.5 * len(atoms), **labels}
    structure = Structure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, **labels)
    return structure_to_graph(structure, 3.0, index=0)


def copper(n: int, seed: int = 0, **labels):
    positions = np.random.default_rng(seed).uniform(0, 6, (n, 3))
    return graph_of(Atoms(f"Cu{n}", positions, cell=np.eye(3) * 6, pbc=True), **labels)


def full(n: int, seed: int):
    random = np.random.default_rng(seed)
    return copper(n, seed, forces=random.normal(size=(n, 3)), stress=np.diag(random.normal(size=3)))


def off_by(graph, seed: int = 1, *, requires_grad: bool = False) -> tuple[Prediction, list]:
    """A prediction some way off the labels (and off zero where there are none)."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for label in (graph.energy, graph.forces, graph.stress):
        noise = torch.randn(label.shape, generator=generator, dtype=torch.float64)
        leaves.append((label.nan_to_num() + noise).requires_grad_(requires_grad))
    energy, forces, stress = leaves
    return Prediction(energy, torch.zeros(len(forces)), forces, stress), leaves


def loss_of(prediction: Prediction, graph) -> torch.Tensor:
    found = residuals(prediction, graph)
    return weighted_loss(loss_terms(found, CONFIG), label_counts(found), WEIGHTS)


@pytest.mark.parametrize("x", [0.0, 1e-9, 0.003, 0.01, 0.2, -7.0])
def test_penalties_have_their_closed_forms(x: float) -> None:
    value = torch.tensor([x], dtype=torch.float64)
    delta = 0.01
    truth = torch.nn.functional.smooth_l1_loss(value, torch.zeros_like(value), beta=delta)
    assert float(penalty(value, "huber", delta)) == pytest.approx(float(truth), abs=1e-15)
    assert float(penalty(value, "l1", delta)) == abs(x)
    assert float(penalty(value, "mse", delta)) == pytest.approx(x * x)
    for kind in ("huber", "l1", "mse"):
        assert torch.autograd.gradcheck(
            lambda v, kind=kind: penalty(v, kind, delta), value.detach().add(1e-4).requires_grad_()
        )
        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(penalty(leaf, kind, delta).sum(), leaf)
        assert torch.isfinite(gradient).all()


def test_penalty_does_not_depend_on_orientation() -> None:
    rows = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    for kind in ("huber", "l1", "mse"):
        torch.testing.assert_close(penalty(rows, kind, 1.0), penalty(rows @ rotation, kind, 1.0))


def test_missing_labels_have_no_influence() -> None:
    known, without = full(3, 0), copper(4, 1)
    batch = batch_graphs([known, without])
    prediction, leaves = off_by(batch, requires_grad=True)
    loss = loss_of(prediction, batch)
    loss.backward()
    energy, forces, stress = leaves
    assert torch.isfinite(loss)
    assert (energy.grad != 0).all()
    assert (forces.grad[:3].norm(dim=1) > 0).all()
    assert (forces.grad[3:] == 0).all()
    assert (stress.grad[0] != 0).any()
    assert (stress.grad[1] == 0).all()
    alone = Prediction(energy[:1], forces[:3, 0], forces[:3], stress[:1])
    expected = loss_terms(residuals(alone, batch_graphs([known])), CONFIG)[1:]
    torch.testing.assert_close(loss_terms(residuals(prediction, batch), CONFIG)[1:], expected)


def test_stress_of_a_slab_is_left_out() -> None:
    slab = graph_of(Atoms("Cu", cell=np.eye(3) * 6, pbc=(True, True, False)))
    slab.stress = torch.zeros(1, 3, 3, dtype=torch.float64)
    prediction, _ = off_by(slab)
    found = residuals(prediction._replace(stress=torch.full((1, 3, 3), torch.nan)), slab)
    assert label_counts(found).tolist() == [1, 0, 0, 0]
    assert torch.isfinite(loss_terms(found, CONFIG)).all()


def test_nan_prediction_is_seen_and_belongs_to_its_structure() -> None:
    batch = batch_graphs([full(3, 0), full(2, 1)])
    prediction, _ = off_by(batch)
    prediction.forces[4, 0] = torch.nan
    found = residuals(prediction, batch)
    assert math.isnan(float(loss_terms(found, CONFIG)[1]))
    table = structure_losses(found, batch, CONFIG)
    assert torch.isnan(table).tolist() == [[False] * 4, [False, True, False, False]]
    good = residuals(off_by(batch)[0], batch)
    torch.testing.assert_close(
        structure_losses(good, batch, CONFIG).sum(0), loss_terms(good, CONFIG)
    )


def test_loss_of_parts_adds_up_to_the_whole() -> None:
    graphs = [full(3, 0), copper(5, 1), full(2, 2)]
    whole = batch_graphs(graphs)
    prediction, _ = off_by(whole)
    found = residuals(prediction, whole)
    counts = label_counts(found)
    assert counts.tolist() == [3, 5, 2, 5]
    terms = loss_terms(found, CONFIG)
    mean = 2.0 * terms[0] / 3 + 3.0 * terms[1] / 5 + 5.0 * terms[2] / 2
    torch.testing.assert_close(weighted_loss(terms, counts, WEIGHTS), mean)
    parts = []
    for graphs_of_rank, rows, atoms in ((graphs[:2], slice(0, 2), slice(0, 8)),
                                        (graphs[2:], slice(2, 3), slice(8, 10))):  # fmt: skip
        local = Prediction(
            prediction.energy[rows], prediction.energies[atoms],
            prediction.forces[atoms], prediction.stress[rows],
        )  # fmt: skip
        parts.append(residuals(local, batch_graphs(graphs_of_rank)))
    split = sum(weighted_loss(loss_terms(part, CONFIG), counts, WEIGHTS) for part in parts)
    torch.testing.assert_close(split, loss_of(prediction, whole), rtol=1e-14, atol=0)


def test_wrong_stress_sign_raises_the_loss() -> None:
    batch = batch_graphs([full(3, 0)])
    right = Prediction(batch.energy, batch.energy, batch.forces, batch.stress)
    assert float(loss_of(right, batch)) == 0.0
    assert float(loss_of(right._replace(stress=-batch.stress), batch)) > 1.0


def test_energy_counts_per_atom() -> None:
    for n in (1, 10):
        graph = batch_graphs([copper(n)])
        prediction = Prediction(graph.energy + 0.5 * n, graph.energy, None, None)
        assert float(residuals(prediction, graph).energy.values) == pytest.approx(0.5)


def test_energy_weight_switches_late() -> None:
    config = LossConfig(energy_weight=1, energy_weight_final=50, switch_fraction=0.7)
    assert [weights_at(config, p).energy for p in (0, 0.69, 0.7, 1)] == [1, 1, 50, 50]
    assert weights_at(LossConfig(energy_weight=4), 1.0).energy == 4


def test_error_sums_equal_numpy() -> None:
    graphs = [full(3, 0), copper(5, 1), full(2, 2)]
    sums, errors = ErrorSums(), {"energy": [], "forces": [], "stress": []}
    for group in (graphs[:2], graphs[2:]):
        batch = batch_graphs(group)
        prediction, _ = off_by(batch)
        sums.add(batch_sums(residuals(prediction, batch), None, CONFIG))
        atoms = torch.bincount(batch.batch)
        errors["energy"].append(((prediction.energy - batch.energy) / atoms).numpy())
        errors["forces"].append((prediction.forces - batch.forces).numpy().ravel())
        errors["stress"].append((prediction.stress - batch.stress).numpy().ravel())
    result = sums.result(WEIGHTS)
    for name, unit, scale in (
        ("energy", "meV_per_atom", 1e3), ("forces", "meV_per_A", 1e3), ("stress", "GPa", GPA),
    ):  # fmt: skip
        x = np.concatenate(errors[name]) * scale
        x = x[~np.isnan(x)]
        assert result[f"{name}_mae_{unit}"] == pytest.approx(np.abs(x).mean(), rel=1e-12)
        assert result[f"{name}_rmse_{unit}"] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-12)
    assert math.isnan(ErrorSums().result(WEIGHTS)["stress_mae_GPa"])
