"""Noise on positions: what is drawn, what moves, neighbours, and the loss of a batch with noise."""

from __future__ import annotations

from collections.abc import Callable

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list as ase_neighbor_list

from mlip.datasets import Structure, open_dataset, structure_to_graph
from mlip.datasets.feed.loader import read_batch
from mlip.datasets.feed.noise import PositionNoise
from mlip.errors import InputError
from mlip.graph import batch_graphs
from mlip.potential import Potential, Prediction
from mlip.training.config import DenoisingConfig, LossConfig, build_config
from mlip.training.losses import (
    Units,
    Weights,
    label_counts,
    loss_terms,
    residuals,
    structure_losses,
    units_of,
    weighted_loss,
)
from mlip.training.metrics import ErrorSums, batch_sums
from mlip.training.run import train


def published(seed: int, **changes: float) -> PositionNoise:
    """The noise of the published runs, with changes."""
    settings = DenoisingConfig(**changes)
    return PositionNoise(seed, **settings.model_dump(exclude={"weight"}))


ALWAYS = published(3, probability=1.0)
CUTOFF = 4.0


def draw(
    recipe: PositionNoise, forces: np.ndarray, fixed: np.ndarray | None = None, index: int = 0
):
    fixed = np.zeros(len(forces), dtype=bool) if fixed is None else fixed
    return recipe.at(0, 0).draw(index, forces, fixed)


def test_half_of_the_batches_and_half_of_the_atoms_have_noise_of_width_one() -> None:
    recipe = published(1, strict_max_ratio=1.0)
    coins = [recipe.at(epoch, step) is not None for epoch in range(4) for step in range(500)]
    assert np.mean(coins) == pytest.approx(0.5, abs=0.04)  # 3.6 standard deviations
    found = draw(published(1, probability=1.0), np.zeros((20_000, 3)))
    assert found.mask.mean() == pytest.approx(0.5, abs=0.015)
    assert (found.noise[~found.mask] == 0).all()
    moved = found.noise[found.mask]
    assert moved.std() == pytest.approx(1.0, abs=0.02)
    assert moved.mean(0) == pytest.approx([0, 0, 0], abs=0.05)


def test_draws_depend_on_seed_place_and_structure_alone() -> None:
    forces, fixed = np.zeros((50, 3)), np.zeros(50, dtype=bool)

    def noise(seed: int, epoch: int, step: int, index: int) -> bytes:
        recipe = published(seed, probability=1.0)
        return recipe.at(epoch, step).draw(index, forces, fixed).noise.tobytes()

    places = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]
    assert len({noise(*place) for place in places}) == len(places)
    assert [noise(*place) for place in places] == [noise(*place) for place in reversed(places)][
        ::-1
    ]


def test_structures_are_left_alone_for_a_reason_and_fixed_atoms_stay() -> None:
    forces = np.zeros((8, 3))
    forces[5] = [2.0, 2.0, 0.0]  # 2.83 eV/Å
    assert draw(published(0, probability=1.0, max_force=2.8), forces) is None
    assert draw(published(0, probability=1.0, max_force=2.9), forces) is not None
    forces[2, 1] = np.nan
    assert draw(ALWAYS, forces) is None
    pair = [draw(ALWAYS, np.zeros((2, 3)), index=i) for i in range(400)]
    assert np.mean([found is None for found in pair]) == pytest.approx(0.25, abs=0.08)  # both atoms
    assert all(found is None or found.mask.sum() < 2 for found in pair)
    fixed = np.arange(3000) % 2 == 0
    found = draw(ALWAYS, np.zeros((3000, 3)), fixed)
    assert not found.mask[fixed].any()
    assert (found.noise[fixed] == 0).all()
    assert found.mask[~fixed].mean() == pytest.approx(0.5, abs=0.06)


@pytest.fixture
def mixed_file(emt_frame: Callable[..., Atoms], tmp_path):
    """Frames with, without and with fixed atoms; one without forces."""
    from ase.constraints import FixAtoms

    frames = [emt_frame(i, size=(1 + i % 2, 1, 1)) for i in range(6)]
    frames[1].set_constraint(FixAtoms([0, 1]))
    frames[2].calc.results.pop("forces")
    path = tmp_path / "frames.extxyz"
    ase.io.write(path, frames)
    return path


