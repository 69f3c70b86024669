"""Time the first forces of a shipped potential in new processes: empty cache, then a full one.

    OMP_NUM_THREADS=1 python scripts/bench/cold_start.py [mlearn-facet] [--repeats 3]

Each process imports the package, loads the potential, then computes energy, forces and stress of
eight atoms twice. "Ready" is import and load, "first call" the first of the two less the second.
Wall clock and processor time; median and range of the repeats, an empty cache once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = """
import json, sys, time
times = [(time.perf_counter(), time.process_time())]
def mark():
    times.append((time.perf_counter(), time.process_time()))
import numpy as np
from ase import Atoms
from mlip.graph import atoms_to_graph
from mlip.potential import load_potential
potential = load_potential(sys.argv[1])
numbers = np.resize(potential.elements, 8)
atoms = Atoms(numbers, np.indices((2, 2, 2)).reshape(3, 8).T * 2.8, cell=[5.6] * 3, pbc=True)
graph = atoms_to_graph(atoms, potential.cutoff)
mark()
for _ in range(2):
    potential(graph)
    mark()
(a, b, c, d) = times
print(json.dumps([[b[i] - a[i], 2 * c[i] - b[i] - d[i]] for i in (0, 1)]))
"""


def first_call(name: str, folder: str) -> list[list[float]]:
    """Wall clock and processor time until ready, and of the first call, s."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env={**os.environ, "MLIP_CACHE": folder, "MLIP_BACKEND": "auto"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def row(label: str, found: list[list[list[float]]]) -> str:
    """Format median and range."""
    cells = []
    for clock in (0, 1):
        for what in (0, 1):
            values = [each[clock][what] for each in found]
            spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.2f}{spread}")
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("potential", nargs="?", default="mlearn-facet")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| cache | ready (s) | first call | ready, processor | first call, processor |")
    print("|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        print(row("empty", [first_call(args.potential, folder)]), flush=True)
        found = [first_call(args.potential, folder) for _ in range(args.repeats)]
        print(row("full", found))


if __name__ == "__main__":
    main()
