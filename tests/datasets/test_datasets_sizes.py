"""Sizes counted once: right, remembered, only for the data they were counted on, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.neighborlist import primitive_neighbor_list

from mlip.datasets import sizes
from mlip.datasets.dataset import ConcatenatedDataset, DatasetFacts, LoadedDataset, SelectedDataset
from mlip.datasets.feed.mixture import Relabelled
from mlip.datasets.policy import BadEntries
from mlip.datasets.sizes import UNKNOWN, count_atoms, count_edges, known_edges
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError
from mlip.training import data as survey_data

Make = Callable[[int], Structure]
CUTOFF = 4.0
COUNT = 150


def write(path: Path, make: Make, first: int = 0, count: int = COUNT) -> StructureStore:
    with StructureWriter(path, overwrite=True) as writer:
        for i in range(first, first + count):
            writer.append(make(i))
    return StructureStore(path)


@pytest.fixture
def store(tmp_path: Path, random_structure: Make) -> StructureStore:
    return write(tmp_path / "a.lmdb", random_structure)


def edges_by_ase(structure: Structure) -> int:
    s = structure
    return len(primitive_neighbor_list("i", s.pbc, s.cell, s.positions, CUTOFF))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of structures counted so far, in a list of one."""
    calls, count = [0], sizes.pair_distances

    def counting(*args: Any) -> Any:
        calls[0] += 1
        return count(*args)

    monkeypatch.setattr(sizes, "pair_distances", counting)
    return calls


def test_counts_are_right_and_counted_once(store, random_structure: Make, counted) -> None:
    expected = [edges_by_ase(random_structure(i)) for i in range(COUNT)]
    assert len(set(expected)) > 20
    seen: list[tuple[int, int]] = []
    found = count_edges(store, CUTOFF, lambda done, total: seen.append((done, total)))
    assert found.dtype == np.uint32
    assert found.tolist() == expected
    assert seen[-1] == (COUNT, COUNT)
    assert counted == [COUNT]
    assert count_edges(StructureStore(store.path), CUTOFF).tolist() == expected
    assert store.n_edges(CUTOFF).tolist() == expected
    assert counted == [COUNT]
    assert count_edges(store, 3.0).tolist() != expected
    assert counted == [2 * COUNT]


def test_other_content_is_counted_again(store, random_structure: Make, counted) -> None:
    count_edges(store, CUTOFF)
    other = write(store.path, random_structure, first=1)
    expected = [edges_by_ase(random_structure(i)) for i in range(1, COUNT + 1)]
    assert count_edges(other, CUTOFF).tolist() == expected
    assert counted == [2 * COUNT]


def test_processes_count_the_same(store) -> None:
    expected = count_edges(store, CUTOFF)
    for file in store.path.parent.glob("*.npz"):
        file.unlink()
    assert np.array_equal(count_edges(store, CUTOFF, workers=1), expected)


def test_parts_and_selections_share_what_was_counted(store, random_structure: Make, counted):
    memory = LoadedDataset(
        [random_structure(k) for k in (500, 501)], ["m frame 0", "m frame 1"], DatasetFacts("test")
    )
    everything = ConcatenatedDataset([memory, Relabelled(store), memory])
    chosen = SelectedDataset(everything, np.array([10, 1, 10, 153, 40]))
    expected = [edges_by_ase(s) for s in chosen]
    assert count_edges(chosen, CUTOFF).tolist() == expected
    assert counted == [4]
    assert count_edges(chosen, CUTOFF).tolist() == expected
    assert counted == [6]  # only what is in no file
    count_edges(store, CUTOFF)
    assert counted == [6 + COUNT - 2]


def test_a_killed_count_goes_on(store, monkeypatch: pytest.MonkeyPatch, counted) -> None:
    expected = count_edges(store, CUTOFF)
    (file,) = store.path.parent.glob("*.npz")
    file.unlink()
    monkeypatch.setattr(sizes, "_SAVE_EVERY", 0.0)

    def stop(done: int, total: int) -> None:  # noqa: ARG001
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_edges(store, CUTOFF, stop)
    counted[0] = 0
    assert np.array_equal(count_edges(store, CUTOFF), expected)
    assert counted == [COUNT - 64]


