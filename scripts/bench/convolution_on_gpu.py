"""Time the CUDA kernels of the convolution and of sums over edges, each pass alone, on a GPU.

    python scripts/bench/convolution_on_gpu.py [--atoms 3000] [--neighbors 53] [--channels 128]

Convolutions of input degrees up to l, harmonics and results up to degree 3 or l (natural parity),
with weights given and with 8 radial functions: forward, backward, and all second derivatives,
each alone; sum and softmax of as many columns. Float32. Times are from CUDA events, median and
range; before each call a buffer larger than the L2 cache is written. "graph": the same launches
replayed as a CUDA graph; sources of edges are sorted in it each time. "times faster" is plain
PyTorch against the eager kernel, in turns; GB/s is what inputs and results hold, once. With
--device cpu the CPU kernels are timed by the clock, without graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mlip.ops import ConvolutionSignature, Neighborhood, convolution, envelope_softmax, segment_sum
from mlip.ops.cpu.double_backward import packed_double_backward
from mlip.ops.cpu.library import encode, packed_convolution, packed_convolution_backward
from mlip.ops.cpu.segments import csr_segment_sum, segment_shares
from mlip.ops.cuda import convolution as _convolution  # noqa: F401  registers its kernels
from mlip.ops.cuda import double_backward as _double_backward  # noqa: F401
from mlip.ops.cuda import segments as _segments  # noqa: F401

N_RADIAL, WARM_UP = 8, 10
FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU
Call = Callable[[], object]


class Pass(NamedTuple):
    """Work that is timed: by the kernel and in plain PyTorch; bytes of inputs and results."""

    name: str
    kernel: Call
    plain: Call
    moved: int


def near(n_atoms: int, n_neighbors: int, device: torch.device) -> Neighborhood:
    """Edges to atoms that are near in order, sorted by target."""
    target = torch.arange(n_atoms, device=device).repeat_interleave(n_neighbors)
    offsets = torch.randint(-2 * n_neighbors, 2 * n_neighbors, target.shape, device=device)
    rowptr = torch.arange(n_atoms + 1, device=device) * n_neighbors
    return Neighborhood((target + offsets) % n_atoms, target, n_atoms, rowptr)


def convolution_passes(
    signature: ConvolutionSignature, edges: Neighborhood, n_radial: int
) -> list[Pass]:
    """Forward, backward and second derivatives of one convolution."""
    device, n_edges = edges.source.device, len(edges.source)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    shapes = [(edges.n_nodes, 2 * i + 1, c) for i, c in enumerate(signature.channels)]
    sizes = [a * b * c for a, b, c in shapes]
    inputs = [randn(sum(sizes)), randn(n_edges, (signature.lmax_edge + 1) ** 2)]
    inputs.append(randn(n_edges, n_radial or signature.n_weights))
    inputs += [randn(n_radial, signature.n_weights)] if n_radial else []
    given = inputs if n_radial else [*inputs, None]
    cotangents = [torch.randn_like(each) for each in inputs[:3]]  # those that a force loss has
    along = [*cotangents, None]
    graph = (edges.rowptr, edges.source, encode(signature))
    wanted = [tensor is not None for tensor in given]

    def plain(x: Tensor, harmonics: Tensor, radial: Tensor, *kernel: Tensor) -> Tensor:
        features = [part.view(s) for part, s in zip(x.split(sizes), shapes, strict=True)]
        weights = radial @ kernel[0] if kernel else radial
        out = convolution(signature, tuple(features), harmonics, weights, edges)
        return torch.cat([part.flatten() for part in out])

    @cache
    def recorded(twice: bool) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """What plain PyTorch differentiates, once, and by what."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = plain(*leaves)
        if not twice:
            return (out,), leaves
        gradient = g.detach().requires_grad_()
        first = torch.autograd.grad(out, leaves, gradient, create_graph=True)
        return first, [*leaves, gradient]

    def plain_slopes(cotangents: list[Tensor], twice: bool) -> object:
        outputs, leaves = recorded(twice)
        return torch.autograd.grad(
            outputs[: len(cotangents)], leaves, cotangents, retain_graph=True
        )

    g = packed_convolution(*given, *graph)
    g = torch.randn_like(g)
    held = sum(tensor.nbytes for tensor in inputs)
    return [
        Pass(
            "forward", lambda: packed_convolution(*given, *graph), lambda: plain(*inputs),
            held + g.nbytes,
        ),
        Pass(
            "backward", lambda: packed_convolution_backward(*given, g, *graph, wanted),
            lambda: plain_slopes([g], False), 2 * held + g.nbytes,
        ),
        Pass(
            "second derivatives",
            lambda: packed_double_backward(*given, g, *along, *graph, [*wanted, True]),
            lambda: plain_slopes(cotangents, True), 3 * held + 2 * g.nbytes,
        ),
    ]  # fmt: skip


