"""Time the SevenNet-0 architecture: the ``sevenn`` package beside this one.

    OMP_NUM_THREADS=1 python scripts/bench/sevennet.py PYTHON [--repeats 5]

PYTHON is the interpreter of an environment with ``sevenn`` and the same torch (``python -m venv``,
then ``pip install torch sevenn``). sevenn runs its shipped SevenNet-0 without accelerators, which
need a GPU; we run Facet with the same 842,440 weights (128×0e + 64×1e + 32×2e, four blocks and a
last one, gates, radial networks, cutoff 5 Å), random ones: they cost the same. Energy, forces and
stress of rattled copper through both ASE calculators, atoms moved before every call; and one step
of training on eight structures of 32 atoms: squared errors of energies and forces, their
derivatives, Adam. Workers take turns, each repeat a process of its own. Times are of the processor,
one thread: other work on the machine stretches the clock only. Memory is what calls add to a
process that holds package and model: peak resident size. With --keep-memory the workers keep the
memory that they free, as ``mlip`` commands do, and ask the system for less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ase import Atoms
from copper import copper, simulation
from spread import spread

TASKS = ("108 atoms", "500 atoms", "training step")
STRUCTURES, CALLS, WARMUP = 8, 4, 2
FACET: dict[str, Any] = {
    "elements": tuple(range(1, 90)),
    "cutoff": 5.0,
    "hidden": ((128, 64, 32),) * 4,
    "embedding": 128,
    "outputs": 128,
    "radial_hidden": (64, 64),
    "envelope": "xplor",
    "envelope_start": 0.9,
    "node_update": "gate",
    "linear_before": True,
    "block_residual": False,
    "head_hidden": (64,),
    "head_activation": "identity",
    "natural_parity": False,
    "neighbor_power": 1.0,
}


def structures() -> list[Atoms]:
    """Eight structures of 32 atoms, with labels that only have to exist."""
    return [copper(32, seed) for seed in range(STRUCTURES)]


def sevenn_task(task: str) -> Callable[[], None]:
    """Make a call of the peer package."""
    import torch
    from sevenn.calculator import SevenNetCalculator

    calculator = SevenNetCalculator("7net-0", device="cpu")
    if task != "training step":
        return simulation(calculator, int(task.split()[0]))
    import sevenn._keys as keys
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from torch_geometric.data import Batch

    model = calculator.model
    model.set_is_batch_data(True)
    model.train()
    graphs = [
        AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, 5.0))
        for atoms in structures()
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        batch = Batch.from_data_list(graphs)
        optimizer.zero_grad()
        out = model(batch)
        loss = (out[keys.PRED_TOTAL_ENERGY] / 32).square().mean()
        loss = loss + out[keys.PRED_FORCE].square().mean()
        loss.backward()
        optimizer.step()

    return step


def mlip_task(task: str) -> Callable[[], None]:
    """Make a call of this package."""
    import torch

    from mlip.graph import atoms_to_graph, batch_graphs
    from mlip.models import create_model
    from mlip.potential import Potential
    from mlip.simulation.calculator import Calculator

    potential = Potential(
        create_model("facet", FACET), reference_energies=dict.fromkeys(range(1, 90), 0.0)
    )
    if task != "training step":
        return simulation(Calculator(potential.eval()), int(task.split()[0]))
    graphs = [atoms_to_graph(atoms, 5.0) for atoms in structures()]
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-5)

    def step() -> None:
        batch = batch_graphs(graphs)
        optimizer.zero_grad()
        out = potential(batch, stress=False, create_graph=True)
        loss = (out.energy / 32).square().mean() + out.forces.square().mean()
        loss.backward()
        optimizer.step()

    return step


def work(package: str, task: str) -> dict[str, float]:
    """Time one package in this process."""
    import torch

    torch.set_num_threads(1)
    call = {"sevenn": sevenn_task, "mlip": mlip_task}[package](task)
    before = memory()
    return {"seconds": timed(call), "MiB": memory() - before}


def timed(call: Callable[[], None], warmup: int = WARMUP) -> float:
    """Give the median time of calls after some that do not count, s of the processor."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(CALLS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def memory() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def settings_of_memory() -> dict[str, str]:
    """Give the variables with which the C library keeps freed memory."""
    from mlip.memory import LARGEST, NEVER

    return {"MALLOC_TRIM_THRESHOLD_": str(NEVER), "MALLOC_MMAP_THRESHOLD_": str(LARGEST)}


def run(python: str, package: str, task: str, environment: dict[str, str]) -> dict[str, float]:
    """Start a worker."""
    command = [python, __file__, python, "--worker", package, task]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"{package}, {task}:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Print the table, or the numbers of one worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--keep-memory", action="store_true", help="ask the system for less")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker)))
        return
    environment = {**os.environ, **(settings_of_memory() if args.keep_memory else {})}
    print("| task | sevenn (ms) | mlip (ms) | times faster | memory, sevenn (MiB) | mlip | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for task in args.tasks:
        pairs = [
            tuple(
                run(python, package, task, environment)
                for python, package in ((args.python, "sevenn"), (sys.executable, "mlip"))
            )
            for _ in range(args.repeats)
        ]
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        times = [1e3 * statistics.median(p[i]["seconds"] for p in pairs) for i in (0, 1)]
        above = [statistics.median(p[i]["MiB"] for p in pairs) for i in (0, 1)]
        print(
            f"| {task} | {times[0]:.0f} | {times[1]:.0f} | {spread(ratios)} "
            f"| {above[0]:.0f} | {above[1]:.0f} "
            f"| {above[0] / above[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
