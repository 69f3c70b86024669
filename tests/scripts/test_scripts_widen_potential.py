"""A widened potential predicts what the old one does, and its new channels can learn."""

from __future__ import annotations

import pytest
import torch
from ase.build import bulk

from mlip.errors import InputError
from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.potential import Potential

NARROW = {
    "elements": [13, 29],
    "cutoff": 4.0,
    "average_neighbors": 18.0,
    "hidden": [[4, 3], [4, 2]],
    "message": [5, 4, 4],
    "embedding": 4,
    "outputs": 3,
    "product_hidden": 6,
}
WIDE = {"hidden": [[7, 4, 2], [5, 4]], "message": [8, 7, 4], "embedding": 6, "outputs": 5}


@pytest.fixture(scope="module")
def widen(load_script):
    return load_script("widen_potential").widen


@pytest.fixture
def narrow():
    torch.manual_seed(3)
    model = create_model("facet", NARROW)
    for block in model.blocks:
        block.residual_gain.gain.data.uniform_(0.5, 1.5)
    references = {13: -3.5, 29: -4.0}
    units = {"scale": {13: 0.7, 29: 1.3}, "shift": {13: 0.2, 29: -0.1}}
    potential = Potential(model, reference_energies=references, zbl=True, **units)
    return potential.to_dtype(torch.float64)


@pytest.fixture
def graph():
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Al"
    atoms.rattle(0.15, seed=0)
    return atoms_to_graph(atoms, 4.0)


def test_predicts_the_same(widen, narrow, graph):
    wide = widen(narrow, **WIDE)
    assert wide.model.config.hidden == ((7, 4, 2), (5, 4))
    old, new = narrow(graph), wide(graph)
    torch.testing.assert_close(new.energies, old.energies, rtol=0, atol=1e-13)
    torch.testing.assert_close(new.forces, old.forces, rtol=0, atol=1e-12)
    torch.testing.assert_close(new.stress, old.stress, rtol=0, atol=1e-13)


def test_old_channels_can_learn_from_new_ones(widen, narrow, graph):
    wide = widen(narrow, **WIDE)
    wide(graph, create_graph=True).forces.square().sum().backward()
    (head,), last = wide.model.head.kernels, wide.model.blocks[1]
    assert (head.grad != 0).all()
    assert (last.after.weights[0].grad[:, :5] != 0).all()
    assert (last.update.down.weights[0].grad[:, :3] != 0).all()


def test_new_weights_follow_the_seed(widen, narrow):
    first, same, other = (widen(narrow, seed=seed, **WIDE).model_hash() for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"outputs": 2}, "no width may be smaller"),
        ({"embedding": 3}, "no width may be smaller"),
        ({"hidden": [[4, 2], [5, 4]]}, "no width may be smaller"),
        ({"hidden": [[7, 0, 2], [5, 4]]}, "no width may be smaller"),
        ({"message": [8, 7, 4, 4]}, "highest degree"),
        ({"node_update": "gate"}, "sphere_product"),
    ],
)
def test_refuses_what_cannot_be_widened(widen, narrow, changes, text):
    with pytest.raises(InputError, match=text):
        widen(narrow, **{**WIDE, **changes})
