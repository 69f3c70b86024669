"""Time the data layer: reading into batches, safe against plain unpickling, writing, opening.

    python scripts/bench/datasets.py [--structures 2000] [--repeats 7] [--workers 2]

Makes slabs with adsorbates of about 80 atoms, rattled, with random labels, and writes them as
native store, ASE LMDB and OC20 LMDB (pickled torch_geometric objects). Every reader goes through
all of them in one random order, in batches of 16, after a warm-up, in rounds that take the readers
in turn; given are the median time a structure, the range, and the CPU time of this process. If
fairchem can be imported its data sets read the same files (1.x: LmdbDataset, 2.x: AseDBDataset;
they need lmdb < 2). Nothing outside a temporary folder is touched.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from ase.build import add_adsorbate, fcc111
from torch_geometric.data import Batch, Data

from mlip.datasets import Structure, StructureStore, StructureWriter, open_dataset
from mlip.datasets.feed.loader import make_loader, read_batch
from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.datasets.formats.aselmdb_write import AseLmdbWriter

BATCH = 16
CUTOFF = 6.0  # Å


def structures(number: int) -> list[Structure]:
    """Make slabs of 5 layers of 4 x 4 atoms, or of 3 x 5, with an adsorbate."""
    random = np.random.default_rng(0)
    made = []
    for k in range(number):
        size = ((4, 4, 5), (3, 5, 5), (4, 4, 4), (5, 4, 5))[k % 4]
        slab = fcc111(("Cu", "Ag", "Pt")[k % 3], size, vacuum=10.0)
        add_adsorbate(slab, "O", 1.4, "fcc")
        tags = np.where(slab.get_tags() == 0, 2, (slab.get_tags() == 1).astype(int))
        n = len(slab)
        positions = (slab.positions + random.normal(0, 0.1, (n, 3))).astype(np.float32)
        forces = random.normal(0, 1, (n, 3)).astype(np.float32)
        made.append(
            Structure(
                slab.numbers,
                positions,
                slab.cell.array.astype(np.float32),
                [True] * 3,
                energy=float(random.normal(-3, 1)),
                forces=forces,
                tags=tags,
                fixed=tags == 0,
                info={"sid": k, "fid": 0},
            )
        )
    return made


def oc20_entry(s: Structure) -> bytes:
    """Pickle a structure as the published converters do."""
    data = Data(
        pos=torch.tensor(s.positions, dtype=torch.float32),
        cell=torch.tensor(s.cell, dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(s.numbers, dtype=torch.float32),
        natoms=len(s),
        tags=torch.tensor(s.tags),
        y=s.energy,
        force=torch.tensor(s.forces, dtype=torch.float32),
        fixed=torch.tensor(s.fixed, dtype=torch.float32),
        sid=s.info["sid"],
        fid=0,
    )
    return pickle.dumps(data, protocol=-1)


def write_all(folder: Path, made: list[Structure]) -> None:
    """Write the three files."""
    with StructureWriter(folder / "native.lmdb") as writer:
        for s in made:
            writer.append(s)
    with AseLmdbWriter(folder / "ase.aselmdb") as writer:
        for s in made:
            writer.append(s)
    path = str(folder / "oc20.lmdb")
    with (
        lmdb.open(path, subdir=False, map_size=1 << 32, lock=False) as file,
        file.begin(write=True) as transaction,
    ):
        for k, s in enumerate(made):
            transaction.put(str(k).encode(), oc20_entry(s))
        transaction.put(b"length", pickle.dumps(len(made), protocol=-1))


def batches(order: np.ndarray) -> list[list[int]]:
    """Cut an order into batches."""
    return [part.tolist() for part in np.array_split(order, max(len(order) // BATCH, 1))]


def through(path: Path, order: np.ndarray, cutoff: float | None) -> Callable[[], None]:
    """Read a file into graphs with this package, in this process."""
    dataset = open_dataset(path)

    def run() -> None:
        for wanted in batches(order):
            read_batch(dataset, wanted, cutoff).to_graph()

    return run


def through_workers(
    path: Path, order: np.ndarray, cutoff: float | None, workers: int
) -> Callable[[], None]:
    """Read a file into graphs with worker processes that stay."""
    loader = make_loader(open_dataset(path), batches(order), cutoff, workers=workers)

    def run() -> None:
        for _ in loader:
            pass

    return run


def plain_pickle(path: Path, order: np.ndarray) -> Callable[[], None]:
    """Read OC20 entries as they are usually read: unsafe unpickling and torch_geometric's Batch."""
    keys = [str(i).encode() for i in range(len(order))]
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as file, file.begin() as now:
        entries = [bytes(now.get(key)) for key in keys]

    def run() -> None:
        for wanted in batches(order):
            Batch.from_data_list([pickle.loads(entries[i]) for i in wanted])

    return run


def ase_backend(path: Path, order: np.ndarray) -> Callable[[], None] | None:
    """Read the ASE LMDB with ase-db-backends into Atoms (no batch), where it is installed."""
    try:
        from ase_db_backends.aselmdb import LMDBDatabase
    except ImportError:
        return None

    def run() -> None:
        with LMDBDatabase(str(path), readonly=True) as rows:
            for i in order:
                rows.get(int(i) + 1).toatoms()

    return run


