"""EquiformerV3: settings, direct heads, denoising, edges along the polar axis."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip.errors import InputError
from mlip.graph import atoms_to_graph, batch_graphs
from mlip.models import create_model, model_name
from mlip.nn.sphere_feed_forward import SphereFeedForward
from mlip.nn.sphere_product import SphereBasis
from mlip.potential import Potential
from tests.contract.models import SMALL_EQUIFORMER

SMALL = {
    **SMALL_EQUIFORMER,
    "elements": (11, 17, 29),
    "lmax": 3,
    "mmax": 2,
    "average_degree": 5.0,
}


def small_potential(**changes) -> Potential:
    """Potential with random weights, always the same ones."""
    options = {name: changes.pop(name) for name in ("scale", "direct_scale") if name in changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = create_model("equiformer_v3", SMALL | changes).double().eval()
    return Potential(model, **options)


def molecule() -> Atoms:
    """A molecule with a bond exactly along y and one 0.5 mrad away from it."""
    positions = [[0, 0, 0], [0, 2.4, 0], [1.9, -0.6, 0.8], [1.9012, 1.8, 0.8], [-1.2, 0.9, 1.7]]
    return Atoms("NaClCu2Cl", positions=positions)


def predict(potential: Potential, atoms: Atoms, **options):
    return potential(atoms_to_graph(atoms, potential.cutoff), stress=False, **options)


def turned(atoms: Atoms) -> tuple[Atoms, np.ndarray]:
    """Rotate a copy by a fixed rotation."""
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    q *= np.sign(np.linalg.det(q))
    copied = atoms.copy()
    copied.positions = atoms.positions @ q.T
    return copied, q


def test_edges_along_the_polar_axis_pass_their_derivative():
    """The exact forces turn with the molecule; the published ones lose a part near ±y."""
    errors = {}
    for published in (False, True):
        potential = small_potential(published=published)
        other, q = turned(molecule())
        forces = predict(potential, molecule()).forces.numpy() @ q.T
        errors[published] = np.abs(forces - predict(potential, other).forces.numpy()).max()
        scale = np.abs(forces).max()
    assert errors[False] < 1e-12 * max(1, scale)
    assert errors[True] > 1e-5 * scale


def test_published_setting_only_matters_near_the_axis():
    atoms, _ = turned(molecule())
    exact, published = (predict(small_potential(published=p), atoms) for p in (False, True))
    assert torch.equal(exact.forces, published.forces)


@pytest.mark.parametrize("prediction", ["gradient", "direct"])
def test_no_edges(prediction):
    prediction = small_potential(prediction=prediction)(
        batch_graphs([atoms_to_graph(Atoms("Cu", cell=np.eye(3) * 9, pbc=True), 4.2)] * 2)
    )
    assert torch.isfinite(prediction.energy).all()
    assert torch.isfinite(prediction.stress).all()
    assert not prediction.forces.any()


def test_only_the_nearest_neighbours_count():
    """The model drops edges as the graph does when it is built with max_neighbors."""
    atoms = Atoms("Cu6", positions=np.random.default_rng(1).uniform(0, 4, (6, 3)), pbc=True)
    atoms.set_cell(np.eye(3) * 5.0)
    limited, free = small_potential(max_neighbors=7), small_potential()
    expected = free(atoms_to_graph(atoms, 4.2, max_neighbors=7))
    found = limited(atoms_to_graph(atoms, 4.2))
    assert abs(float(free(atoms_to_graph(atoms, 4.2)).energy - expected.energy)) > 1e-8
    torch.testing.assert_close(found.energy, expected.energy, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=1e-12)


def test_exact_published_grids_give_the_numbers_of_the_smallest():
    """Any grid fine enough is exact, so the choice does not show."""
    plain = predict(small_potential(), molecule())
    grids = {"attention_grid": (10, 8), "feed_forward_grid": (10, 10)}
    assert torch.equal(predict(small_potential(**grids), molecule()).forces, plain.forces)


def test_inexact_grids_need_the_published_setting():
    with pytest.raises(InputError, match="breaks rotational symmetry"):
        create_model("equiformer_v3", SMALL | {"attention_grid": (8, 8)})
    coarse = predict(small_potential(attention_grid=(8, 6), published=True), molecule())
    exact = predict(small_potential(published=True), molecule())
    assert (coarse.energy - exact.energy).abs() > 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mmax": 4}, "mmax must not exceed lmax"),
        ({"denoising": True}, "denoising needs prediction: direct"),
        ({"elements": (11, 11)}, "twice"),
        ({"softcap": 1.0}, "softcap"),
        ({"lmax": 1, "mmax": 1, "prediction": "direct"}, "lmax of 2"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        create_model("equiformer_v3", SMALL | change)


def test_direct_potential_saves_its_units(tmp_path):
    potential = small_potential(prediction="direct", scale=3.0, direct_scale=0.5)
    assert not potential.conservative
    assert model_name(potential.model) == "equiformer_v3"
    one = small_potential(prediction="direct")
    graph = atoms_to_graph(molecule(), 4.2)
    torch.testing.assert_close(potential(graph).forces, 0.5 * one(graph).forces)
    torch.testing.assert_close(potential(graph).energy, 3.0 * one(graph).energy)
    potential.save(tmp_path / "direct.safetensors")
    loaded = Potential.load(tmp_path / "direct.safetensors", dtype="float64")
    assert torch.equal(loaded(graph).forces, potential(graph).forces)
    assert loaded.direct_scale == 0.5


def test_direct_potential_refuses_what_it_cannot_have():
    model = small_potential(prediction="direct").model
    with pytest.raises(InputError, match="direct_scale"):
        Potential(model, scale={11: 1.0, 17: 2.0, 29: 1.0})
    with pytest.raises(InputError, match="zbl"):
        Potential(model, zbl=True)


def test_direct_potential_without_a_stress_head():
    potential = small_potential(prediction="direct", direct_stress=False)
    atoms = Atoms("Cu", cell=np.eye(3) * 3.0, pbc=True)
    assert potential(atoms_to_graph(atoms, 4.2)).stress.isnan().all()


def noisy_batch(mask: list[bool]):
    """Two molecules, the second with noise on the atoms of a mask."""
    batch = batch_graphs([atoms_to_graph(molecule(), 4.2)] * 2)
    generator = torch.Generator().manual_seed(2)
    batch.clean_forces = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    batch.noise_mask = torch.tensor([False] * 5 + mask)
    batch.noisy = torch.tensor([False, True])
    batch.pbc = torch.ones(2, 3, dtype=torch.bool)
    return batch


def test_denoising_touches_the_noisy_structure_alone():
    potential = small_potential(prediction="direct", denoising=True)
    found = potential(noisy_batch([True, False, False, True, False]))
    plain = potential(atoms_to_graph(molecule(), 4.2))
    torch.testing.assert_close(found.forces[:5], plain.forces, rtol=0, atol=1e-13)
    assert (found.energy[1] - found.energy[0]).abs() > 1e-6
    assert found.stress[0].abs().max() > 0
    assert not found.stress[1].any()


def test_denoising_without_corrupted_atoms_changes_no_forces():
    potential = small_potential(prediction="direct", denoising=True)
    found = potential(noisy_batch([False] * 5))
    torch.testing.assert_close(found.forces[5:], found.forces[:5], rtol=0, atol=1e-13)


def test_denoising_turns_with_the_structure():
    """Known forces are vectors: noise and forces turn with them."""
    potential = small_potential(prediction="direct", denoising=True)
    mask = [True, False, True, True, False]
    start = noisy_batch(mask)
    _, q = turned(molecule())
    matrix = torch.from_numpy(q)
    other = copy.copy(start)
    other.positions = start.positions @ matrix.T
    other.clean_forces = start.clean_forces @ matrix.T
    a, b = potential(start), potential(other)
    torch.testing.assert_close(b.energy, a.energy, rtol=0, atol=1e-11)
    torch.testing.assert_close(b.forces, a.forces @ matrix.T, rtol=0, atol=1e-11)
    other.clean_forces = start.clean_forces
    assert (potential(other).energy - a.energy).abs().max() > 1e-6


@pytest.mark.parametrize("option", [{"attention_dropout": 0.5}, {"drop_path": 0.5}])
def test_random_parts_are_random_in_training_alone(option):
    potential = small_potential(**option)
    plain = predict(small_potential(), molecule()).energy
    assert torch.equal(predict(potential, molecule()).energy, plain)
    potential.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        energies = {float(predict(potential, molecule()).energy) for _ in range(8)}
    assert len(energies) > 2


def test_starts_as_published():
    """Zero biases, small embeddings of elements on edges, 1/√2 where two scalar paths meet."""
    model = create_model("equiformer_v3", SMALL | {"channels": 64, "feed_forward_hidden": 64})
    block = model.blocks[0]
    assert block.attention.radial.source_embedding.weight.abs().max() <= 0.001
    assert not block.feed_forward.linear_1.bias.any()
    first, second = block.feed_forward.linear_2.weight.detach()[:2]
    assert first.std() / second.std() == pytest.approx(np.sqrt(0.5), rel=0.05)
    assert second.std() == pytest.approx(1 / np.sqrt(3 * 64), rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"prediction": "direct"}, {"max_neighbors": 6}])
def test_inference_by_groups_equals_the_definition(monkeypatch, settings):
    """Small groups that recompute, against the whole graph through autograd."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr("mlip.nn.attention_edges.EDGES_PER_GROUP", 10)
    monkeypatch.setattr("mlip.nn.sphere_feed_forward.ATOMS_PER_GROUP", 3)
    potential = small_potential(**settings)
    for parameter in potential.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.1, seed=1)
    far = Atoms("NaCl", [[0, 0, 0], [0, 0, 40.0]])  # atoms without an edge
    graph = batch_graphs([atoms_to_graph(a, potential.cutoff) for a in (atoms, far, atoms[:3])])
    for found, expected in zip(potential(graph), potential(graph, create_graph=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("trainable", [True, False])
def test_inference_follows_a_fused_optimiser(trainable):
    """Which counts no version; the potential is frozen again before it is evaluated, or is not."""
    potential = small_potential().requires_grad_(trainable)
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.rattle(0.1, seed=1)
    graph = atoms_to_graph(atoms, potential.cutoff)
    first = potential(graph)
    potential.requires_grad_(True)
    potential(graph, create_graph=True).forces.square().sum().backward()
    optimizer = torch.optim.AdamW(potential.parameters(), lr=0.1, fused=True)
    optimizer.step()
    optimizer.zero_grad()
    found = potential.requires_grad_(trainable)(graph)
    assert (found.energy - first.energy).abs() > 1e-6
    for own, exact in zip(found, copy.deepcopy(potential)(graph, create_graph=True), strict=True):
        torch.testing.assert_close(own, exact, rtol=0, atol=1e-10)


def test_folded_weights_follow_the_weights():
    layer = SphereFeedForward(SphereBasis(2, 2, in_frame=False), 3, 4).double()
    x = torch.randn(5, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for change in (0.0, 0.3):
        with torch.no_grad():
            layer.contract.weight += change
            layer.linear_1.bias += change
            torch.testing.assert_close(layer.infer(x), layer(x), rtol=0, atol=1e-12)
