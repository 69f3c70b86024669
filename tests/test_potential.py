"""Potential: its energy formula, what it returns, and its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlip.errors import CheckpointError, InputError, UnknownElementError
from mlip.graph import BareGraph, atoms_to_graph, batch_graphs, edge_vectors
from mlip.models import create_model
from mlip.nn.zbl import COULOMB
from mlip.potential import Potential, load_potential

FACET = {"elements": (8, 29), "cutoff": 4.0, "hidden": ((4, 2), (4, 2)), "embedding": 4}


def make(**settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = create_model("facet", FACET)
    return Potential(model, **settings).to_dtype(torch.float64).eval()


def copper():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=2)
    return atoms


def graph_of(*structures):
    graphs = [atoms_to_graph(atoms, 4.0) for atoms in structures]
    return graphs[0] if len(graphs) == 1 else batch_graphs(graphs)


def oxide():
    atoms = Atoms("Cu2O3", positions=np.random.default_rng(3).uniform(0, 4, (5, 3)))
    atoms.positions *= [1.0, 1.2, 1.4]
    return atoms


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = {"level of theory": "PBE", "licence": "MIT", "D3": False, "metrics": {"F": [0.1]}}
    references = {8: -3.1234567890123456, 29: 1 / 3}
    make(reference_energies=references, scale={8: 2.0, 29: 0.1}, metadata=metadata).save(path)
    return path


def test_energy_is_reference_plus_shift_plus_scaled_node_energy():
    graph = graph_of(oxide())
    plain = make()(graph)
    references, scale, shift = {8: -4.0, 29: 2.5}, {8: 3.0, 29: 0.5}, {8: 0.25, 29: -1.0}
    full = make(reference_energies=references, scale=scale, shift=shift)(graph)
    numbers = graph.atomic_numbers.tolist()
    expected = [
        references[z] + shift[z] + scale[z] * float(e)
        for z, e in zip(numbers, plain.energies, strict=True)
    ]
    np.testing.assert_allclose(full.energies, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(full.energy, [sum(expected)], rtol=0, atol=1e-12)


def test_references_and_shifts_change_no_force_bit():
    graph = graph_of(copper(), oxide())
    plain, shifted = make()(graph), make(reference_energies={8: -400.0, 29: 3e4}, shift=7.0)(graph)
    assert torch.equal(plain.forces, shifted.forces)
    torch.testing.assert_close(plain.stress, shifted.stress, rtol=0, atol=0, equal_nan=True)


def test_one_scale_for_all_scales_forces_and_stress():
    graph = graph_of(copper())
    plain, scaled = make()(graph), make(scale=3.0)(graph)
    torch.testing.assert_close(scaled.forces, 3 * plain.forces, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(scaled.stress, 3 * plain.stress, rtol=1e-12, atol=1e-14)


def test_large_references_do_not_eat_the_precision_of_float32():
    """Sums and references are float64: 1e5 eV per atom leaves the interaction untouched."""
    graph = graph_of(copper())
    plain = make().to_dtype(torch.float32)(graph)
    heavy = make(reference_energies={29: -1e5}).to_dtype(torch.float32)(graph)
    assert heavy.energy.item() + 4e5 == pytest.approx(plain.energy.item(), abs=1e-9)


def test_shapes_and_types():
    graph = graph_of(copper(), oxide(), Atoms("Cu"))
    for dtype in (torch.float32, torch.float64):
        prediction = make().to_dtype(dtype)(graph)
        shapes = [list(value.shape) for value in prediction]
        assert shapes == [[3], [10], [10, 3], [3, 3, 3]]
        assert all(value.dtype == torch.float64 for value in prediction)
        assert not any(value.requires_grad for value in prediction)


def test_stress_is_nan_unless_periodic_in_three_directions():
    wire, slab = copper(), copper()
    wire.pbc, slab.pbc = (False, False, True), (True, True, False)
    stress = make()(graph_of(copper(), molecule("O2"), slab, wire)).stress
    assert stress[0].isfinite().all()
    assert stress[1:].isnan().all()


def test_left_handed_cells_have_positive_volume():
    atoms = copper()
    mirrored = atoms.copy()
    mirrored.set_cell(atoms.cell.array[[1, 0, 2]])
    assert np.linalg.det(mirrored.cell) < 0
    potential = make()
    a, b = potential(graph_of(atoms)), potential(graph_of(mirrored))
    torch.testing.assert_close(a.stress, b.stress, rtol=0, atol=1e-12)


def test_predictions_work_without_grad_mode():
    potential, graph = make(), graph_of(copper())
    with torch.no_grad():
        inside = potential(graph)
    assert torch.equal(inside.forces, potential(graph).forces)
    with torch.inference_mode():
        energy = potential(graph, forces=False, stress=False).energy
    assert torch.equal(energy, inside.energy)


def test_zbl_dominates_at_short_distance():
    """Bare nuclei screened: e²/(4π ε0) Z² / r within a factor, and gone past the covalent radii."""
    pair = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.02]])
    energy = {zbl: make(zbl=zbl)(graph_of(pair)).energy.item() for zbl in (True, False)}
    coulomb = COULOMB * 29**2 / 0.02
    assert 0.6 * coulomb < energy[True] - energy[False] < coulomb
    pair.positions[1, 2] = 2.65  # twice the covalent radius of copper, 1.32 Å
    far = [make(zbl=zbl)(graph_of(pair)).energy.item() for zbl in (True, False)]
    assert far[0] == far[1]


def test_zbl_forces_and_stress_are_derivatives():
    potential, step = make(zbl=True, scale=0.0), 1e-4
    atoms = bulk("Cu", a=3.0, cubic=True)
    atoms.rattle(0.1, seed=4)
    forces = potential(graph_of(atoms)).forces
    for index in ((0, 0), (2, 1)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[index] += sign * step
            energies.append(potential(graph_of(moved)).energy.item())
        slope = (energies[0] - energies[1]) / (2 * step)
        assert forces[index].item() == pytest.approx(-slope, rel=1e-5, abs=1e-7)


def bare(graph):
    names = ("positions", "atomic_numbers", "cell", "pbc", "edge_index", "edge_shift", "cutoff")
    return BareGraph(**{name: getattr(graph, name).clone() for name in names})


@pytest.mark.parametrize("zbl", [False, True])
def test_bare_graphs_are_predicted_like_any_other(zbl):
    graph, potential = graph_of(copper()), make(zbl=zbl)
    known = bare(graph)
    known.edge_vector = edge_vectors(graph)
    for other in (bare(graph), known):
        for found, truth in zip(potential(other), potential(graph), strict=True):
            assert torch.equal(found, truth)
    assert not known.edge_vector.requires_grad


def test_known_edge_vectors_do_not_hide_positions_from_derivatives():
    """The Hessian of one atom, against differences of forces."""
    potential, step = make(), 1e-5
    graph = bare(graph_of(copper()))
    graph.edge_vector = edge_vectors(graph)
    graph.positions.requires_grad_(True)
    force = potential(graph, create_graph=True).forces[0, 0]
    (row,) = torch.autograd.grad(force, graph.positions)
    forces = []
    for sign in (1, -1):
        moved = bare(graph)
        moved.positions = graph.positions.detach().clone()
        moved.positions[1, 2] += sign * step
        forces.append(float(potential(moved).forces[0, 0]))
    assert abs(float(row[1, 2])) > 1e-3
    assert float(row[1, 2]) == pytest.approx((forces[0] - forces[1]) / (2 * step), rel=1e-5)


def test_bare_graphs_have_what_graphs_have():
    graph = graph_of(copper())
    found = bare(graph)
    assert (found.num_nodes, found.num_edges) == (graph.num_nodes, graph.num_edges)
    moved = found.to(torch.device("meta"))
    assert moved.positions.device.type == moved.cutoff.device.type == "meta"
    assert moved.edge_vector is None
    assert not hasattr(found, "forces")


def test_stress_for_a_loss_is_the_same():
    """Without derivatives it goes another way: cells in Python."""
    left = copper()
    left.set_cell(left.cell[[1, 0, 2]] @ [[1, 0.1, 0], [0, 1, -0.2], [0.1, 0, 1]], scale_atoms=True)
    slab = copper()
    slab.pbc = (True, True, False)
    graph, potential = graph_of(left, slab, copper()), make()
    found, truth = potential(graph).stress, potential(graph, create_graph=True).stress
    assert truth.requires_grad
    torch.testing.assert_close(found, truth.detach(), rtol=0, atol=1e-14, equal_nan=True)
    assert torch.isnan(found[1]).all()
    assert not torch.isnan(found[[0, 2]]).any()


def test_unknown_elements_are_named_before_anything_runs():
    potential = make()
    with pytest.raises(UnknownElementError, match=r"does not know Ni.*O, Cu"):
        potential(graph_of(Atoms("CuNi", positions=[[0, 0, 0], [2, 0, 0]])))
    with pytest.raises(UnknownElementError, match="atomic number 0"):
        potential(graph_of(Atoms("X")))


def test_graphs_of_too_short_a_cutoff_are_refused():
    with pytest.raises(InputError, match="cutoff"):
        make()(atoms_to_graph(copper(), 3.0))


def test_zbl_is_smooth_where_atoms_are_larger_than_the_cutoff():
    model = create_model("facet", {"elements": (55,), "cutoff": 4.0, "hidden": ((2, 2),)})
    potential = Potential(model, zbl=True, scale=0.0).to_dtype(torch.float64)
    pair = Atoms("Cs2", positions=[[0, 0, 0], [0, 0, 4.0 - 1e-6]])
    assert potential(graph_of(pair)).energy.item() == pytest.approx(0.0, abs=1e-10)


def test_attributes():
    potential = make(reference_energies={29: 1.5})
    assert (potential.cutoff, potential.elements) == (4.0, (8, 29))
    assert potential.reference_energies == {8: 0.0, 29: 1.5}
    assert potential.dtype == torch.float64
    assert potential.device.type == "cpu"


def test_hash_names_weights_and_settings_and_nothing_else():
    first = make()
    assert first.model_hash() == make().model_hash() == make(metadata={"a": 1}).model_hash()
    assert first.model_hash() != make(scale=2.0).model_hash()
    with torch.no_grad():
        next(first.parameters()).view(-1)[0] += 1e-6
    assert first.model_hash() != make().model_hash()


def test_everything_survives_the_round_trip(saved):
    loaded = Potential.load(saved, dtype="float64")
    assert loaded.reference_energies == {8: -3.1234567890123456, 29: 1 / 3}
    assert loaded.metadata["metrics"] == {"F": [0.1]}
    assert loaded.metadata["level of theory"] == "PBE"
    original = make(reference_energies=loaded.reference_energies, scale={8: 2.0, 29: 0.1})
    assert loaded.model_hash() == original.model_hash()
    graph = graph_of(copper(), oxide())
    for a, b in zip(loaded(graph), original(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not loaded.training


def test_zbl_survives_the_round_trip(tmp_path):
    path = tmp_path / "zbl.safetensors"
    make(zbl=True).save(path)
    graph = graph_of(Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.5]]))
    assert torch.equal(
        Potential.load(path, dtype="float64")(graph).energy, make(zbl=True)(graph)[0]
    )


def test_default_precision_is_single(saved):
    assert Potential.load(saved).dtype == torch.float32
    assert Potential.load(saved, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(InputError, match="float16"):
        Potential.load(saved, dtype="float16")


def test_loading_leaves_the_random_numbers_alone(saved):
    before = torch.get_rng_state()
    Potential.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_header_is_json_and_names_what_matters(saved):
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["mlip"])
    for key in ("format_version", "package_version", "model", "config", "elements", "cutoff"):
        assert key in header
    assert header["elements"] == ["O", "Cu"]
    assert header["zbl"] is False


def rewrite(path, change):
    """Write the file again with a changed header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mlip"])
    change(header)
    save_file(load_file(path), path, metadata={"mlip": json.dumps(header)})


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_files_are_refused(saved, keep):
    data = saved.read_bytes()
    count = int(keep * len(data)) if isinstance(keep, float) else keep
    saved.write_bytes(data[:count])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Potential.load(saved)


