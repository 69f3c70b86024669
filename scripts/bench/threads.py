"""Time the convolution's compiled passes on one and on two threads, results kept in place.

    python scripts/bench/threads.py [--lmax 1 2 3] [--repeats 8]

As kernels.py (2000 atoms, 40 neighbours, 64 channels, 8 radial functions, float32), but the arrays
that are written exist before: what it costs to get fresh memory from the system does not share out
over threads. Wall time, best of the repeats, one and two threads in turn, twice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from mlip.ops import ConvolutionSignature
from mlip.ops.cpu import library, runner

N_NODES, N_NEIGHBORS, CHANNELS, N_RADIAL, REACH = 2000, 40, 64, 8, 60


def best(call: Callable[[], object], repeats: int) -> float:
    """Shortest time of a call after two that are not counted, ms."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[2:])


def passes(lmax: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Give the forward and the backward pass, radial functions and all gradients."""
    rng = np.random.default_rng(0)
    signature = ConvolutionSignature((CHANNELS,) * (lmax + 1), lmax, tuple(range(lmax + 1)), True)
    layout = library.layout(library.encode(signature))
    n_edges = N_NODES * N_NEIGHBORS
    near = np.arange(n_edges) // N_NEIGHBORS + rng.integers(-REACH, REACH, n_edges)
    source, rowptr = near.clip(0, N_NODES - 1), np.arange(0, n_edges + 1, N_NEIGHBORS)
    edges = runner.EdgeList(rowptr, source)

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    given = (
        numbers(layout.feature_size(N_NODES)), numbers(n_edges, (lmax + 1) ** 2),
        numbers(n_edges, N_RADIAL), numbers(N_RADIAL, signature.n_weights),
    )  # fmt: skip
    out = np.zeros(layout.out_size(N_NODES), np.float32)
    slopes = runner.Gradients(*(np.zeros_like(array) for array in given))
    return (
        lambda: runner.forward(layout, *given, edges, out),
        lambda: runner.backward(layout, *given, out, edges, slopes),
    )


def main() -> None:
    """Print a row for each degree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lmax", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    print("| L | pass | one thread (ms) | two | ratio |")
    print("|--:|---|--:|--:|--:|")
    for lmax in args.lmax:
        for name, call in zip(("forward", "backward"), passes(lmax), strict=True):
            times: dict[int, list[float]] = {1: [], 2: []}
            for threads in (1, 2, 1, 2):
                torch.set_num_threads(threads)
                times[threads].append(best(call, args.repeats))
            one, two = min(times[1]), min(times[2])
            print(f"| {lmax} | {name} | {one:.1f} | {two:.1f} | {one / two:.2f} |", flush=True)


if __name__ == "__main__":
    main()
