"""Numbers of a data set against independent ones, and what they cost in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.data import covalent_radii

from mlip.datasets.statistics import Statistics, nearest_distance
from mlip.datasets.structure import Structure
from mlip.errors import InputError
from mlip.graph import neighbor_list, pair_distances


def closest_by_images(s: Structure) -> tuple[float, float]:
    """Find shortest distance and ratio over all images up to two cells away, pair by pair."""
    reach = [range(-2, 3) if p else (0,) for p in s.pbc]
    shifts = np.array(np.meshgrid(*reach)).reshape(3, -1).T
    vectors = s.positions[:, None, None] - s.positions[:, None] - shifts @ s.cell
    lengths = np.linalg.norm(vectors, axis=-1)
    zero = (shifts == 0).all(axis=1)
    lengths[:, :, zero] += np.where(np.eye(len(s)), np.inf, 0)[:, :, None]
    radii = covalent_radii[s.numbers]
    ratio = lengths / (radii[:, None] + radii)[:, :, None]
    return float(lengths.min()), float(ratio.min())


@pytest.mark.parametrize("first", [0.3, 1.0, 4.0])
def test_nearest_distance_is_that_over_all_images(first: float) -> None:
    frames = [bulk("Cu") * (2, 2, 1), bulk("NaCl", "rocksalt", a=5.6), molecule("C2H6")]
    squeezed = bulk("Cs", cubic=True) * (2, 1, 1)
    squeezed.positions[1] = squeezed.positions[0] + [0.9, 0, 0]
    heavy = Atoms("H2Cs2", [[0, 0, 0], [0.7, 0, 0], [20, 0, 0], [22, 0, 0]])
    for atoms in [*frames, squeezed, heavy]:
        atoms.rattle(0.05, seed=3)
        structure = Structure.from_atoms(atoms)
        distance, ratio = nearest_distance(structure, first)
        expected, expected_ratio = closest_by_images(structure)
        assert distance == pytest.approx(expected, abs=1e-12)
        assert (ratio < 0.5) == (expected_ratio < 0.5)
        if ratio < 0.5:
            assert ratio == pytest.approx(expected_ratio, abs=1e-12)


def test_pair_distances_are_those_of_the_neighbor_list() -> None:
    for atoms in (bulk("Cu") * (2, 2, 1), molecule("C2H6")):
        atoms.rattle(0.05, seed=1)
        arguments = (atoms.positions, atoms.cell.array, atoms.pbc, 3.5)
        (source, target), lengths = pair_distances(*arguments)
        edges, shift = neighbor_list(*arguments)
        vectors = atoms.positions[edges[0]] + shift @ atoms.cell - atoms.positions[edges[1]]
        np.testing.assert_allclose(np.sort(lengths), np.sort(np.linalg.norm(vectors, axis=1)))
        n = len(atoms)
        counts = np.bincount(source * n + target, minlength=n * n)
        np.testing.assert_array_equal(counts, np.bincount(edges[0] * n + edges[1], minlength=n * n))
    with pytest.raises(InputError, match="atoms 0 and 1 coincide"):
        pair_distances(np.zeros((2, 3)), np.zeros((3, 3)), [False] * 3, 1.0)


def strained(sign: float, count: int = 12) -> Statistics:
    statistics = Statistics()
    for k in range(count):
        atoms = bulk("Cu", a=3.5 + 0.02 * k, cubic=True)
        atoms.calc = EMT()
        stress = sign * atoms.get_stress()
        statistics.add(Structure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc,
                                 stress=stress))  # fmt: skip
    return statistics


def test_stress_of_the_other_sign_is_noticed() -> None:
    right, wrong, few = strained(1), strained(-1), strained(1, count=5)
    assert right.stress_follows_volume() == pytest.approx(1, abs=0.1)
    assert wrong.stress_follows_volume() == pytest.approx(-1, abs=0.1)
    assert few.stress_follows_volume() is None


def test_net_force_and_repeated_geometries() -> None:
    statistics = Statistics()
    atoms = molecule("H2O")
    for energy in (1.0, 1.0, 2.0):
        forces = np.array([[1.0, 0, 0], [0, 2.0, 0], [2.0, 2.0, 0]])
        statistics.add(Structure(atoms.numbers, atoms.positions, energy=energy, forces=forces))
    statistics.add(Structure.from_atoms(Atoms("H")))
    assert statistics.ranges()["net force"]["max"] == pytest.approx(5.0)
    assert [members.tolist() for members in statistics.same_geometry()] == [[0, 1, 2]]
    assert statistics.duplicates() == (2, 1)


def test_memory_is_a_few_dozen_bytes_a_structure(
    random_structure: Callable[[int], Structure],
) -> None:
    statistics = Statistics()
    structures = [random_structure(i) for i in range(20)]
    for s in structures:
        statistics.add(s)
    columns = [*statistics._columns.values(), statistics._closest, statistics._traces,
               statistics._hashes, statistics._groups, statistics._files]  # fmt: skip
    assert sum(column.itemsize for column in columns) <= 60
    assert all(len(column) == 20 for column in columns)


def test_parts_put_together_are_the_whole(random_structure: Callable[[int], Structure]) -> None:
    structures = [random_structure(i % 7) for i in range(20)]
    whole, joined = Statistics(), Statistics()
    for s in structures:
        whole.add(s)
    for start in (0, 10):
        part = Statistics()
        for s in structures[start : start + 10]:
            part.add(s)
        joined.extend(part.to_record())
    assert joined.ranges() == whole.ranges()
    assert joined.duplicates() == whole.duplicates()
    assert joined.outliers() == whole.outliers()
    assert joined.element_atoms == whole.element_atoms
