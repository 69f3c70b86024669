"""Sums for elements in the first block of Facet agree with messages of its features."""

from __future__ import annotations

import copy

import pytest
import torch
from ase.build import bulk

from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.ops.backend import decisions
from mlip.potential import Potential

pytest.importorskip("numba")

ELEMENTS = (13, 28, 29, 47, 79)


@pytest.fixture(autouse=True)
def no_decisions(monkeypatch):
    for kept in ("_refused", "_uncovered"):
        monkeypatch.setattr(f"mlip.ops.backend.{kept}", {})


def make(embedding: int = 32, dtype: torch.dtype = torch.float64, **options) -> Potential:
    config = {"elements": ELEMENTS, "cutoff": 4.2, "outputs": 16, "hidden": ((32, 16, 16),)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = create_model("facet", {**config, "embedding": embedding, **options})
    return Potential(model).to_dtype(dtype).eval()


def crystal(*numbers: int):
    """Rattled atoms of some elements; the last one has no neighbours."""
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.pbc = False
    atoms.rattle(0.1, seed=2)
    atoms.positions[-1] += 30
    atoms.numbers = [numbers[i % len(numbers)] for i in range(len(atoms))]
    return atoms


def differences(potential: Potential, atoms) -> list[torch.Tensor]:
    """Worst deviations of energies and forces from plain PyTorch in float64, relative."""
    graph = atoms_to_graph(atoms, potential.cutoff)
    truth = copy.deepcopy(potential).to_dtype(torch.float64)
    truth.model.backend = "torch"
    found, expected = potential(graph), truth(graph)
    names = ("energies", "forces")
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    return [(a - b).abs().max() / b.abs().max() for a, b in pairs]


def used() -> bool:
    return any("sums for elements" in name and "CPU" in how for name, how in decisions().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("numbers", "embedding", "fewer"),
    [
        ((29,), 32, True),
        ((79, 28), 32, True),
        ((79, 28, 29), 64, True),
        ((79, 28, 29, 47), 32, False),
        ((29,), 16, None),
    ],
)
def test_agrees_with_messages_of_features(numbers, embedding, fewer, dtype):
    """Eight radial functions for each element, fewer channels than the embedding or not used."""
    potential = make(embedding, dtype)
    worst = max(differences(potential, crystal(*numbers)))
    assert worst < (1e-12 if dtype == torch.float64 else 3e-5)
    if fewer is None:  # blocks of channels: 8 in float64, 16 in float32
        fewer = dtype == torch.float64
    assert used() is fewer


def test_no_more_radial_functions_than_the_kernel_has():
    """Their number need not fill a block of channels."""
    assert max(differences(make(n_radial=5), crystal(29, 79))) < 1e-12
    assert used()


def test_elements_may_change_from_call_to_call():
    potential = make()
    for numbers in ((29,), (79, 28), (28,), (13, 79), (79, 28), (29,)):
        assert max(differences(potential, crystal(*numbers))) < 1e-12
    assert used()


def test_weights_of_few_sets_of_elements_are_kept(monkeypatch):
    monkeypatch.setattr("mlip.models.facet_inference.MOST_SETS", 2)
    potential = make()
    for number in (*ELEMENTS, *ELEMENTS):
        assert max(differences(potential, crystal(number))) < 1e-12
        kept = potential.model.prepared_elements.get([potential.model.embedding], dict)
        assert 1 <= len(kept) <= 2


@pytest.mark.parametrize("name", ["embedding", "radial", "after"])
@pytest.mark.parametrize("frozen", [True, False])
def test_changed_weights_are_noticed(name, frozen):
    potential = make().requires_grad_(not frozen)
    atoms = crystal(29, 79)
    before = differences(potential, atoms)
    assert max(before) < 1e-12
    model = potential.model
    block = model.blocks[0]
    weight = {
        "embedding": model.embedding,
        "radial": block.radial.kernels[0],
        "after": block.after.weights[1],
    }[name]
    old = potential(atoms_to_graph(atoms, potential.cutoff)).forces
    with torch.no_grad():
        weight.mul_(1.1)
    new = potential(atoms_to_graph(atoms, potential.cutoff)).forces
    assert not torch.allclose(old, new, rtol=1e-6)
    assert max(differences(potential, atoms)) < 1e-12


def test_a_block_that_ends_in_scalars_has_no_such_sums():
    potential = make(hidden=(), lmax_edge=2)
    assert max(differences(potential, crystal(29))) < 1e-12
    assert not used()
