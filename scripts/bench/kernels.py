"""Time the CPU kernels of the convolution beside e3nn and plain PyTorch, all in one run.

    OMP_NUM_THREADS=1 python scripts/bench/kernels.py [--lmax 1 2 3] [--threads 1] [--no-e3nn]

2000 atoms (or --atoms) with 40 neighbours each, near in order, 64 channels, 8 radial functions,
float32, natural parity. Implementations take turns; median and range of the repeats, in time of the
processor with one thread and by the clock with more. "both" is forward and the
gradients with respect to features, harmonics and weights (or radial functions and kernel). Ratios
are how many times slower a row is than the kernel that does the same work. With --keep-memory the
process keeps freed memory, as ``mlip train`` does, for all implementations: what remains is their
own time, without that of the system for fresh pages. Last: the forward pass in GFLOP/s beside the
measured peak of multiply-adds of a core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mlip.memory import keep_freed_memory
from mlip.ops import ConvolutionSignature, Neighborhood, convolution, neighborhood, sum_messages
from mlip.ops.cpu.coupling import forward_cost
from mlip.ops.cpu.simd import lanes, straight_line

N_NEIGHBORS, CHANNELS, N_RADIAL = 40, 64, 8
SUMS = 12  # independent multiply-adds in flight when the peak is measured


@straight_line("float32")
def _multiply_adds(k, X, n):  # type: ignore[no-untyped-def]
    x = k.load(X, 0)
    sums = [k.accumulator(k.load(X, i)) for i in range(SUMS)]
    with k.loop(n):
        for s in sums:
            s.add(x, x)
    for i, s in enumerate(sums):
        k.store(X, i * k.width, s.value)


@njit
def _peak_loop(x, n):  # type: ignore[no-untyped-def]
    _multiply_adds(x.ctypes.data, n)
    return x


def peak_gflops() -> float:
    """Multiply-adds of vectors in registers, both operations counted."""
    x, n = np.zeros(SUMS * 16 + 16, np.float32), 2_000_000
    best = min(_seconds(lambda: _peak_loop(x, n)) for _ in range(6))
    return 2e-9 * n * SUMS * lanes("float32") / best


def e3nn_convolution(signature: ConvolutionSignature, edges: Neighborhood) -> Callable[..., Tensor]:
    """The same operator by e3nn: gather, TensorProduct, sum."""
    from e3nn import o3

    product = o3.TensorProduct(
        o3.Irreps([(n, (degree, (-1) ** degree)) for degree, n in enumerate(signature.channels)]),
        o3.Irreps([(1, (degree, (-1) ** degree)) for degree in range(signature.lmax_edge + 1)]),
        o3.Irreps([(signature.channels[a], (c, (-1) ** c)) for a, _, c in signature.paths]),
        [(a, b, i, "uvu", True) for i, (a, b, _) in enumerate(signature.paths)],
        shared_weights=False, internal_weights=False,
    )  # fmt: skip

    def run(x: Tensor, harmonics: Tensor, weights: Tensor) -> Tensor:
        messages = product(x[edges.source], harmonics, weights)
        out = messages.new_zeros(edges.n_nodes, messages.shape[1])
        return torch.index_add(out, 0, edges.target, messages)

    return run


def in_chunks(signature: ConvolutionSignature, n_nodes: int, chunks: int) -> Callable[..., Tensor]:
    """The definition, a few atoms at a time, so that intermediates stay in the cache."""
    nodes = n_nodes // chunks
    rows = nodes * N_NEIGHBORS

    def run(edges: Neighborhood, x: list[Tensor], harmonics: Tensor, weights: Tensor) -> Tensor:
        parts = []
        pieces = zip(harmonics.split(rows), weights.split(rows), strict=True)
        for i, (own_harmonics, own_weights) in enumerate(pieces):
            own = slice(i * rows, (i + 1) * rows)
            local = neighborhood(
                torch.stack([edges.source[own], edges.target[own] - i * nodes]), n_nodes
            )
            out = convolution(signature, tuple(x), own_harmonics, own_weights, local)
            parts.append(torch.cat([part[:nodes].flatten() for part in out]))
        return torch.cat(parts)

    return run


def _seconds(function: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def cases(
    lmax: int, n_nodes: int, with_e3nn: bool
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Function and differentiated inputs of each implementation."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(True)

    offsets = torch.randperm(4 * N_NEIGHBORS, generator=generator)[:N_NEIGHBORS] - 2 * N_NEIGHBORS
    target = torch.arange(n_nodes).repeat_interleave(N_NEIGHBORS)
    source = (target + offsets.repeat(n_nodes)) % n_nodes
    edges = neighborhood(torch.stack([source, target]), n_nodes)
    degrees = tuple(range(lmax + 1))
    signature = ConvolutionSignature((CHANNELS,) * len(degrees), lmax, degrees, True)
    x = [randn(n_nodes, 2 * i + 1, CHANNELS) for i in degrees]
    harmonics, basis = randn(len(target), (lmax + 1) ** 2), randn(len(target), N_RADIAL)
    kernel = randn(N_RADIAL, signature.n_weights)
    weights = (basis @ kernel).detach().requires_grad_(True)
    n = len(x)

    def flat(backend: str) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            last = inputs[n + 2] if len(inputs) == n + 3 else None
            out = sum_messages(
                signature, inputs[:n], inputs[n], inputs[n + 1], last, edges, backend
            )
            return torch.cat([part.flatten() for part in out])

        return run

    chunked = in_chunks(signature, n_nodes, 40)
    found = {
        "kernel, weights given": (flat("numba"), [*x, harmonics, weights]),
        "definition": (flat("torch"), [*x, harmonics, weights]),
        "definition, 40 chunks": (
            lambda *i: chunked(edges, list(i[:n]), i[n], i[n + 1]), [*x, harmonics, weights],
        ),
        "kernel, radial functions": (flat("numba"), [*x, harmonics, basis, kernel]),
        "moments, radial functions": (flat("torch"), [*x, harmonics, basis, kernel]),
    }  # fmt: skip
    if with_e3nn:
        joined = torch.cat([part.transpose(1, 2).flatten(1) for part in x], 1).detach()
        inputs = [joined.requires_grad_(True), harmonics, weights]
        found["e3nn"] = (e3nn_convolution(signature, edges), inputs)
    return found


def measure(
    functions: dict[str, tuple[Callable[..., Tensor], list[Tensor]]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of forward and of both, implementations in turn."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "both": []} for name in functions
    }
    for repeat in range(repeats + 1):
        for name, (function, inputs) in functions.items():

            def forward(f: Callable[..., Tensor] = function, i: list[Tensor] = inputs) -> None:
                with torch.no_grad():
                    f(*i)

            def both(f: Callable[..., Tensor] = function, i: list[Tensor] = inputs) -> None:
                out = f(*i)
                torch.autograd.grad(out, i, torch.ones_like(out))

            for kind, call in (("forward", forward), ("both", both)):
                seconds = _seconds(call)
                if repeat:
                    times[name][kind].append(1e3 * seconds)
    return times


def main() -> None:
    """Print a table for each degree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lmax", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--atoms", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-e3nn", action="store_true", help="it takes minutes at L = 3")
    parser.add_argument("--keep-memory", action="store_true", help="ask the system for less")
    args = parser.parse_args()
    if args.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this C library, or a setting of the environment, forbids it")
    torch.set_num_threads(args.threads)
    peak = peak_gflops()
    for lmax in args.lmax:
        functions = cases(lmax, args.atoms, not args.no_e3nn)
        times = measure(functions, args.repeats)
        print(f"\nL = {lmax}, {args.threads} thread(s)")
        for name, kinds in times.items():
            same = "radial functions" if "radial" in name else "weights given"
            line = f"{name:26s}"
            for kind, values in kinds.items():
                median = statistics.median(values)
                ratio = median / statistics.median(times[f"kernel, {same}"][kind])
                spread = f"({min(values):.1f}-{max(values):.1f})"
                line += f"  {kind} {median:8.1f} ms {spread:17s} {ratio:6.1f} x"
            print(line)
        paths = ConvolutionSignature(
            (CHANNELS,) * (lmax + 1), lmax, tuple(range(lmax + 1)), True
        ).paths
        for name, n_radial in (("weights given", 0), ("radial functions", N_RADIAL)):
            cost = forward_cost(paths, n_radial)
            work = 2e-6 * (cost.multiply_adds + cost.radial) * args.atoms * N_NEIGHBORS * CHANNELS
            speed = work / min(times[f"kernel, {name}"]["forward"])
            print(
                f"forward, {name}: {speed:.0f} GFLOP/s, {100 * speed / peak / args.threads:.0f} % "
                f"of {peak:.0f} GFLOP/s a core"
            )


if __name__ == "__main__":
    main()
