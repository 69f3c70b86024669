"""Graphs and batches: fields, shapes, edge vectors, copies, pymatgen, flags."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from torch_geometric.data import Batch

from mlip.errors import InputError
from mlip.graph import (
    AtomicGraph,
    as_atoms,
    atoms_to_graph,
    batch_graphs,
    batch_index,
    edge_vectors,
    make_graph,
    number_of_graphs,
)

NAMES = ["copper", "slab", "water", "one atom", "needle"]


def structure(name):
    if name == "copper":
        atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
        atoms.rattle(0.05, seed=1)
    elif name == "slab":
        atoms = fcc111("Ni", (2, 2, 3), vacuum=6.0)
        atoms.pbc = (True, True, False)
    elif name == "water":
        atoms = molecule("H2O")
    elif name == "one atom":
        atoms = Atoms("Ar")
    else:
        atoms = Atoms("Si2", positions=[[0, 0, 0], [1.5, 1.2, 0.9]], pbc=True)
        atoms.cell = 6.0 * np.array([[1, 0, 0], [0.72, 0.694, 0], [0.72, 0.31, 0.62]])
    return atoms


def same(one, other):
    """Equal keys and bits, NaN equal to NaN."""
    assert set(one.keys()) == set(other.keys())
    for key in one.keys():  # noqa: SIM118
        a, b = one[key], other[key]
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def test_fields_have_the_promised_shapes_and_types():
    atoms = structure("copper")
    atoms.positions[0] -= 3 * atoms.cell[0]  # unwrapped on purpose
    graph = atoms_to_graph(atoms, 4.0)
    n, e = len(atoms), graph.edge_index.shape[1]
    shapes = {
        "positions": ([n, 3], torch.float64), "atomic_numbers": ([n], torch.int64),
        "cell": ([1, 3, 3], torch.float64), "pbc": ([1, 3], torch.bool),
        "edge_index": ([2, e], torch.int64), "edge_shift": ([e, 3], torch.int64),
        "cutoff": ([1], torch.float64), "truncated": ([1], torch.bool),
        "energy": ([1], torch.float64), "forces": ([n, 3], torch.float64),
        "stress": ([1, 3, 3], torch.float64), "charge": ([1], torch.float64),
        "spin": ([1], torch.float64), "tags": ([n], torch.int64), "fixed": ([n], torch.bool),
        "index": ([1], torch.int64),
    }  # fmt: skip
    for name, (shape, dtype) in shapes.items():
        assert (list(graph[name].shape), graph[name].dtype) == (shape, dtype), name
    assert np.array_equal(graph.positions.numpy(), atoms.positions)
    assert graph.num_nodes == n
    for label in (graph.energy, graph.forces, graph.stress):
        assert label.isnan().all()


def test_graph_shares_no_memory_with_the_structure():
    atoms = structure("copper")
    before = copy.deepcopy(atoms)
    graph = atoms_to_graph(atoms, 4.0)
    graph.positions += 1.0
    graph.cell += 1.0
    assert atoms == before


@pytest.mark.parametrize("name", NAMES)
def test_edge_vectors_are_source_image_minus_target_within_the_cutoff(name):
    atoms = structure(name)
    graph = atoms_to_graph(atoms, 5.0)
    vectors = edge_vectors(graph).numpy()
    source, target = graph.edge_index.numpy()
    images = graph.edge_shift.numpy() @ atoms.cell.array
    expected = atoms.positions[source] + images - atoms.positions[target]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-12)
    assert (np.linalg.norm(vectors, axis=1) < 5.0 + 1e-12).all()


def test_reversed_edges_have_exactly_opposite_vectors():
    graph = batch_graphs([atoms_to_graph(structure(name), 5.0) for name in NAMES])
    vectors = {
        (i, j, tuple(s)): v
        for i, j, s, v in zip(
            *graph.edge_index.tolist(),
            graph.edge_shift.tolist(),
            edge_vectors(graph).tolist(),
            strict=True,
        )
    }
    for (i, j, (a, b, c)), vector in vectors.items():
        assert [-x for x in vectors[j, i, (-a, -b, -c)]] == vector


def test_edge_vectors_have_first_and_second_derivatives():
    graph = batch_graphs([atoms_to_graph(structure(name), 3.0) for name in ("copper", "needle")])
    positions, cell = graph.positions, graph.cell

    def lengths(r, c):
        view = copy.copy(graph)
        view.positions, view.cell = r, c
        return (edge_vectors(view) ** 2).sum().sqrt()

    inputs = (positions.requires_grad_(True), cell.requires_grad_(True))
    assert torch.autograd.gradcheck(lengths, inputs)
    assert torch.autograd.gradgradcheck(lengths, inputs)


def test_batch_is_concatenation_with_renumbered_edges():
    graphs = [atoms_to_graph(structure(name), 4.5) for name in NAMES]
    batch = batch_graphs(graphs)
    assert isinstance(batch, Batch)
    assert isinstance(batch, AtomicGraph)
    sizes = [len(graph.atomic_numbers) for graph in graphs]
    starts = np.cumsum([0, *sizes])
    assert batch.ptr.tolist() == starts.tolist()
    assert batch_index(batch).tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
    assert number_of_graphs(batch) == len(graphs)
    for name in ("positions", "cell", "edge_shift", "forces", "index", "pbc", "tags"):
        expected = torch.cat([graph[name] for graph in graphs])
        torch.testing.assert_close(batch[name], expected, rtol=0, atol=0, equal_nan=True)
    edges = [g.edge_index + int(s) for g, s in zip(graphs, starts[:-1], strict=True)]
    assert torch.equal(batch.edge_index, torch.cat(edges, dim=1))
    joined = torch.cat([edge_vectors(graph) for graph in graphs])
    torch.testing.assert_close(edge_vectors(batch), joined, rtol=0, atol=1e-14)


def test_batch_comes_apart_into_the_same_graphs():
    graphs = [atoms_to_graph(structure(name), 4.5) for name in NAMES]
    for graph, part in zip(graphs, batch_graphs(graphs).to_data_list(), strict=True):
        same(graph, part)


def test_index_counts_entries_and_not_atoms_in_a_batch():
    """A field whose name holds "index" is renumbered by torch_geometric's own rules."""
    graphs = [make_graph([1], [[0, 0, 0]], np.zeros((3, 3)), [0, 0, 0], 2.0, index=7)] * 3
    assert batch_graphs(graphs).index.tolist() == [7, 7, 7]