def test_neighbours_are_those_of_the_corrupted_positions_however_they_are_read(mixed_file) -> None:
    dataset = open_dataset(mixed_file)
    graphs = [structure_to_graph(dataset[i], CUTOFF, index=i) for i in range(len(dataset))]
    before = [graph.positions.clone() for graph in graphs]
    noise = published(5, probability=1.0, sigma=0.2, strict_max_ratio=0.9).at(2, 7)
    order = [4, 0, 2, 1, 5, 3]
    one = noise.corrupt_graphs([graphs[i] for i in order])
    two = read_batch(dataset, order, CUTOFF, noise).to_graph()
    for field in set(one.keys()) | set(two.keys()):
        torch.testing.assert_close(one[field], two[field], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(graph.positions, p) for graph, p in zip(graphs, before, strict=True))
    assert not one.noisy[2], "no forces"
    assert one.noisy.sum() >= 3
    assert torch.equal(one.clean_forces[one.noise_mask], one.forces[one.noise_mask])
    assert (one.clean_forces[~one.noise_mask] == 0).all()
    shift = one.positions - torch.cat([before[i] for i in order])
    torch.testing.assert_close(shift, 0.2 * one.noise, atol=1e-13, rtol=0)
    for k, i in enumerate(order):
        atoms = dataset[i].to_atoms()
        atoms.positions = one.positions[one.batch == k].numpy()
        target, source = ase_neighbor_list("ij", atoms, CUTOFF)
        here = one.edge_index[:, one.batch[one.edge_index[1]] == k] - one.ptr[k]
        pairs = list(zip(source.tolist(), target.tolist(), strict=True))
        assert sorted(map(tuple, here.T.tolist())) == sorted(pairs)


def noisy_batch():
    """Two structures, the first with noise on two of three atoms; both with all labels."""
    random = np.random.default_rng(0)
    graphs = []
    for n in (3, 2):
        structure = Structure(
            np.full(n, 29), random.uniform(0, 6, (n, 3)), 6 * np.eye(3), np.ones(3, dtype=bool),
            energy=-1.5 * n, forces=random.normal(size=(n, 3)), stress=np.diag([0.1, 0.2, -0.3]),
        )  # fmt: skip
        graphs.append(structure_to_graph(structure, 3.0, index=n))
    batch = batch_graphs(graphs)
    batch.noise = torch.from_numpy(random.normal(size=(5, 3)))
    batch.noise_mask = torch.tensor([True, False, True, False, False])
    batch.noisy = torch.tensor([True, False])
    off = [torch.from_numpy(random.normal(size=shape)) for shape in ((2,), (5, 3), (2, 3, 3))]
    prediction = Prediction(batch.energy + off[0], off[0], off[1], batch.stress + off[2])
    return batch, prediction, off


def test_published_loss_equals_a_hand_computation() -> None:
    batch, prediction, (energy, forces, stress) = noisy_batch()
    scale, direct_scale, weight = 0.8, 1.7, 10.0
    config = LossConfig(
        kind="l1", normalised=True, stress_by_component=True,
        energy_weight=20, forces_weight=20, stress_weight=5,
    )  # fmt: skip
    units = Units(direct_scale, scale)
    weights = Weights(20, 20, 5, weight)
    found = residuals(prediction, batch, units)
    loss = weighted_loss(loss_terms(found, config, units), label_counts(found), weights)

    per_atom = [
        weight * np.linalg.norm(forces[i].numpy() / direct_scale - batch.noise[i].numpy())
        if batch.noise_mask[i]
        else 20 * np.linalg.norm((forces[i] - batch.forces[i]).numpy() / scale)
        for i in range(5)
    ]
    by_hand = 20 * np.mean([abs(float(energy[0])) / 3, abs(float(energy[1])) / 2]) / scale
    by_hand += np.mean(per_atom)
    by_hand += 5 * np.abs(stress[1].numpy()).mean() / scale / 2  # the noisy one counts as zero
    assert float(loss) == pytest.approx(by_hand, rel=1e-13)

    sums = ErrorSums()
    sums.add(batch_sums(found, None, config, units))
    assert sums.result(weights)["loss"] == pytest.approx(by_hand, rel=1e-13)
    clean = (forces - batch.forces)[~batch.noise_mask].numpy()
    error = sums.result(weights)["forces_mae_meV_per_A"]
    assert error == pytest.approx(1e3 * np.abs(clean).mean(), rel=1e-12)
    table = structure_losses(found, batch, config, units).sum(0)
    torch.testing.assert_close(table, loss_terms(found, config, units))


def test_a_loss_cannot_be_normalised_by_several_scales() -> None:
    class Model(torch.nn.Module):
        elements, cutoff = (1, 8), 3.0

    config = LossConfig(normalised=True)
    assert units_of(Potential(Model(), scale=0.4), config) == Units(1.0, 0.4)
    with pytest.raises(InputError, match=r"loss\.normalised"):
        units_of(Potential(Model(), scale={1: 0.4, 8: 0.5}), config)


@pytest.mark.parametrize("model", [{}, {"name": "equiformer_v3", "prediction": "direct"}])
def test_denoising_needs_a_model_for_it(settings, model: dict) -> None:
    config = build_config(settings(model=model, denoising={}))
    with pytest.raises(InputError, match=r"denoising is set, but.*model\.denoising=true"):
        train(config)
