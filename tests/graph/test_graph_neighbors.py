"""Neighbour lists against a brute-force sum over images and against ASE, pair by pair."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ase.build import bulk
from ase.neighborlist import primitive_neighbor_list
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.graph import neighbor_list
from mlip.graph.neighbors import nearest_neighbors

MASKS = list(itertools.product((False, True), repeat=3))
NEEDLE = 8.0 * np.array([[1, 0, 0], [0.72, 0.694, 0], [0.72, 0.31, 0.62]])  # angles near 44°
FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def as_set(edge_index, edge_shift):
    pairs = set(zip(*edge_index.tolist(), map(tuple, edge_shift.tolist()), strict=True))
    assert len(pairs) == edge_index.shape[1], "an edge is listed twice"
    return pairs


def brute_force(positions, cell, pbc, cutoff):
    """All (source, target, shift) by trying every image that can reach."""
    images = []
    for k in range(3):
        if not pbc[k]:
            images.append([0])
            continue
        # Distance of lattice planes along k among the periodic vectors alone.
        others = np.array([cell[m] for m in range(3) if m != k and pbc[m]]).reshape(-1, 3)
        basis = np.linalg.qr(others.T)[0] if len(others) else np.zeros((3, 0))
        normal = cell[k] - basis @ (basis.T @ cell[k])
        height = np.linalg.norm(normal)
        spread = np.ptp(positions @ (normal / height))
        reach = int(np.ceil((cutoff + spread) / height)) + 1
        images.append(range(-reach, reach + 1))
    found = set()
    for shift in itertools.product(*images):
        vectors = positions[None] + np.array(shift, float) @ cell - positions[:, None]
        for target, source in zip(
            *np.nonzero(np.linalg.norm(vectors, axis=2) < cutoff), strict=True
        ):
            if source != target or shift != (0, 0, 0):
                found.add((int(source), int(target), shift))
    return found


@st.composite
def structures(draw):
    """Random positions, cells of either hand, masks, cutoffs; atoms in and far out of the cell."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 6))
    pbc = draw(st.sampled_from(MASKS))
    kind = draw(st.sampled_from(["random", "needle", "left", "tiny"]))
    cell = {
        "random": rng.normal(size=(3, 3)) * 3,
        "needle": NEEDLE * rng.uniform(0.3, 1),
        "left": np.diag([4.0, 5.0, -6.0]) + rng.normal(size=(3, 3)) * 0.5,
        "tiny": np.eye(3) * 1.6 + rng.normal(size=(3, 3)) * 0.2,
    }[kind]
    if abs(np.linalg.det(cell)) < 3:
        cell = cell + np.eye(3) * 4
    if draw(st.booleans()):
        cell[~np.array(pbc)] = 0
    positions = rng.uniform(-1, 1, (count, 3)) * draw(st.sampled_from([2.0, 6.0, 25.0]))
    return positions, cell, pbc, draw(st.floats(1.0, 4.5))


@FAST
@given(structures())
def test_equals_brute_force_sum_over_images(structure):
    positions, cell, pbc, cutoff = structure
    assert as_set(*neighbor_list(*structure)) == brute_force(positions, cell, pbc, cutoff)


@FAST
@given(structures())
def test_equals_ase_pair_by_pair_with_the_same_distances(structure):
    positions, cell, pbc, cutoff = structure
    i, j, shift, distance = primitive_neighbor_list("ijSd", pbc, cell, positions, cutoff)
    theirs = dict(zip(zip(j, i, map(tuple, shift), strict=True), distance, strict=True))
    edge_index, edge_shift = neighbor_list(*structure)
    vectors = positions[edge_index[0]] + edge_shift @ cell - positions[edge_index[1]]
    ours = dict(
        zip(
            zip(*edge_index.tolist(), map(tuple, edge_shift.tolist()), strict=True),
            np.linalg.norm(vectors, axis=1),
            strict=True,
        )
    )
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[pair] - theirs[pair]) < 1e-12 for pair in ours)


@FAST
@given(structures(), st.integers(0, 2**32 - 1))
def test_moving_atoms_by_lattice_vectors_moves_only_the_shifts(structure, seed):
    positions, cell, pbc, cutoff = structure
    images = np.random.default_rng(seed).integers(-3, 4, (len(positions), 3)) * np.array(pbc)
    edge_index, edge_shift = neighbor_list(*structure)
    moved = neighbor_list(positions + images @ cell, cell, pbc, cutoff)
    expected = edge_shift - images[edge_index[0]] + images[edge_index[1]]
    assert as_set(*moved) == as_set(edge_index, expected)


