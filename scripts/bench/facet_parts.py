"""Show where the time of a call of a Facet goes.

    OMP_NUM_THREADS=1 python scripts/bench/facet_parts.py [--atoms 108 500] [--calls 20]

The facet-s of time_model.py on rattled copper through the ASE calculator, atoms moved before every
call, energy, forces and stress; one thread. Parts by Python's profiler, own time of functions;
"whole" is the median of calls without it, "rest" what is left of that: PyTorch's small operations,
Python, the graph, ASE.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import defaultdict

import torch
from copper import simulation
from time_model import UNTRAINED

from mlip.models import create_model
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator

PARTS = {  # words in the file or the name of a function
    "convolution, forward": ("convolution_", "forward_pass"),
    "convolution, backward": ("mlip_pairs_", ""),
    "updates of atoms": ("node_program_", "run"),
    "functions of edges": ("mlip_edges_", ""),
    "sums of chunks": ("", "add_chunks"),
}


def part_of(file: str, name: str) -> str | None:
    """Name the part that a function belongs to."""
    return next((p for p, (a, b) in PARTS.items() if a in file and b in name), None)


def row(potential: Potential, atoms: int, calls: int) -> dict[str, float]:
    """Milliseconds of a whole call and of its parts."""
    call = simulation(Calculator(potential.eval()), atoms)
    for _ in range(3):
        call()
    whole = []
    for _ in range(calls):
        start = time.process_time()
        call()
        whole.append(time.process_time() - start)
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for _ in range(calls):
        call()
    profile.disable()
    found: dict[str, float] = defaultdict(float)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, _) in stats.items():
        part = part_of(file, name)
        if part is not None:
            found[part] += 1e3 * own / calls
    total = 1e3 * statistics.median(whole)
    return {**dict(sorted(found.items())), "rest": total - sum(found.values()), "whole": total}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", type=int, nargs="+", default=[108, 500])
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    potential = Potential(create_model("facet", UNTRAINED["facet-s"]), reference_energies={29: 0.0})
    potential.requires_grad_(False)  # as the calculator has those that it loads
    columns = [row(potential, atoms, args.calls) for atoms in args.atoms]
    print("| ms | " + " | ".join(f"{atoms} atoms" for atoms in args.atoms) + " |")
    print("|---|" + "--:|" * len(columns))
    for part in columns[0]:
        print(f"| {part} | " + " | ".join(f"{c.get(part, 0):.1f}" for c in columns) + " |")


if __name__ == "__main__":
    main()
