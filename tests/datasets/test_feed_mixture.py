"""Data sets with other labels and another zero of energy, and how often each appears."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mlip.datasets.dataset import ConcatenatedDataset, DatasetFacts, LoadedDataset
from mlip.datasets.feed.mixture import Relabelled, appearance_weights, shift_of
from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.datasets.structure import Structure
from mlip.errors import InputError

WATER = Structure(
    numbers=[8, 1, 1],
    positions=np.arange(9.0).reshape(3, 3),
    energy=-2078.5,
    forces=np.full((3, 3), 0.5),
    info={"id": "w"},
)
CRYSTAL = Structure(
    numbers=[29], positions=np.zeros((1, 3)), cell=np.eye(3) * 3, pbc=[True] * 3,
    energy=-45000.25, stress=np.eye(3), tags=[1], fixed=[True], charge=0.0,
)  # fmt: skip
BARE = Structure(numbers=[1], positions=np.zeros((1, 3)))
SHIFT = {1: 13.5, 8: 2040.0, 29: 44990.125}


@pytest.fixture
def base() -> LoadedDataset:
    facts = DatasetFacts("test", "total")
    return LoadedDataset([WATER, CRYSTAL, BARE], ["a frame 0", "a frame 1", "b frame 0"], facts)


def test_nothing_changes_without_a_request(base: LoadedDataset, assert_identical) -> None:
    same = Relabelled(base)
    for a, b in zip(same, base, strict=True):
        assert_identical(a, b)
    assert same.fingerprint() == base.fingerprint()
    assert same.facts == base.facts
    assert same.n_atoms().tolist() == [3, 1, 1]
    assert same.name(2) == "b frame 0"


def test_labels_left_out_are_missing_and_the_rest_stays(base: LoadedDataset) -> None:
    found = Relabelled(base, ["forces"])
    assert [s.energy for s in found] == [None] * 3
    assert found[1].stress is None
    np.testing.assert_array_equal(found[0].forces, WATER.forces)
    assert found[0].info == {"id": "w"}
    assert found[1].fixed.tolist() == [True]
    assert found[0:2][1].charge == 0.0
    energy_only = Relabelled(base, ["energy"], SHIFT)
    assert energy_only[0].forces is None
    assert energy_only[0].energy is not None
    assert Relabelled(base, ["forces"], SHIFT)[0].energy is None
    assert WATER.energy == -2078.5, "the record itself must not change"
    with pytest.raises(InputError, match=r"'force' is no label.*energy, forces, stress"):
        Relabelled(base, ["force"])


def test_energies_are_shifted_atom_by_atom_in_float64(base: LoadedDataset) -> None:
    found = Relabelled(base, energy_shift=SHIFT)
    assert found[0].energy == -2078.5 + 2040.0 + 2 * 13.5
    assert found[1].energy == -10.125, "all digits are kept"
    assert found[2].energy is None
    np.testing.assert_array_equal(found[0].forces, WATER.forces)
    with pytest.raises(InputError, match="atomic number 29"):
        Relabelled(base, energy_shift={1: 0.0, 8: 0.0})[1]
    many = np.repeat([1, 8], [1000, 500])
    assert shift_of(many, SHIFT) == 1000 * 13.5 + 500 * 2040.0


def test_fingerprint_names_and_pickles(base: LoadedDataset, assert_identical) -> None:
    variants = [base, Relabelled(base, ["energy"]), Relabelled(base, energy_shift=SHIFT)]
    variants.append(Relabelled(base, energy_shift={**SHIFT, 1: 13.6}))
    assert len({v.fingerprint() for v in variants}) == len(variants)
    nested = Relabelled(Relabelled(base, ["energy"]), energy_shift=SHIFT)
    again = pickle.loads(pickle.dumps(nested))
    for a, b in zip(again, nested, strict=True):
        assert_identical(a, b)
    assert again.fingerprint() == nested.fingerprint()


def test_weights_are_expected_appearances(base: LoadedDataset) -> None:
    assert appearance_weights([3, 4], [1.0, 1.0]) is None
    both = ConcatenatedDataset([base, Relabelled(base, ["energy"]), base])
    weights = appearance_weights([3, 3, 3], [2.0, 0.25, 1.0])
    assert weights is not None
    assert weights.tolist() == [2.0] * 3 + [0.25] * 3 + [1.0] * 3
    sampler = EdgeBudgetSampler(
        both.n_atoms(), both.n_atoms(), max_edges=10, seed=3, weights=weights
    )
    seen = np.zeros(9)
    for epoch in range(400):
        sampler.start(epoch)
        counts = np.bincount([i for batch in sampler for i in batch], minlength=9)
        assert counts[:3].tolist() == [2, 2, 2]
        assert counts[6:].tolist() == [1, 1, 1]
        seen += counts
    np.testing.assert_allclose(seen[3:6] / 400, 0.25, atol=0.08)
