"""Time the kernels of EquiformerV3 on the CPU beside plain PyTorch.

    OMP_NUM_THREADS=1 python scripts/bench/rotations.py [--lmax 4] [--mmax 2] [--repeats 7]

Groups of 256 edges of 64 atoms at the published size: 128 channels, both ends into the frames; 128
summed channels back; products of 2 x 32 channels on the sphere. Float32. Kernel and plain form take
turns. Errors are relative to float64, largest over results and gradients.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from spread import spread
from torch import Tensor

from mlip.nn.edge_frames import EdgeFrameBuilder
from mlip.nn.sphere_product import SphereBasis, gated_product
from mlip.ops import RotationSignature, rotate_gather, rotate_scatter
from mlip.so3 import order_sizes

EDGES, ATOMS, GROUPS, CHANNELS, HIDDEN = 256, 64, 10, 128, 32


class Rotation:
    """There with both ends, or back to the targets."""

    def __init__(self, lmax: int, mmax: int, back: bool) -> None:
        self.signature, self.back = RotationSignature(lmax, mmax), back
        n_ends = 1 if back else 2
        matrix = EdgeFrameBuilder(lmax, mmax)(torch.randn(EDGES, 3)).matrix
        self.ends = torch.randint(0, ATOMS, (n_ends, EDGES)).sort(dim=1).values
        scale = torch.randn(EDGES, 1 if back else lmax + 1, n_ends * CHANNELS)
        if back:
            first = [torch.randn(EDGES, n, CHANNELS) for n in self.signature.sizes]
        else:
            first = [torch.randn(ATOMS, (lmax + 1) ** 2, CHANNELS)]
        self.inputs = [*first, matrix, scale]
        entries = sum(
            (2 * degree + 1) * self.signature.degrees.count(degree) for degree in range(lmax + 1)
        )
        self.flops = 2 * entries * n_ends * CHANNELS

    def __call__(self, backend: str, *inputs: Tensor) -> list[Tensor]:
        *first, matrix, scale = inputs
        if self.back:
            orders = tuple(first)
            return [
                rotate_scatter(self.signature, orders, matrix, scale, self.ends, ATOMS, backend)
            ]
        return list(rotate_gather(self.signature, first[0], matrix, scale, self.ends, backend))


class Product:
    """A gated product on the sphere."""

    def __init__(self, lmax: int, mmax: int) -> None:
        self.basis = SphereBasis(lmax, mmax, in_frame=True)
        hidden = [torch.randn(EDGES, 2 * HIDDEN * n) for n in order_sizes(lmax, mmax)]
        self.inputs = [torch.rand(EDGES, HIDDEN), *hidden]
        self.flops = 0

    def __call__(self, backend: str, *inputs: Tensor) -> list[Tensor]:
        os.environ["MLIP_BACKEND"] = backend
        return list(gated_product(self.basis, inputs[1:], 0, inputs[0]))


Operator = Rotation | Product


def run(operator: Operator, backend: str, inputs: list[Tensor], cotangents: list[Tensor]) -> list:
    """Results and gradients, timed apart."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    start = time.perf_counter()
    out = operator(backend, *leaves)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(out, leaves, cotangents)
    return [middle - start, time.perf_counter() - middle, [*out, *gradients]]


def measure(name: str, operator: Operator, repeats: int) -> str:
    """Make a row of the table."""
    shapes = operator("torch", *operator.inputs)
    cotangents = [torch.randn_like(part) for part in shapes]
    double = [tensor.double() for tensor in operator.inputs]
    truth = run(operator, "torch", double, [tensor.double() for tensor in cotangents])[2]
    times: dict[str, list[tuple[float, float]]] = {"numba": [], "torch": []}
    errors = {}
    for repeat in range(-1, repeats):
        for backend, found in times.items():
            parts = [run(operator, backend, operator.inputs, cotangents) for _ in range(GROUPS)]
            if repeat < 0:
                pairs = zip(parts[0][2], truth, strict=True)
                errors[backend] = max(_error(a, b) for a, b in pairs)
            else:
                found.append(tuple(sum(p[i] for p in parts) / GROUPS for i in (0, 1)))
    cells = []
    for i in (0, 1):
        microseconds = [1e6 * pair[i] / EDGES for pair in times["numba"]]
        ratios = [b[i] / a[i] for a, b in zip(times["numba"], times["torch"], strict=True)]
        cells += [spread(microseconds, 1), spread(ratios, 1)]
    rate = ""
    if operator.flops:
        rate = (
            f"{operator.flops * EDGES / 1e9 / statistics.median(t[0] for t in times['numba']):.0f}"
        )
    return (
        f"| {name} | {' | '.join(cells)} | {rate} | {errors['numba']:.0e} | {errors['torch']:.0e} |"
    )


def _error(found: Tensor, truth: Tensor) -> float:
    """Relative error; entries of matrices that are always zero have no gradient."""
    known = found != 0
    return float((found.double() - truth)[known].norm() / truth[known].norm())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--lmax", type=int, default=4)
    parser.add_argument("--mmax", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    degrees = (args.lmax, args.mmax)
    print(
        f"lmax {args.lmax}, mmax {args.mmax}, {torch.get_num_threads()} thread(s), µs an edge, "
        f"{args.repeats} repeats after 1"
    )
    print(
        "| | forward (µs) | times faster | backward (µs) | times faster | GFLOP/s forward | "
        "error | error of PyTorch |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    print(measure("both ends into the frames", Rotation(*degrees, back=False), args.repeats))
    print(measure("back to the targets, summed", Rotation(*degrees, back=True), args.repeats))
    print(measure("product on the sphere", Product(*degrees), args.repeats))


if __name__ == "__main__":
    main()