def test_single_graph_helpers():
    graph = atoms_to_graph(structure("water"), 3.0)
    assert number_of_graphs(graph) == 1
    assert batch_index(graph).tolist() == [0, 0, 0]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda g: g.clone()])
def test_copies_and_pickles_are_equal(duplicate):
    graphs = [atoms_to_graph(structure(name), 4.5) for name in NAMES]
    for graph in (graphs[0], batch_graphs(graphs)):
        same(graph, duplicate(graph))
        same(graph, pickle.loads(pickle.dumps(graph)))


def test_batch_refuses_what_does_not_fit():
    graph = atoms_to_graph(structure("water"), 3.0)
    other = copy.copy(graph)
    other.extra = torch.zeros(1)
    with pytest.raises(InputError, match="at least one graph"):
        batch_graphs([])
    with pytest.raises(InputError, match="different cutoffs"):
        batch_graphs([graph, atoms_to_graph(structure("water"), 4.0)])
    with pytest.raises(InputError, match="extra"):
        batch_graphs([graph, other])
    with pytest.raises(InputError, match="itself a batch"):
        batch_graphs([batch_graphs([graph])])


def test_labels_are_kept_and_checked():
    forces, stress = np.arange(6.0).reshape(2, 3), np.arange(9.0).reshape(3, 3)
    arguments = ([1, 8], [[0, 0, 0], [1, 0, 0]], np.eye(3) * 5, [1, 1, 1], 3.0)
    graph = make_graph(*arguments, energy=-1.5, forces=forces, stress=stress, tags=[1, 2], charge=1)
    assert graph.energy.tolist() == [-1.5]
    assert graph.forces.tolist() == forces.tolist()
    assert graph.stress[0].tolist() == stress.tolist()
    assert (graph.tags.tolist(), graph.charge.tolist()) == ([1, 2], [1.0])
    with pytest.raises(InputError, match=r"forces must have shape \[2, 3\], got \[3, 2\]"):
        make_graph(*arguments, forces=forces.T)
    with pytest.raises(InputError, match=r"stress must have shape \[3, 3\], got \[6\]"):
        make_graph(*arguments, stress=np.zeros(6))


def test_max_neighbors_drops_edges_and_says_so():
    atoms = structure("copper")
    whole, cut = atoms_to_graph(atoms, 5.0), atoms_to_graph(atoms, 5.0, max_neighbors=9)
    assert torch.bincount(cut.edge_index[1]).tolist() == [9] * len(atoms)
    assert (whole.truncated.item(), cut.truncated.item()) == (False, True)
    enough = atoms_to_graph(atoms, 5.0, max_neighbors=1000)
    assert not enough.truncated.item()
    same(whole, enough)
    far = edge_vectors(cut).norm(dim=1).max()
    assert far < edge_vectors(whole).norm(dim=1).max()
    with pytest.raises(InputError, match="max_neighbors"):
        atoms_to_graph(atoms, 5.0, max_neighbors=0)


def test_pymatgen_structures_and_molecules_are_accepted():
    core = pytest.importorskip("pymatgen.core")
    lattice = core.Lattice([[3, 0, 0], [0.4, 3, 0], [0, 0.2, 3]], pbc=(True, True, False))
    crystal = core.Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.4, 1.3]])
    graph = atoms_to_graph(crystal, 4.0)
    assert graph.pbc.tolist() == [[True, True, False]]
    np.testing.assert_allclose(graph.cell[0].numpy(), lattice.matrix, atol=1e-14)
    np.testing.assert_allclose(graph.positions.numpy(), crystal.cart_coords, atol=1e-14)
    assert graph.atomic_numbers.tolist() == [11, 17]
    free = atoms_to_graph(core.Molecule(["O", "H"], [[0, 0, 0], [0, 0, 0.97]]), 4.0)
    assert free.pbc.tolist() == [[False] * 3]
    assert free.edge_index.tolist() == [[1, 0], [0, 1]]
    mixed = core.Structure(lattice, [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    with pytest.raises(InputError, match="partly occupied"):
        as_atoms(mixed)


def test_atoms_pass_unchanged_and_other_things_are_refused():
    atoms = structure("water")
    assert as_atoms(atoms) is atoms
    with pytest.raises(InputError, match=r"got builtins\.str"):
        as_atoms("POSCAR")