def peers(folder: Path, order: np.ndarray) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give fairchem's readers, where they can be imported."""
    try:
        from fairchem.core.datasets.lmdb_dataset import LmdbDataset
    except ImportError:
        pass
    else:
        old: Any = LmdbDataset({"src": str(folder / "oc20.lmdb")})
        yield "fairchem 1.x LmdbDataset, OC20, batches", lambda: collate(old, order)
    try:
        from fairchem.core.datasets.ase_datasets import AseDBDataset
        from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
    except ImportError:
        return
    options = {"r_energy": True, "r_forces": True}
    new: Any = AseDBDataset({"src": str(folder / "ase.aselmdb"), "a2g_args": options})

    def run() -> None:
        for wanted in batches(order):
            atomicdata_list_to_batch([new[i] for i in wanted])

    yield "fairchem 2.x AseDBDataset, aselmdb, batches", run


def collate(dataset: Any, order: np.ndarray) -> None:
    """Read torch_geometric objects and join them."""
    for wanted in batches(order):
        Batch.from_data_list([dataset[i] for i in wanted])


def durable_writing(folder: Path, made: list[Structure]) -> Callable[[], None]:
    """Write a native store, each batch of entries synchronised with the disk."""

    def run() -> None:
        with StructureWriter(folder / "again.lmdb", overwrite=True) as writer:
            for s in made:
                writer.append(s)

    return run


def opening(folder: Path, number: int) -> tuple[float, float]:
    """Give seconds to open a synthetic store of many entries, and bytes of index an entry."""
    path = folder / "many.lmdb"
    atom = Structure([29], [[0.0, 0.0, 0.0]], energy=-3.5)
    with StructureWriter(path) as writer:
        for _ in range(number):
            writer.append(atom)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        store = StructureStore(path)
        times.append(time.perf_counter() - begun)
        index = store._index.nbytes / number
        store.close()
        del store
    return statistics.median(times), index


def packing(number: int) -> str:
    """Pack structures of log-normal size for 8 processes; tell fill, balance and time."""
    random = np.random.default_rng(1)
    atoms = np.clip(np.exp(random.normal(np.log(60), 0.6, number)), 4, 400).astype(np.uint32)
    edges = (atoms * random.uniform(40, 60, number)).astype(np.uint32)
    sampler = EdgeBudgetSampler(atoms, edges, max_edges=35_000, max_atoms=700, seed=0, world_size=8)
    sampler.batches(0)
    begun = time.perf_counter()
    found = sampler.batches(1)
    seconds = time.perf_counter() - begun
    cost = np.array([edges[batch].sum() for batch in found], dtype=float)
    size = np.array([atoms[batch].sum() for batch in found], dtype=float)
    fill = np.maximum(cost / 35_000, size / 700).mean()
    steps = cost.reshape(-1, 8)
    balance = steps.max(1) / steps.mean(1)
    return (
        f"{number} structures, 8 processes: fill {fill:.4f}, max/mean over ranks "
        f"{balance.mean():.4f} (worst step {balance.max():.4f}), {seconds:.2f} s an epoch"
    )


def measure(
    tasks: dict[str, Callable[[], None]], number: int, repeats: int
) -> list[tuple[str, float, float, float, float]]:
    """Time all tasks in turn; µs a structure: median, least, most, CPU of this process."""
    wall: dict[str, list[float]] = {name: [] for name in tasks}
    cpu: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            begun, used = time.perf_counter(), time.process_time()
            task()
            if turn:  # the first is the warm-up
                wall[name].append((time.perf_counter() - begun) / number * 1e6)
                cpu[name].append((time.process_time() - used) / number * 1e6)
    return [
        (name, statistics.median(w), min(w), max(w), statistics.median(cpu[name]))
        for name, w in wall.items()
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structures", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--many", type=int, default=1_000_000, help="entries of the store to open")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = structures(arguments.structures)
    order = np.random.default_rng(2).permutation(len(made))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder, made)
        native, rows, old = folder / "native.lmdb", folder / "ase.aselmdb", folder / "oc20.lmdb"
        tasks: dict[str, Callable[[], None]] = {
            "native store, batches": through(native, order, None),
            f"native store, batches, {arguments.workers} workers": through_workers(
                native, order, None, arguments.workers
            ),
            f"native store, batches with neighbours at {CUTOFF:g} Å": through(
                native, order, CUTOFF
            ),
            f"native store, neighbours, {arguments.workers} workers": through_workers(
                native, order, CUTOFF, arguments.workers
            ),
            "aselmdb, batches": through(rows, order, None),
            "OC20 LMDB, safely, batches": through(old, order, None),
            "plain pickle.loads and Batch, OC20": plain_pickle(old, order),
            "native store, durable writing": durable_writing(folder, made),
        }
        backend = ase_backend(rows, order)
        if backend is not None:
            tasks["ase-db-backends, aselmdb, Atoms only"] = backend
        if int(lmdb.__version__.split(".")[0]) < 2:
            tasks |= dict(peers(folder, order))
        mean = np.mean([len(s) for s in made])
        print(f"{len(made)} structures, mean {mean:.1f} atoms; load {os.getloadavg()[0]:.1f}")
        sizes = ", ".join(
            f"{p.name} {p.stat().st_size / len(made) / 1e3:.1f} kB" for p in (native, rows, old)
        )
        print(f"bytes a structure: {sizes}\n")
        print("| reader | structures/s | µs each, median (range) | CPU µs |\n|---|--:|--:|--:|")
        for task, median, low, high, cpu in measure(tasks, len(made), arguments.repeats):
            times = f"{median:.0f} ({low:.0f}–{high:.0f}) | {cpu:.0f}"
            print(f"| {task} | {1e6 / median:,.0f} | {times} |")
        tasks.clear()
        seconds, index = opening(folder, arguments.many)
        print(f"\nopening {arguments.many:,} entries: {seconds:.3f} s, index {index:.0f} bytes")
        print(packing(200_000))
        print(packing(1_000_000))


if __name__ == "__main__":
    main()
