"""Time energy, forces and stress of potentials on rattled copper, beside ASE's EMT.

    python scripts/bench/time_model.py [POTENTIAL ...] [--threads 2] [--repeats 10]

POTENTIAL is a file, the name of a shipped potential, or an untrained model: facet-s (a Facet of
that published size, in our exact setting), facet-64, tdn-64 and equiformer_v3-64 (64 channels of
l = 0, 1, 2, three rounds of messages, the same cutoff); default: the shipped ones and facet-s. Each
runs in a process of its own, so that the peak memory is its own; every repeat moves the atoms, so
that nothing is cached but neighbours within a skin. The time is that of an ASE calculator: the
whole of what a simulation waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from ase.calculators.emt import EMT
from copper import copper

COPPER: dict[str, Any] = {"elements": (29,), "cutoff": 6.0}
UNTRAINED: dict[str, dict[str, Any]] = {
    "facet-s": {**COPPER, "hidden": ((128, 64, 32),) * 2, "embedding": 64, "outputs": 64},
    "facet-64": {**COPPER, "hidden": ((64, 64, 64),) * 2, "embedding": 64, "outputs": 64},
    "tdn-64": {**COPPER, "lmax": 2, "channels": 64, "layers": 2},
    "equiformer_v3-64": {
        **COPPER,
        "lmax": 2,
        "channels": 64,
        "layers": 2,
        "feed_forward_hidden": 128,
        "edge_channels": 64,
    },
}


def calculator(name: str, dtype: str) -> Any:
    """Make the calculator of a name on the command line."""
    if name == "EMT":
        return EMT()
    from mlip.models import create_model
    from mlip.potential import Potential
    from mlip.simulation.calculator import Calculator

    if name not in UNTRAINED:
        return Calculator(name, dtype=dtype)
    model = create_model(name.split("-")[0], UNTRAINED[name])
    potential = Potential(model, reference_energies={29: 0.0}).eval().requires_grad_(False)
    return Calculator(potential, dtype=dtype)


def measure(name: str, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time one potential on one structure, in this process."""
    if name != "EMT":
        import torch

        torch.set_num_threads(args.threads)
    atoms = copper(number)
    atoms.calc = calculator(name, args.dtype)
    rng = np.random.default_rng(1)
    times = []
    for repeat in range(-args.warmup, args.repeats):
        atoms.positions += rng.normal(0, 1e-3, atoms.positions.shape)
        start = time.perf_counter()
        atoms.get_forces()
        atoms.get_stress()
        atoms.get_potential_energy()
        if repeat >= 0:
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": times, "peak_MiB": peak}


def _row(name: str, number: int, argv: list[str]) -> str:
    command = [sys.executable, __file__, *argv, "--worker", name, str(number)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return f"| {os.path.basename(name)} | {number} | failed: {reason[0]} | | | |"
    found = json.loads(process.stdout.splitlines()[-1])
    times = 1000 * np.array(found["seconds"])
    median = statistics.median(times)
    return (
        f"| {os.path.basename(name)} | {number} | {median:.1f} | {times.min():.1f}–"
        f"{times.max():.1f} | {1000 * median / number:.1f} | {found['peak_MiB']:.0f} |"
    )


def main(argv: list[str]) -> None:
    """Print the table, or the numbers of one measurement in a worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("potentials", nargs="*")
    parser.add_argument("--atoms", type=int, nargs="+", default=[108, 500])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(measure(args.worker[0], int(args.worker[1]), args)))
        return
    import torch

    from mlip.potential import shipped_potentials

    names = args.potentials or [*shipped_potentials(), "facet-s"]
    print(
        f"energy + forces + stress of rattled copper, {args.dtype}, {args.threads} threads of "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}; "
        f"{args.repeats} repeats after {args.warmup}"
    )
    print("| potential | atoms | median (ms) | min–max (ms) | µs/atom | peak memory (MiB) |")
    print("|---|--:|--:|--:|--:|--:|")
    for number in args.atoms:
        for name in ["EMT", *names]:
            print(_row(name, number, argv), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
