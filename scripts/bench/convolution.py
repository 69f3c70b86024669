"""Time the convolution: definition, moment form and e3nn, in one run.

    python scripts/bench/convolution.py [--channels 32] [--lmax 2] [--threads 1]

108 rattled copper atoms, neighbours within 5 Å, 8 radial functions, float32. "training" is what a
step with a force loss costs: forward, gradients with respect to harmonics, radial functions and
features, and the gradients of those. Median and range of the repeats, ratio to the definition.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from copper import copper
from torch import Tensor

from mlip.graph import atoms_to_graph, edge_vectors
from mlip.ops import (
    ConvolutionSignature,
    Features,
    Neighborhood,
    convolution,
    neighborhood,
    radial_convolution,
    segment_sum,
)
from mlip.so3 import spherical_harmonics

N_RADIAL = 8


def e3nn_convolution(signature: ConvolutionSignature) -> Callable[..., Tensor] | None:
    """The same operator by e3nn's TensorProduct and a segment sum; None if it is not installed."""
    try:
        from e3nn import o3
    except ImportError:
        return None
    product = o3.TensorProduct(
        o3.Irreps([(n, (degree, (-1) ** degree)) for degree, n in enumerate(signature.channels)]),
        o3.Irreps([(1, (degree, (-1) ** degree)) for degree in range(signature.lmax_edge + 1)]),
        o3.Irreps([(signature.channels[a], (c, (-1) ** c)) for a, _, c in signature.paths]),
        [(a, b, i, "uvu", True) for i, (a, b, _) in enumerate(signature.paths)],
        shared_weights=False,
        internal_weights=False,
    )

    def run(x: Features, harmonics: Tensor, weights: Tensor, neighbors: Neighborhood) -> Tensor:
        flat = torch.cat([part.transpose(1, 2).flatten(1) for part in x], 1)
        messages = product(flat[neighbors.source], harmonics, weights)
        return segment_sum(messages, neighbors.target, len(flat))

    return run


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repeat after three warm-up calls."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Print one row for each implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--lmax", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    atoms = copper(108)
    graph = atoms_to_graph(atoms, 5.0)
    neighbors = neighborhood(graph.edge_index, len(atoms))
    degrees = tuple(range(args.lmax + 1))
    signature = ConvolutionSignature((args.channels,) * len(degrees), args.lmax, degrees, True)
    torch.manual_seed(0)
    x = tuple(torch.randn(len(atoms), 2 * i + 1, args.channels) for i in degrees)
    harmonics = spherical_harmonics(args.lmax, edge_vectors(graph).float())
    basis = torch.randn(len(harmonics), N_RADIAL)
    kernel = torch.randn(N_RADIAL, signature.n_weights)
    inputs = [t.requires_grad_(True) for t in (*x, harmonics, basis, kernel)]

    def flat(features: Features) -> Tensor:
        return torch.cat([part.flatten() for part in features])

    cases: dict[str, Callable[[], Tensor]] = {
        "definition": lambda: flat(convolution(signature, x, harmonics, basis @ kernel, neighbors)),
        "moments": lambda: flat(
            radial_convolution(signature, x, harmonics, basis, kernel, neighbors)
        ),
    }
    e3nn = e3nn_convolution(signature)
    if e3nn is not None:
        cases["e3nn"] = lambda: e3nn(x, harmonics, basis @ kernel, neighbors)

    def training(forward: Callable[[], Tensor]) -> None:
        gradients = torch.autograd.grad(forward().square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    print(f"{len(harmonics)} edges, {len(signature.paths)} paths, {args.threads} thread(s)")
    reference: dict[str, float] = {}
    for name, forward in cases.items():
        for kind, function in (("forward", forward), ("training", lambda f=forward: training(f))):
            times = timed(function, args.repeats)
            median = statistics.median(times)
            reference.setdefault(kind, median)
            print(
                f"{name:11s} {kind:9s} {median:8.1f} ms  ({min(times):.1f}-{max(times):.1f})"
                f"  {reference[kind] / median:5.2f} x definition"
            )


if __name__ == "__main__":
    main()
