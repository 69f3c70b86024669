"""Graphs of the kept neighbour list are those of a fresh search, whatever moves."""

from __future__ import annotations

import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.graph import BareGraph, atoms_to_graph, edge_vectors
from mlip.simulation.calculator import Calculator
from mlip.simulation.verlet_list import VerletList

CUTOFF = 4.0


def check_equal(kept, atoms) -> None:
    fresh = atoms_to_graph(atoms, CUTOFF)
    for name in ("positions", "atomic_numbers", "cell", "pbc", "edge_index", "edge_shift"):
        assert torch.equal(getattr(kept, name), fresh[name]), name
    if isinstance(kept, BareGraph) and kept.edge_vector is not None:
        assert torch.equal(kept.edge_vector, edge_vectors(fresh))


@settings(max_examples=40, deadline=None)
@given(
    skin=st.sampled_from([0.2, 1.0, 3.0]),
    step=st.sampled_from([0.01, 0.1, 0.4]),
    strain=st.sampled_from([0.0, 0.002, 0.05]),
    pbc=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 10_000),
    backend=st.sampled_from(["auto", "torch"]),
)
def test_graphs_equal_a_fresh_search(skin, step, strain, pbc, seed, backend):
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", "fcc", a=3.7) * (2, 1, 2)
    atoms.pbc = pbc
    kept = VerletList(CUTOFF, skin)
    with patch.dict(os.environ, MLIP_BACKEND=backend):
        for _ in range(8):
            atoms.set_cell(atoms.cell @ (np.eye(3) + strain * rng.normal(size=(3, 3))), True)
            atoms.positions += step * rng.normal(size=atoms.positions.shape)
            check_equal(kept.graph(atoms), atoms)


def test_small_moves_reuse_the_list_and_large_ones_do_not(copper):
    kept = VerletList(CUTOFF, 1.0)
    for _ in range(5):
        copper.positions[0, 0] += 0.09
        kept.graph(copper)
    assert kept.searches == 2  # the first without skin
    copper.positions[0, 0] += 0.3
    check_equal(kept.graph(copper), copper)
    assert kept.searches == 3


def test_the_list_comes_with_its_vectors(copper):
    kept = VerletList(CUTOFF, 1.0)
    kept.graph(copper)
    graphs = []
    for _ in range(2):
        copper.positions[:, 0] += np.linspace(0, 0.05, len(copper))
        graphs.append(kept.graph(copper))
        check_equal(graphs[-1], copper)
    assert all(graph.edge_vector is not None for graph in graphs)
    assert graphs[0].edge_vector.shape == graphs[1].edge_vector.shape
    assert not torch.equal(graphs[0].edge_vector, graphs[1].edge_vector)


def test_structures_that_do_not_follow_pay_for_no_skin(copper):
    kept = VerletList(CUTOFF, 1.0)
    for n in range(1, 5):
        copper.positions[0, 0] += 0.6
        check_equal(kept.graph(copper), copper)
        assert kept.searches == n
        assert kept._reference is None


def test_cell_changes_count(copper):
    kept = VerletList(CUTOFF, 1.0)
    kept.graph(copper)
    kept.graph(copper)  # from the second time on with a skin
    copper.set_cell(copper.cell * 0.99, scale_atoms=True)
    check_equal(kept.graph(copper), copper)
    assert kept.searches == 2
    copper.set_cell(copper.cell * 0.75, scale_atoms=True)
    check_equal(kept.graph(copper), copper)
    assert kept.searches == 3


def test_a_cell_that_shrinks_around_its_atom_counts():
    atoms, kept = bulk("Cu", a=3.7), VerletList(CUTOFF, 1.0)
    kept.graph(atoms)
    kept.graph(atoms)  # from the second time on with a skin
    atoms.set_cell(atoms.cell * 0.75)
    check_equal(kept.graph(atoms), atoms)


def test_other_structures_and_periodicity_search_again(copper):
    kept = VerletList(CUTOFF, 1.0)
    kept.graph(copper)
    kept.graph(copper)  # from the second time on with a skin
    copper.pbc = (True, True, False)
    check_equal(kept.graph(copper), copper)
    del copper[0]
    check_equal(kept.graph(copper), copper)
    copper.symbols[0] = "Ni"
    check_equal(kept.graph(copper), copper)


def test_wrapped_atoms_are_right(copper):
    kept = VerletList(CUTOFF, 1.0)
    kept.graph(copper)
    kept.graph(copper)  # from the second time on with a skin
    copper.positions += 1.3
    copper.wrap()
    check_equal(kept.graph(copper), copper)


def test_energies_do_not_depend_on_the_skin(facet, copper):
    rng = np.random.default_rng(0)
    plain, skinned = Calculator(facet, skin=0.0), Calculator(facet, skin=1.5)
    for _ in range(6):
        copper.positions += 0.1 * rng.normal(size=(8, 3))
        for name in ("energy", "forces", "stress"):
            a, b = (c.get_property(name, copper) for c in (plain, skinned))
            assert np.array_equal(a, b)
    assert skinned._neighbours.searches < 6


@pytest.mark.parametrize("skin", [-1.0, float("nan"), float("inf")])
def test_bad_skin(skin):
    with pytest.raises(InputError, match="skin"):
        VerletList(CUTOFF, skin)
