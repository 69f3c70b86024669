"""Time a Facet of the published size by its kernels, beside plain PyTorch in two forms.

    OMP_NUM_THREADS=1 python scripts/bench/facet.py [--atoms 108 500] [--repeats 7]

Energy, forces and stress of rattled copper through the ASE calculator (facet-s of time_model.py,
atoms moved before every call), and one step of training on eight structures of 32 atoms: squared
errors of energies and forces with their derivatives. "Definition": one message an edge, path by
path; "moments": neighbours are contracted before they are coupled, the best of plain PyTorch, which
``MLIP_BACKEND=torch`` runs; "kernels": the default. Forms take turns in one process, each with one
untimed call and the mean of three; one thread, times of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from copper import copper, simulation
from spread import spread
from time_model import UNTRAINED

from mlip.graph import atoms_to_graph, batch_graphs
from mlip.models import create_model
from mlip.ops import messages
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator

FORMS = ("definition", "moments", "kernels")
CALLS = 3  # timed after one that is not
MOMENTS = messages.radial_convolution


def training(potential: Potential) -> Callable[[], object]:
    """Give a call with the gradients of a loss of energies and forces."""
    graphs = [atoms_to_graph(copper(32, seed), potential.cutoff) for seed in range(8)]
    batch = batch_graphs(graphs)

    def call() -> None:
        out = potential(batch, stress=False, create_graph=True)
        loss = (out.energy / 32).square().mean() + out.forces.square().mean()
        potential.zero_grad()
        loss.backward()

    return call


def take(potential: Potential, form: str) -> None:
    """Choose a form."""
    potential.model.backend = "auto" if form == "kernels" else "torch"  # type: ignore[assignment]
    definition = partial(MOMENTS, use_definition=True)
    messages.radial_convolution = definition if form == "definition" else MOMENTS


def measure(potential: Potential, call: Callable[[], object], repeats: int) -> str:
    """Time all forms in turn; cells of a row."""
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            take(potential, form)
            call()  # memory and caches as in a run of one form
            start = time.process_time()
            for _ in range(CALLS):
                call()
            times[form].append((time.process_time() - start) / CALLS)
    cells = [f"{1e3 * statistics.median(times[form]):.1f}" for form in FORMS]
    for form in FORMS[:2]:
        ratios = [a / b for a, b in zip(times[form], times["kernels"], strict=True)]
        cells.append(spread(ratios))
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", type=int, nargs="+", default=[108, 500])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    potential = Potential(create_model("facet", UNTRAINED["facet-s"]), reference_energies={29: 0.0})
    print(
        "| task | definition (ms) | moments | kernels | definition / kernels | moments / kernels |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    potential.eval().requires_grad_(False)  # as the calculator has those that it loads
    for number in args.atoms:
        row = measure(potential, simulation(Calculator(potential), number), args.repeats)
        print(f"| {number} atoms | {row} |", flush=True)
    potential.train().requires_grad_(True)
    print(f"| training step | {measure(potential, training(potential), args.repeats)} |")


if __name__ == "__main__":
    main()
