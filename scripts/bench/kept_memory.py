"""Time processes that keep freed memory, as the ``mlip`` command does, beside ones that do not.

    OMP_NUM_THREADS=1 python scripts/bench/kept_memory.py [MODEL ...] [--atoms 108] [--pairs 3]

MODEL as in backends.py. A step of training learns from eight structures of 32 atoms; with --atoms
it is a call of the calculator. Both ways take turns, each in a process of its own with two untimed
steps before those that count. Processor time of a step, median and range over processes; pages of
4 kB asked for in a step; peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from spread import spread

WAYS = ("gives back", "keeps")


def worker(name: str, way: str, steps: int, atoms: int | None) -> dict[str, float]:
    """Train or simulate in this process."""
    import torch
    from backends import simulated, trained

    from mlip.memory import keep_freed_memory

    if way == "keeps" and not keep_freed_memory():
        raise SystemExit("this C library, or a setting of the environment, leaves no choice")
    torch.set_num_threads(1)
    step = simulated(name, atoms) if atoms else trained(name)
    step()
    step()
    pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    for _ in range(steps):
        step()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "ms": 1e3 * (time.process_time() - start) / steps,
        "pages": (used.ru_minflt - pages) / steps,
        "MiB": used.ru_maxrss / 1024,
    }


def main() -> None:
    """Print the table, or what one process measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["mlearn-facet", "facet-64", "tdn-64", "equiformer_v3-64"]
    parser.add_argument("models", nargs="*", default=names)
    parser.add_argument("--atoms", type=int, help="simulate so many, do not train")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.models[0], args.worker, args.steps, args.atoms)))
        return
    print("| model | memory | step (ms) | times faster | pages a step | peak (MiB) |")
    print("|---|---|--:|--:|--:|--:|")
    for name in args.models:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.pairs):
            for way in WAYS:
                command = [sys.executable, __file__, name, "--worker", way]
                command += ["--steps", str(args.steps)]
                command += ["--atoms", str(args.atoms)] if args.atoms else []
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[way].append(json.loads(output.splitlines()[-1]))
        ratios = [a["ms"] / b["ms"] for a, b in zip(*found.values(), strict=True)]
        for way in WAYS:
            times, faster = [run["ms"] for run in found[way]], spread(ratios)
            pages, peak = (max(run[key] for run in found[way]) for key in ("pages", "MiB"))
            cell = faster if way == "keeps" else ""
            print(f"| {name} | {way} | {spread(times, 0)} | {cell} | {pages:.0f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
