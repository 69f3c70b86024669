"""Flat batches: field by field what joining single graphs gives, from bytes and from structures."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from mlip.datasets.dataset import (
    ConcatenatedDataset,
    DatasetFacts,
    LoadedDataset,
    SelectedDataset,
)
from mlip.datasets.encoding import encode
from mlip.datasets.feed.flat import FlatBatch
from mlip.datasets.feed.loader import read_batch
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Structure, structure_to_graph
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError
from mlip.graph import batch_graphs

CUTOFF = 4.0


def variety() -> list[Structure]:
    """Structures with all, some and no labels, of float32 and float64 origin, any periodicity."""
    random = np.random.default_rng(1)
    found = []
    for k in range(24):
        n = int(random.integers(1, 25))
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)[:n]
        positions = 2.5 * grid + random.uniform(-0.4, 0.4, (n, 3)) + (50 * k if k % 7 == 0 else 0)
        forces = random.normal(size=(n, 3))
        if k % 2:
            positions, forces = positions.astype(np.float32), forces.astype(np.float32)
        found.append(
            Structure(
                numbers=random.integers(1, 119, n),
                positions=positions,
                cell=np.zeros((3, 3)) if k % 5 == 0 else np.diag([8.0, 9.0, 8.5]),
                pbc=[k % 5 > 0, k % 5 > 0, k % 5 > 1],
                energy=None if k % 3 == 0 else -12.0 * n,
                forces=None if k % 4 == 0 else forces,
                stress=random.normal(size=6) if k % 3 else None,
                tags=None if k % 6 == 0 else random.integers(-2, 300 if k % 6 == 1 else 3, n),
                fixed=None if k % 5 == 2 else random.integers(0, 2, n),
                charge=None if k % 2 else 1.0,
                spin=None if k % 3 else 3,
                info={"sid": k},
            )
        )
    return found


STRUCTURES = variety()


@pytest.fixture
def store(tmp_path: Path) -> StructureStore:
    with StructureWriter(tmp_path / "a.lmdb") as writer:
        for structure in STRUCTURES:
            writer.append(structure)
    return StructureStore(tmp_path / "a.lmdb")


def loaded() -> LoadedDataset:
    names = [f"memory frame {k}" for k in range(len(STRUCTURES))]
    return LoadedDataset(STRUCTURES, names, DatasetFacts("test"))


def assert_same(found, expected) -> None:
    """Compare two batches in every field, also those that `to_data_list` works with."""
    assert type(found) is type(expected)
    assert list(found.keys()) == list(expected.keys())
    for key in expected.keys():  # noqa: SIM118
        a, b = found[key], expected[key]
        if isinstance(b, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), key
            assert torch.equal(a.isnan(), b.isnan()), key
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), key
        else:
            assert a == b, key
    assert found.num_graphs == expected.num_graphs
    assert found.num_nodes == expected.num_nodes
    for kept in ("_slice_dict", "_inc_dict"):
        assert getattr(found, kept).keys() == getattr(expected, kept).keys()
        for key, value in getattr(expected, kept).items():
            assert torch.equal(getattr(found, kept)[key], value), (kept, key)


CHOICES = [[0], [5], [3, 3], list(range(24)), [23, 1, 7, 7, 2], [1, 3, 5, 7], [2, 4, 8]]


@pytest.mark.parametrize("indices", CHOICES)
def test_batches_equal_those_of_single_graphs(store: StructureStore, indices: list[int]) -> None:
    graphs = [structure_to_graph(STRUCTURES[i], CUTOFF, index=i) for i in indices]
    expected = batch_graphs(graphs)
    from_bytes = read_batch(store, indices, CUTOFF)
    for flat in (
        from_bytes,
        read_batch(loaded(), indices, CUTOFF),
        pickle.loads(ForkingPickler.dumps(from_bytes)),
        from_bytes.to("cpu"),
    ):
        found = flat.to_graph()
        assert_same(found, expected)
        for a, b in zip(found.to_data_list(), graphs, strict=True):
            assert list(a.keys()) == list(b.keys())
            assert torch.equal(a.edge_index, b.edge_index)
            assert torch.equal(a.positions, b.positions)


def test_far_images_need_wider_shifts() -> None:
    far = Structure(
        numbers=[1, 1], positions=[[0, 0, 0], [3000.5, 0, 0]], cell=np.eye(3) * 3, pbc=[True] * 3
    )
    for shift, width in ((0, "i2"), (3 * 40_000, "i4")):
        moved = far.positions + np.array([[0, 0, 0], [shift, 0, 0]])
        s = Structure(far.numbers, moved, far.cell, far.pbc)
        flat = FlatBatch.from_structures([s], [4], 2.9)
        assert flat.sections["edge_shift"][0] == width
        assert_same(flat.to_graph(), batch_graphs([structure_to_graph(s, 2.9, index=4)]))


def test_nothing_shares_memory_with_the_buffer(store: StructureStore) -> None:
    flat = read_batch(store, [1, 2], CUTOFF)
    before = flat.buffer.clone()
    graph = flat.to_graph()
    for key in graph.keys():  # noqa: SIM118
        if isinstance(graph[key], torch.Tensor):
            graph[key].fill_(1)
    assert torch.equal(flat.buffer, before)


def test_without_a_cutoff_there_are_no_edges(store: StructureStore) -> None:
    graph = read_batch(store, [1, 2, 3], None).to_graph()
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_shift.shape == (0, 3)
    assert graph.cutoff.isnan().all()
    sizes = [len(s) for s in STRUCTURES[1:4]]
    assert [len(g.positions) for g in graph.to_data_list()] == sizes


def test_parts_of_several_sets_are_read_together(store: StructureStore, tmp_path: Path) -> None:
    with StructureWriter(tmp_path / "b.lmdb") as writer:
        for structure in STRUCTURES[:5]:
            writer.append(structure)
    chosen = SelectedDataset(store, np.arange(23, -1, -1))
    stores = ConcatenatedDataset([StructureStore(tmp_path / "b.lmdb"), chosen])
    mixed = ConcatenatedDataset([chosen, loaded()])
    for dataset in (stores, mixed):
        indices = [0, 28, 7, 4, 5, 25, 28]
        graphs = [structure_to_graph(dataset[i], CUTOFF, index=i) for i in indices]
        assert_same(read_batch(dataset, indices, CUTOFF).to_graph(), batch_graphs(graphs))


def test_store_entries_are_not_made_into_structures(
    store: StructureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlip.datasets.store.decode", None)
    both = ConcatenatedDataset([store, SelectedDataset(store, np.arange(5))])
    assert len(read_batch(both, [3, 26], CUTOFF)) == 2


def with_bytes(structure: Structure, field: str, value: bytes) -> bytes:
    data = encode(structure)
    old = np.ascontiguousarray(getattr(structure, field)).astype(
        np.uint8 if field == "numbers" else np.float64
    )
    assert data.count(old.tobytes()) == 1
    return data.replace(old.tobytes(), value + old.tobytes()[len(value) :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: encode(s)[:-1], r"structure 12: the entry is damaged \("),
        (lambda _: b"", "structure 12: the entry is damaged"),
        (lambda s: with_bytes(s, "numbers", b"\xc8"), "structure 12: .*atomic number 200"),
        (lambda s: with_bytes(s, "positions", np.float64(np.inf).tobytes()), "12: .*not finite"),
    ],
)
def test_a_bad_entry_is_named(change: Callable[[Structure], bytes], words: str) -> None:
    entries = [encode(STRUCTURES[k]) for k in (8, 9, 10)]
    entries[1] = change(STRUCTURES[16])
    with pytest.raises(DataError, match=words):
        FlatBatch.from_bytes(entries, [11, 12, 13])


def test_a_structure_without_neighbour_list_is_named(store: StructureStore) -> None:
    bad = Structure(numbers=[1, 1], positions=np.zeros((2, 3)))
    dataset = ConcatenatedDataset(
        [store, LoadedDataset([bad], ["b.xyz frame 0"], DatasetFacts("test"))]
    )
    with pytest.raises(DataError, match=r"^b.xyz frame 0: atoms 0 and 1 coincide"):
        read_batch(dataset, [0, 24], CUTOFF)
    with pytest.raises(IndexError):
        read_batch(dataset, [25], CUTOFF)
