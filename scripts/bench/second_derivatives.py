"""Time all second derivatives of the convolution on the CPU, in one pass and as a sum of passes.

    OMP_NUM_THREADS=1 python scripts/bench/second_derivatives.py [--lmax 1 2 3] [--repeats 9]

256 atoms with 78 neighbours, degrees 0 to L of 32 channels, paths that conserve parity, float32,
cotangents of the gradients by features, harmonics and weights (given) or 8 radial functions, as a
force loss has them. Both ways in turn; one thread, time of the processor, median and range of the
ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from spread import spread
from torch import Tensor

from mlip.ops import ConvolutionSignature
from mlip.ops.cpu.double_backward import one_pass, sum_of_passes
from mlip.ops.cpu.library import encode, layout

ATOMS, NEIGHBORS, CHANNELS = 256, 78, 32


def row(lmax: int, n_radial: int, repeats: int) -> str:
    """Time one convolution; cells of a row."""
    torch.manual_seed(0)
    signature = ConvolutionSignature((CHANNELS,) * (lmax + 1), lmax, tuple(range(lmax + 1)), True)
    shape, n_edges = layout(encode(signature)), ATOMS * NEIGHBORS
    inputs = [
        torch.randn(shape.feature_size(ATOMS)),
        torch.randn(n_edges, (lmax + 1) ** 2),
        torch.randn(n_edges, n_radial or shape.n_weights),
    ]
    kernel: Tensor | None = torch.randn(n_radial, shape.n_weights) if n_radial else None
    along = [torch.randn_like(t) for t in inputs]
    rowptr = torch.arange(ATOMS + 1) * NEIGHBORS
    graph = (rowptr, torch.randint(0, ATOMS, (n_edges,)), encode(signature))
    arguments = (*inputs, kernel, torch.randn(shape.out_size(ATOMS)))
    wanted = [argument is not None for argument in arguments]
    times: dict[str, list[float]] = {"one": [], "sum": []}
    for i in range(repeats + 1):
        for name, call in (("one", one_pass), ("sum", sum_of_passes)):
            start = time.process_time()
            call(arguments, along, graph, wanted)  # type: ignore[arg-type]
            if i:  # the first call compiles
                times[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(times["one"], times["sum"], strict=True)]
    one, many = (statistics.median(times[name]) for name in ("one", "sum"))
    return f"{1e3 * many:.1f} | {1e3 * one:.1f} | {spread(ratios)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lmax", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| L | weights | sum of passes (ms) | one pass | times faster |")
    print("|---|---|--:|--:|--:|")
    for lmax in args.lmax:
        for n_radial in (0, 8):
            kind = "radial functions" if n_radial else "given"
            print(f"| {lmax} | {kind} | {row(lmax, n_radial, args.repeats)} |", flush=True)


if __name__ == "__main__":
    main()