class Payload:
    """Makes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_side_file_is_run(store, tmp_path: Path) -> None:
    expected = count_edges(store, CUTOFF)
    (file,) = store.path.parent.glob("*.npz")
    hostile = np.array([Payload(tmp_path / "marker")] * COUNT, dtype=object)
    with file.open("wb") as opened:
        np.savez(opened, counts=hostile, fingerprint=hostile)
    assert np.array_equal(count_edges(store, CUTOFF), expected)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "short", "float", "foreign"])
def test_damaged_side_files_are_counted_again(store, damage: str) -> None:
    expected = count_edges(store, CUTOFF)
    (file,) = store.path.parent.glob("*.npz")
    name = np.array(store.fingerprint())
    if damage in {"cut", "empty"}:
        file.write_bytes(file.read_bytes()[: 200 if damage == "cut" else 0])
    else:
        counts = {
            "pickle": np.array([None] * COUNT, dtype=object),
            "short": expected[:-1],
            "float": expected.astype(float),
            "foreign": expected + 1,
        }[damage]
        with file.open("wb") as opened:
            np.savez(
                opened, counts=counts, fingerprint=np.array("x") if damage == "foreign" else name
            )
    assert np.array_equal(count_edges(store, CUTOFF), expected)
    with np.load(file, allow_pickle=False) as content:
        assert np.array_equal(content["counts"], expected)


def test_a_folder_that_cannot_be_written_costs_only_time(store, monkeypatch, counted) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr("mlip.files.tempfile.mkstemp", fail)
    assert np.array_equal(count_edges(store, CUTOFF), count_edges(store, CUTOFF))
    assert counted == [2 * COUNT]


def test_a_structure_without_edges_to_count_is_named(store) -> None:
    bad = Structure(numbers=[1, 1], positions=np.zeros((2, 3)))
    both = ConcatenatedDataset([store, LoadedDataset([bad], ["b frame 7"], DatasetFacts("test"))])
    with pytest.raises(DataError, match=r"^b frame 7: atoms 0 and 1 coincide"):
        count_edges(both, CUTOFF)


class Rows(LoadedDataset):
    """Like a file whose atoms are only known after reading it."""

    def __init__(self, path: Path, structures: list[Structure]) -> None:
        super().__init__(structures, [""] * len(structures), DatasetFacts("test"))
        self.path, self.asked = path, 0

    def n_atoms(self) -> np.ndarray:
        self.asked += 1
        return super().n_atoms()


def test_atoms_are_counted_once(store, random_structure: Make, tmp_path: Path) -> None:
    assert count_atoms(store).dtype == np.uint32
    assert np.shares_memory(count_atoms(store), store._index)
    rows = Rows(tmp_path / "rows.aselmdb", [random_structure(i) for i in range(20)])
    chosen = SelectedDataset(ConcatenatedDataset([store, rows]), np.array([155, 3]))
    expected = [len(random_structure(5)), len(random_structure(3))]
    for _ in range(2):
        assert count_atoms(chosen).tolist() == expected
    assert rows.asked == 1
    assert UNKNOWN not in count_atoms(rows)


def test_known_edges_read_nothing(store, counted) -> None:
    assert (known_edges(store, CUTOFF) == UNKNOWN).all()
    some = SelectedDataset(store, np.array([7, 3]))
    expected = count_edges(some, CUTOFF).tolist()
    counted[0] = 0
    assert known_edges(some, CUTOFF).tolist() == expected
    both = known_edges(ConcatenatedDataset([store, store]), CUTOFF)
    assert both[[3, 7, COUNT + 3, COUNT + 7]].tolist() == 2 * expected[::-1]
    assert (both == UNKNOWN).sum() == 2 * (COUNT - 2)
    assert (known_edges(store, 3.0) == UNKNOWN).all()
    assert counted == [0]


def test_a_survey_counts_only_what_is_not_known(store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    count = survey_data.pair_distances
    monkeypatch.setattr(
        survey_data, "pair_distances", lambda *args: (calls.append(args), count(*args))[1]
    )
    expected = survey_edges(store)
    assert len(calls) == COUNT
    count_edges(store, CUTOFF)
    assert survey_edges(store) == expected == count_edges(store, CUTOFF).tolist()
    assert len(calls) == COUNT


def survey_edges(store: StructureStore) -> list[int]:
    no_room = survey_data.GraphMemory(-1)
    part = survey_data.survey_part("set", store, CUTOFF, no_room, BadEntries())
    return part.survey.n_edges.tolist()