@FAST
@given(structures())
def test_sorted_by_target_then_source_then_shift_and_every_edge_has_its_reverse(structure):
    edge_index, edge_shift = neighbor_list(*structure)
    rows = np.column_stack([edge_index[1], edge_index[0], edge_shift]).tolist()
    assert rows == sorted(rows)
    pairs = as_set(edge_index, edge_shift)
    assert pairs == {(j, i, (-a, -b, -c)) for i, j, (a, b, c) in pairs}
    assert edge_index.dtype == edge_shift.dtype == np.int64


@pytest.mark.parametrize("ratio", [0.5, 1.01, 2.97])
def test_one_atom_cells_count_the_lattice_points_in_a_sphere(ratio):
    for lattice in ("sc", "fcc", "bcc"):
        cell = bulk("Cu", lattice, a=3.6).cell.array
        cutoff = ratio * 3.6
        _, shift = neighbor_list([[0.3, 9.1, -7.0]], cell, [True] * 3, cutoff)
        grid = np.array(list(itertools.product(range(-12, 13), repeat=3)))
        lengths = np.linalg.norm(grid @ cell, axis=1)
        assert len(shift) == np.count_nonzero((lengths < cutoff) & (lengths > 0))


@pytest.mark.parametrize("cell", [np.zeros((3, 3)), np.diag([4.0, 0, 0]), np.ones((3, 3))])
def test_molecules_may_have_a_zero_or_singular_cell(cell):
    positions = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 50]])
    edge_index, shift = neighbor_list(positions, cell, [False] * 3, 1.2)
    assert edge_index.tolist() == [[1, 2, 0, 0], [0, 0, 1, 2]]
    assert not shift.any()


@pytest.mark.parametrize("positions", [np.zeros((0, 3)), np.zeros((1, 3)), [[0, 0, 0], [9, 0, 0]]])
def test_no_pairs_give_empty_arrays_of_the_right_shape(positions):
    edge_index, shift = neighbor_list(positions, np.zeros((3, 3)), [False] * 3, 3.0)
    assert edge_index.shape == (2, 0)
    assert shift.shape == (0, 3)


@pytest.mark.parametrize("pbc", MASKS[:-1])
@pytest.mark.parametrize("spread", [1e3, 1e6, 1e12])
def test_scattered_fragments_are_found_and_do_not_stop_the_search(pbc, spread):
    """vesin by itself takes minutes here, or divides by zero."""
    rng = np.random.default_rng(1)
    free = ~np.array(pbc)
    start = rng.uniform(0, 8, (100, 3)) + rng.uniform(0, 1, (100, 3)) * spread * free
    positions = np.concatenate([start, start + np.array([1.0, 0.5, 0.25])])
    edge_index, edge_shift = neighbor_list(positions, np.eye(3) * 10, pbc, 2.5)
    pairs = as_set(edge_index, edge_shift)
    if spread < 1e9:  # beyond, rounding of the positions is as large as the bond
        assert all((k, k + 100, (0, 0, 0)) in pairs for k in range(100))
    i, j = np.triu_indices(200, 1)
    vectors = positions[j] - positions[i]
    vectors -= np.rint(vectors / 10) * 10 * np.array(pbc)
    near = np.linalg.norm(vectors, axis=1) < 2.5
    assert len({tuple(sorted(p[:2])) for p in pairs}) == np.count_nonzero(near)


def test_thin_cells_of_enormous_area_do_not_crash():
    """vesin 0.6.2 ends the process with a floating point exception on this grid."""
    cell = np.diag([1e4, 1e4, 10.0])
    edge_index, shift = neighbor_list([[0, 0, 0], [1, 0, 0], [9999, 0, 9.5]], cell, [True] * 3, 3.0)
    assert as_set(edge_index, shift) == {
        (0, 1, (0, 0, 0)), (1, 0, (0, 0, 0)), (0, 2, (1, 0, 1)), (2, 0, (-1, 0, -1)),
        (1, 2, (1, 0, 1)), (2, 1, (-1, 0, -1)),
    }  # fmt: skip


