"""Loading with workers: the same batches however they start, in order, without leaks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mlip.datasets.dataset import ConcatenatedDataset, DatasetFacts, LoadedDataset
from mlip.datasets.feed.loader import GraphLoader, make_loader
from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.datasets.store import StructureStore
from mlip.datasets.structure import Structure, structure_to_graph
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, InputError
from mlip.graph import batch_graphs

CUTOFF = 3.5
COUNT = 60


def structure(number: int) -> Structure:
    random = np.random.default_rng(number)
    n = int(random.integers(2, 12))
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)[:n]
    return Structure(
        numbers=random.integers(1, 90, n),
        positions=2.0 * grid + random.uniform(-0.3, 0.3, (n, 3)),
        cell=np.eye(3) * 7.0,
        pbc=[True] * 3,
        energy=float(number),
        forces=random.normal(size=(n, 3)),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a.lmdb"
    with StructureWriter(path) as writer:
        for i in range(COUNT):
            writer.append(structure(i))
    return path


def sampler_of(store: StructureStore, budget: int = 40) -> EdgeBudgetSampler:
    atoms = store.n_atoms()
    return EdgeBudgetSampler(atoms, atoms, max_edges=budget, seed=7)


def places(loader: GraphLoader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


@pytest.mark.parametrize(
    ("workers", "start_method"), [(0, None), (2, "fork"), (1, "spawn"), (1, "forkserver")]
)
def test_batches_follow_the_sampler_epoch_after_epoch(
    path: Path, workers: int, start_method: str | None
) -> None:
    store = StructureStore(path)
    assert store[3].energy == 3.0  # the file is open in this process before workers start
    sampler = sampler_of(store)
    loader = make_loader(store, sampler, CUTOFF, workers=workers, start_method=start_method)
    for epoch, step in ((0, 0), (1, 0), (1, 3), (2, 100)):
        sampler.start(epoch, step)
        assert places(loader) == list(sampler.batches(epoch))[step:]
    sampler.start(0)
    for k, batch in enumerate(loader):
        if k % 5 == 0:
            graphs = [structure_to_graph(store[i], CUTOFF, index=i) for i in batch.index.tolist()]
            expected = batch_graphs(graphs)
            for key in ("positions", "edge_index", "edge_shift", "energy", "forces", "batch"):
                assert torch.equal(batch[key], expected[key]), key
    assert store[3].energy == 3.0


def test_what_was_read_ahead_never_leaks_into_the_next_pass(path: Path) -> None:
    store = StructureStore(path)
    sampler = sampler_of(store, budget=15)
    loader = make_loader(store, sampler, CUTOFF, workers=2, start_method="fork")
    for epoch in range(4):
        sampler.start(epoch)
        seen = []
        for batch in loader:
            seen.append(batch.index.tolist())
            if len(seen) == 3:
                break
        assert seen == list(sampler.batches(epoch))[:3]
        sampler.start(epoch, 3)
        assert seen + places(loader) == list(sampler.batches(epoch))


def test_a_pass_keeps_the_position_it_began_with(path: Path) -> None:
    store = StructureStore(path)
    sampler = sampler_of(store)
    for workers in (0, 2):
        loader = make_loader(store, sampler, None, workers=workers, start_method="fork")
        sampler.start(1)
        running = iter(loader)
        sampler.start(5, 2)
        assert [b.index.tolist() for b in running] == list(sampler.batches(1))


@pytest.fixture
def damaged(path: Path, tmp_path: Path) -> StructureStore:
    content = path.read_bytes()
    marker = structure(17).forces[0].tobytes()
    assert content.count(marker) == 1
    (tmp_path / "bad.lmdb").write_bytes(content.replace(marker, bytes(24)))
    return StructureStore(tmp_path / "bad.lmdb")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_entry_is_one_clear_error(damaged: StructureStore, workers: int) -> None:
    order = [[1, 2], [3, 17], [4]]
    loader = make_loader(damaged, order, CUTOFF, workers=workers, start_method="fork")
    seen = []
    try:
        for batch in loader:
            seen += batch.index.tolist()
    except DataError as error:
        problem = (type(error), str(error))
    assert seen == [1, 2]
    assert problem[0] is DataError
    assert problem[1].startswith(f"{damaged.path}: entry 17: the entry is damaged")
    assert "Traceback" not in problem[1]
    for batch in loader:
        assert batch.index.tolist() == [1, 2]
        break
    processes = loader._groups._iterator._workers if workers else []
    gc.disable()
    try:
        del loader  # no cycle keeps it: its workers have ended when this is done
        assert [process.exitcode for process in processes] == [0] * workers
    finally:
        gc.enable()


def test_structures_in_memory_and_without_neighbours_too(path: Path) -> None:
    names = [f"memory frame {i}" for i in range(10)]
    memory = LoadedDataset([structure(i) for i in range(10)], names, DatasetFacts("test"))
    both = ConcatenatedDataset([StructureStore(path), memory])
    loader = make_loader(both, [[0, 61], [62]], None, workers=1, start_method="fork")
    assert [batch.energy.tolist() for batch in loader] == [[0.0, 1.0], [2.0]]


def test_global_state_is_left_alone(path: Path) -> None:
    store = StructureStore(path)
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    places(make_loader(store, sampler_of(store), None, workers=2, start_method="fork"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_unknown_start_method_is_named(path: Path) -> None:
    with pytest.raises(InputError, match=r"'frok' is not one of .*fork"):
        make_loader(StructureStore(path), [[0]], None, workers=1, start_method="frok")


def resident(pid: int | str) -> float:
    """Memory of a process that no file backs, MB (pages of the store come and go)."""
    pages, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_memory_stays_constant_over_epochs(path: Path) -> None:
    store = StructureStore(path)
    sampler = sampler_of(store, budget=60)
    loader = make_loader(store, sampler, CUTOFF, workers=1, start_method="fork")
    known = set(children())

    def run(epochs: range) -> list[float]:
        for epoch in epochs:
            sampler.start(epoch)
            places(loader)
        gc.collect()
        return [resident(pid) for pid in ("self", *sorted(set(children()) - known))]

    warm = run(range(40))
    assert len(warm) == 2
    after = run(range(40, 160))
    assert [b - a for a, b in zip(warm, after, strict=True)] == pytest.approx([0, 0], abs=3)