def segment_passes(edges: Neighborhood, columns: int) -> list[Pass]:
    """Sum and softmax over the edges of atoms."""
    rows = torch.randn(len(edges.source), columns, device=edges.source.device)
    weights = torch.rand(len(rows), device=rows.device)
    index, n = edges.target, edges.n_nodes
    return [
        Pass(
            "sum", lambda: csr_segment_sum(rows, index, edges.rowptr),
            lambda: segment_sum(rows, index, n), rows.nbytes + rows[:n].nbytes,
        ),
        Pass(
            "softmax", lambda: segment_shares(rows, weights, index, edges.rowptr, 1e-16),
            lambda: envelope_softmax(rows, weights, index, n, 1e-16), 2 * rows.nbytes,
        ),
    ]  # fmt: skip


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED_BYTES if self.on_gpu else 0, dtype=torch.int8)
        self.flushed = self.flushed.to(device)

    def milliseconds(self, call: Call) -> float:
        """Time of one call with a cold cache."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def graph(self, call: Call) -> Call | None:
        """Capture the launches of a call."""
        if not self.on_gpu:
            return None
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        return captured.replay


def row(name: str, one: Pass, clock: Clock, repeats: int) -> str:
    """Measure one pass."""
    times: dict[str, list[float]] = {"kernel": [], "plain": [], "graph": []}
    calls = {"kernel": one.kernel, "plain": one.plain}
    for repeat in range(-WARM_UP, repeats):
        if repeat == 0 and (replay := clock.graph(one.kernel)):
            calls["graph"] = replay
        for which, call in list(calls.items()):
            try:
                taken = clock.milliseconds(call)
            except torch.OutOfMemoryError:
                del calls[which]
                continue
            if repeat >= 0:
                times[which].append(taken)
    cells = [f"{name}, {one.name}", _spread(times["kernel"], "{:.3f}"), _spread(times["graph"])]
    ratios = [b / a for a, b in zip(times["kernel"], times["plain"], strict=False)]
    cells += [_spread(ratios, "{:.1f}") if ratios else "PyTorch: out of memory"]
    if times["kernel"]:
        cells.append(f"{one.moved / statistics.median(times['kernel']) / 1e6:.0f}")
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], form: str = "{:.3f}") -> str:
    if not values:
        return "–"
    low, middle, high = map(form.format, (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--atoms", type=int, default=3000)
    parser.add_argument("--neighbors", type=int, default=53)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--lmax", type=int, nargs="+", default=[0, 1, 2, 3])
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device; --device cpu times the kernels of the CPU\n")
    torch.manual_seed(0)
    edges, clock = near(args.atoms, args.neighbors, device), Clock(device)
    where = torch.cuda.get_device_name(device) if clock.on_gpu else "processor"
    print(
        f"{where}, {args.atoms} atoms, {len(edges.source)} edges, {args.channels} channels\n\n"
        "| | kernel (ms) | graph (ms) | times faster | GB/s |\n|---|--:|--:|--:|--:|"
    )
    for one in segment_passes(edges, args.channels):
        print(row("edges of atoms", one, clock, args.repeats), flush=True)
    for lmax in args.lmax:
        channels = (args.channels,) * (lmax + 1)
        for top in sorted({3, max(lmax, 1)}):
            signature = ConvolutionSignature(channels, top, tuple(range(top + 1)), True)
            for n_radial in (0, N_RADIAL):
                name = f"({lmax},{top},{top}), {'radial functions' if n_radial else 'weights'}"
                for one in convolution_passes(signature, edges, n_radial):
                    print(row(name, one, clock, args.repeats), flush=True)


if __name__ == "__main__":
    main()
