"""Time EquiformerV3 at its published MPtrj size beside the published arrangement of its operations.

    python scripts/bench/equiformer_v3.py [--atoms 32 108] [--repeats 5] [--threads 1] [--forms …]

Energy, forces and stress of rattled copper, gradient mode, random weights, float32. Both take the
same graph and give the same numbers (checked). They run in turn, each in a process of its own that
stays alive, so that a busy moment of the machine hits both; the ratio is that of each pair of runs.
Peak memory is that of the process, less what it held before its first run.

``--forms`` chooses what runs: ``--forms mlip`` for instance where the published arrangement, which
keeps 0.2 MB for each edge and block, needs too much memory. Each form adds a step to those before:

    published   operations as in the official code
    stored      smallest exact grids, layers on coefficients, tables of elements, plain PyTorch
    groups      a few atoms at a time; all but one tensor is computed again in the backward pass
    mlip        compiled rotations and products on the sphere: the default
    splines     radial networks as splines, an option
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from spread import spread

FORMS = ("published", "stored", "groups", "mlip", "splines")


def build(form: str, number: int, threads: int) -> Callable[[], tuple[Any, ...]]:
    """Make the function that computes energy, forces and stress."""
    import torch
    from copper import copper
    from equiformer_v3_published import PublishedForm

    import mlip.models.equiformer_v3 as equiformer_v3
    from mlip.graph import atoms_to_graph
    from mlip.models import create_model
    from mlip.potential import Potential

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = FORMS.index(form)
    if step < FORMS.index("mlip"):
        os.environ["MLIP_BACKEND"] = "torch"
    if step < FORMS.index("groups"):
        equiformer_v3.group_edges = lambda target, n_atoms: None  # noqa: ARG005
    model: Any = create_model("equiformer_v3", {"elements": (29,)}).eval().requires_grad_(False)
    potential = Potential(model.with_tables() if form == "splines" else model)
    graph = atoms_to_graph(copper(number), model.cutoff)
    if form == "published":
        published = PublishedForm(model)
        return lambda: published(graph)

    def run() -> tuple[Any, ...]:
        prediction = potential(graph)
        return prediction.energy, prediction.forces, prediction.stress

    return run


def work(form: str, number: int, threads: int) -> None:
    """Run once for each line on the standard input and print what was found."""
    run = build(form, number, threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        start = time.perf_counter()
        energy, forces, stress = run()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        found = [float(energy[0]), *forces[0].tolist(), *stress[0, 0].tolist()]
        print(json.dumps({"s": seconds, "MiB": peak / 1024, "numbers": found}), flush=True)


def measure(number: int, forms: list[str], args: argparse.Namespace) -> str:
    """Run the forms in turn and make the rows of the table."""
    command = [sys.executable, __file__, "--threads", str(args.threads), "--worker"]
    workers = {
        form: subprocess.Popen(
            [*command, form, str(number)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for form in forms
    }
    runs: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
    for repeat in range(-1, args.repeats):
        for form, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("run\n")
            worker.stdin.flush()
            found = json.loads(worker.stdout.readline())
            if repeat >= 0:
                runs[form].append(found)
    for worker in workers.values():
        worker.communicate()
    first = runs[forms[0]]
    for form in forms[1:]:
        pairs = zip(first[0]["numbers"], runs[form][0]["numbers"], strict=True)
        assert all(abs(a - b) < 1e-4 * (1 + abs(a)) for a, b in pairs), f"{form}: other numbers"
    rows = []
    for form in forms:
        ratios = [a["s"] / b["s"] for a, b in zip(first, runs[form], strict=True)]
        memory = first[-1]["MiB"] / runs[form][-1]["MiB"]
        cells = [spread([r["s"] for r in runs[form]]), f"{runs[form][-1]['MiB']:.0f}"]
        cells += ["", ""] if form == forms[0] else [spread(ratios), f"{memory:.1f}"]
        rows.append(f"| {number} | {form} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table, or serve as a worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--atoms", type=int, nargs="+", default=[32, 108], choices=[32, 108, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["published", "mlip"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], int(args.worker[1]), args.threads)
    import torch

    print(
        f"EquiformerV3 L4 N7, energy + forces + stress, float32, {args.threads} thread(s) of "
        f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores), "
        f"torch {torch.__version__}, {args.repeats} repeats after 1"
    )
    print("| atoms | form | s | peak (MiB) | times faster | times less memory |")
    print("|--:|---|--:|--:|--:|--:|")
    for number in args.atoms:
        print(measure(number, args.forms, args), flush=True)
    return None


if __name__ == "__main__":
    main()