def test_foreign_files_are_refused(tmp_path):
    text, other = tmp_path / "text.safetensors", tmp_path / "other.safetensors"
    text.write_text("not a potential " * 50)
    save_file({"a": torch.zeros(3)}, other)
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle.pt")
    for path in (text, other, tmp_path / "pickle.pt"):
        with pytest.raises(CheckpointError, match=path.name):
            Potential.load(path)


def test_files_of_a_newer_format_say_which_version_to_get(saved):
    rewrite(saved, lambda header: header.update(format_version=99, package_version="7.1.0"))
    with pytest.raises(CheckpointError, match=r"99.*upgrade to mlip >= 7\.1\.0"):
        Potential.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["config"].update(embedding=5),
        lambda header: header["config"].update(surprise=1),
        lambda header: header.update(model="nonesuch"),
        lambda header: header.pop("config"),
        lambda header: header.pop("scale"),
        lambda header: header.pop("zbl"),
        lambda header: header.update(reference_energies={"Qq": 1.0}),
        lambda header: header.update(format_version=0),
    ],
)
def test_headers_that_do_not_fit_are_refused(saved, change):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Potential.load(saved)


def test_missing_files_list_the_shipped_names(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Potential.load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"nonesuch.*shipped"):
        load_potential("nonesuch")


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match=r"(?i)space|full"):
        make(scale=5.0).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
