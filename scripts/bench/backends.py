"""Time whole models by their kernels beside plain PyTorch.

    OMP_NUM_THREADS=1 python scripts/bench/backends.py [MODEL ...] [--atoms 108] [--repeats 5]

MODEL is a file, a shipped potential or an untrained model of time_model.py; default: the shipped
one, facet-64, tdn-64 and equiformer_v3-64. Energy, forces and stress of rattled copper through the
ASE calculator, atoms moved before every call, and one step of training on eight structures of 32
atoms (squared errors of energies and forces with their derivatives). ``MLIP_BACKEND=torch`` and
``auto`` take turns in one process, each with one untimed call before the one that counts; one
thread, times of the processor.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from copper import simulation
from facet import training
from spread import spread
from time_model import UNTRAINED

from mlip.models import create_model
from mlip.potential import Potential, load_potential
from mlip.simulation.calculator import Calculator

BACKENDS = ("torch", "auto")


def potential_of(name: str) -> Potential:
    """Make the potential of a name on the command line; Facet asks for the back end here."""
    if name not in UNTRAINED:
        return load_potential(name)
    torch.manual_seed(0)
    model = create_model(name.split("-")[0], UNTRAINED[name])
    return Potential(model, reference_energies={29: 0.0})


def simulated(name: str, n_atoms: int) -> Callable[[], object]:
    """Give a call of the calculator."""
    return simulation(Calculator(potential_of(name).eval().requires_grad_(False)), n_atoms)


def trained(name: str) -> Callable[[], object]:
    """Give a step of training."""
    return training(potential_of(name).train())


def measure(make: Callable[[], Callable[[], object]], repeats: int) -> str:
    """Time both back ends in turn; cells of a row."""
    calls, times = {}, {}
    for backend in BACKENDS:
        os.environ["MLIP_BACKEND"] = backend
        calls[backend], times[backend] = make(), []
        calls[backend]()
    for _ in range(repeats):
        for backend in BACKENDS:
            os.environ["MLIP_BACKEND"] = backend
            calls[backend]()  # memory and caches as in a run of one back end
            start = time.process_time()
            calls[backend]()
            times[backend].append(time.process_time() - start)
    cells = []
    for backend in BACKENDS:
        own = [1e3 * each for each in times[backend]]
        cells.append(spread(own, 1))
    ratios = [a / b for a, b in zip(times["torch"], times["auto"], strict=True)]
    cells.append(spread(ratios))
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["mlearn-facet", "facet-64", "tdn-64", "equiformer_v3-64"]
    parser.add_argument("models", nargs="*", default=names)
    parser.add_argument("--atoms", type=int, default=108)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | task | plain PyTorch (ms) | kernels | times faster |")
    print("|---|---|--:|--:|--:|")
    for name in args.models:
        tasks = {
            f"{args.atoms} atoms": partial(simulated, name, args.atoms),
            "training step": partial(trained, name),
        }
        for task, make in tasks.items():
            print(f"| {name} | {task} | {measure(make, args.repeats)} |", flush=True)


if __name__ == "__main__":
    main()