def test_cutoff_on_a_shell_keeps_the_list_symmetric():
    atoms = bulk("Cu", cubic=True).repeat(2)
    for shell in (0.5**0.5, 1.0, 1.5**0.5):
        edge_index, shift = neighbor_list(atoms.positions, atoms.cell, atoms.pbc, 3.61 * shell)
        pairs = as_set(edge_index, shift)
        assert pairs == {(j, i, (-a, -b, -c)) for i, j, (a, b, c) in pairs}


def test_large_structure_equals_ase():
    rng = np.random.default_rng(2)
    atoms = bulk("Si", cubic=True).repeat(4)
    atoms.positions += rng.normal(size=(len(atoms), 3)) * 0.1 + rng.integers(-2, 3, 3) @ atoms.cell
    i, j, shift = primitive_neighbor_list("ijS", atoms.pbc, atoms.cell, atoms.positions, 5.0)
    theirs = set(zip(j.tolist(), i.tolist(), map(tuple, shift.tolist()), strict=True))
    assert as_set(*neighbor_list(atoms.positions, atoms.cell, atoms.pbc, 5.0)) == theirs


def test_earlier_calls_leave_no_trace():
    dense = bulk("Cu", cubic=True).repeat(3)
    sparse = bulk("Cu", a=9.0, cubic=True)
    first = neighbor_list(dense.positions, dense.cell, dense.pbc, 5.0)
    neighbor_list(sparse.positions, sparse.cell, sparse.pbc, 5.0)
    again = neighbor_list(dense.positions, dense.cell, dense.pbc, 5.0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_nearest_neighbors_keeps_whole_order_by_distance():
    rng = np.random.default_rng(3)
    positions = rng.uniform(0, 6, (8, 3))
    edge_index, shift = neighbor_list(positions, np.eye(3) * 6, [True] * 3, 5.0)
    vectors = positions[edge_index[0]] + shift @ (np.eye(3) * 6) - positions[edge_index[1]]
    keep = nearest_neighbors(edge_index, vectors, 8, 7)
    distance = np.linalg.norm(vectors, axis=1)
    for atom in range(8):
        mine = edge_index[1] == atom
        assert np.allclose(np.sort(distance[mine])[:7], np.sort(distance[mine & keep]))


def test_nearest_neighbors_breaks_ties_by_the_order_of_the_list():
    atoms = bulk("Cu", cubic=True)
    edge_index, shift = neighbor_list(atoms.positions, atoms.cell, atoms.pbc, 3.0)
    noise = np.random.default_rng(4).normal(size=(edge_index.shape[1], 3)) * 1e-10
    vectors = atoms.positions[edge_index[0]] + shift @ atoms.cell - atoms.positions[edge_index[1]]
    keep = nearest_neighbors(edge_index, vectors + noise, 4, 5)
    assert keep.reshape(4, 12).tolist() == [[True] * 5 + [False] * 7] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [[0, 0, np.nan]]}, "atom 0 is not finite"),
        ({"positions": [[0, 0, 0], [np.inf, 0, 0]]}, "atom 1 is not finite"),
        ({"positions": [0, 0, 0]}, r"shape \[N, 3\]"),
        ({"cell": np.full((3, 3), np.nan)}, "cell is not finite"),
        ({"cell": np.eye(2)}, r"shape \[3, 3\]"),
        ({"cell": np.zeros((3, 3))}, "span no volume"),
        ({"cell": [[4, 0, 0], [0, 4, 0], [4, 4, 0]]}, "span no volume"),
        ({"cell": np.zeros((3, 3)), "pbc": [True, False, False]}, "span no volume"),
        ({"cell": np.eye(3) * 0.01}, "too small"),
        ({"positions": [[0, 0, 0], [1, 1, 1], [1, 1, 1]]}, "atoms 1 and 2 coincide"),
        ({"positions": [[0, 0, 0], [4, 8, -4]]}, "atoms 0 and 1 coincide"),
        ({"cutoff": 0.0}, "positive length"),
        ({"cutoff": np.nan}, "positive length"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"positions": [[0, 0, 0]], "cell": np.eye(3) * 4, "pbc": [True] * 3, "cutoff": 3.0}
    with pytest.raises(InputError, match=message):
        neighbor_list(**(good | change))
