"""Structures that cannot be used get one clear error, whoever reads them first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip.errors import InputError, MlipError, UnknownElementError
from mlip.graph import atoms_to_graph, make_graph
from mlip.models import create_model
from mlip.potential import Potential


def broken(kind):
    atoms = bulk("Cu", cubic=True)
    if kind == "NaN position":
        atoms.positions[2, 1] = np.nan
    elif kind == "infinite position":
        atoms.positions[3, 0] = np.inf
    elif kind == "no atoms":
        atoms = Atoms(cell=np.eye(3) * 4, pbc=True)
    elif kind == "no cell":
        atoms.cell = np.zeros((3, 3))
    elif kind == "flat cell":
        atoms.cell[2] = atoms.cell[0] + atoms.cell[1]
    elif kind == "cell in nm":
        atoms.set_cell(atoms.cell * 1e-2, scale_atoms=True)
    elif kind == "NaN cell":
        atoms.cell[0, 0] = np.nan
    elif kind == "twice the same atom":
        atoms += atoms[1:2]
    elif kind == "image of another atom":
        atoms += Atoms("Cu", positions=[atoms.positions[1] - 2 * atoms.cell[0]])
    return atoms


EXPECTED = {
    "NaN position": "atom 2 is not finite",
    "infinite position": "atom 3 is not finite",
    "no atoms": "no atoms",
    "no cell": r"span no volume.*set pbc to False",
    "flat cell": "span no volume",
    "cell in nm": "too small",
    "NaN cell": "cell is not finite",
    "twice the same atom": "atoms 1 and 4 coincide",
    "image of another atom": "atoms 1 and 4 coincide",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_graphs_refuse_broken_structures(kind):
    atoms = broken(kind)
    before = atoms.copy()
    with pytest.raises(InputError, match=EXPECTED[kind]) as caught:
        atoms_to_graph(atoms, 4.0)
    assert isinstance(caught.value, (MlipError, ValueError))
    np.testing.assert_array_equal(atoms.positions, before.positions)
    np.testing.assert_array_equal(atoms.cell, before.cell)


@pytest.mark.parametrize("pbc", [(True, False, False), (False, True, True)])
def test_only_repeating_vectors_must_span_something(pbc):
    atoms = bulk("Cu", cubic=True)
    atoms.pbc = pbc
    atoms.cell[~np.array(pbc)] = 0
    assert atoms_to_graph(atoms, 3.0).edge_index.shape[1] > 0
    atoms.cell[:] = 0
    with pytest.raises(InputError, match="span no volume"):
        atoms_to_graph(atoms, 3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.zeros((3, 3))}, r"positions must have shape \[2, 3\], got \[3, 3\]"),
        ({"atomic_numbers": [[1, 8]]}, r"atomic_numbers must have shape \[N\]"),
        ({"atomic_numbers": []}, "no atoms"),
        ({"forces": np.zeros((2, 2))}, r"forces must have shape \[2, 3\]"),
        ({"forces": np.zeros(6)}, r"forces must have shape \[2, 3\], got \[6\]"),
        ({"stress": np.zeros(6)}, r"stress must have shape \[3, 3\]"),
        ({"tags": [0]}, r"tags must have shape \[2\]"),
        ({"fixed": [True] * 3}, r"fixed must have shape \[2\]"),
        ({"cell": np.zeros(3)}, r"cell must have shape \[3, 3\]"),
        ({"pbc": [True]}, r"pbc \[3\]"),
        ({"cutoff": -1.0}, "positive length"),
        ({"cutoff": np.inf}, "positive length"),
        ({"max_neighbors": 0}, "max_neighbors must be at least 1"),
    ],
)
def test_arrays_of_the_wrong_shape_are_named(change, message):
    good = {
        "atomic_numbers": [1, 8],
        "positions": [[0, 0, 0], [1, 0, 0]],
        "cell": np.eye(3) * 5,
        "pbc": [True] * 3,
        "cutoff": 3.0,
    }
    make_graph(**good)
    with pytest.raises(InputError, match=message):
        make_graph(**(good | change))


def test_unknown_elements_in_a_batch_member_are_named():
    with torch.random.fork_rng(devices=[]):
        model = create_model("facet", {"elements": (29,), "hidden": ((2, 2),), "embedding": 2})
    graph = atoms_to_graph(Atoms("CuPdAg", positions=np.diag([2.0, 2, 2])), 5.0)
    with pytest.raises(UnknownElementError, match=r"Pd, Ag.*Cu"):
        Potential(model)(graph)
