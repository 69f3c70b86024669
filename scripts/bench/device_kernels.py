"""Time the kernels of nodes, frames and forces beside plain PyTorch, on a GPU or the CPU.

    python scripts/bench/device_kernels.py [--device cuda] [--atoms 1000] [--repeats 20]

40 neighbours an atom in any order, 128 channels, float32, degrees up to 4 and orders up to 2
(rotations, gated products), degrees up to 3 (shared operators), three factors of degree 2 (running
products); forces and virial in float64. Kernel and plain form
take turns, after 3 calls each; the device is waited for before and after each call. GB/s: what
inputs and results hold, read or written once. "Both" is forward and all gradients. Errors are
relative to plain PyTorch in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from spread import spread
from torch import Tensor

from mlip.nn.sphere_product import SphereBasis, gated_product, grid_matrices
from mlip.ops import (
    RotationSignature,
    forces_and_virial,
    operator_gather,
    operator_scatter,
    rotate_gather,
    rotate_scatter,
    sphere_products,
)
from mlip.so3 import degree_major, order_sizes

NEIGHBORS, CHANNELS = 40, 128


class Operator(NamedTuple):
    """A function of a back end's name and of tensors that are differentiated."""

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: list[Tensor]


def operators(n_atoms: int, device: torch.device) -> list[Operator]:
    """Make random inputs of all operators."""
    n_edges = NEIGHBORS * n_atoms
    target = torch.arange(n_atoms).repeat_interleave(NEIGHBORS)
    ends = torch.stack([torch.randint(0, n_atoms, (n_edges,)), target]).to(device)
    signature = RotationSignature(4, 2)
    of_column = torch.tensor([degree for degree, _ in degree_major(4, 4)])
    within = (torch.tensor(signature.degrees)[:, None] == of_column).to(device)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def frames(name: str, x: Tensor, matrix: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return rotate_gather(signature, x, matrix, scale, ends, name)

    def back(name: str, matrix: Tensor, scale: Tensor, *orders: Tensor) -> tuple[Tensor, ...]:
        return (rotate_scatter(signature, orders, matrix, scale, ends[1:], n_atoms, name),)

    def gather(name: str, x: Tensor, matrix: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return (operator_gather(x, matrix, weights, ends, name),)

    def scatter(name: str, y: Tensor, matrix: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return (operator_scatter(y, matrix, weights, ends[1:], n_atoms, name),)

    def forces(name: str, gradient: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        batch = torch.zeros(n_atoms, dtype=torch.int64, device=device)
        return forces_and_virial(gradient, vector, ends, batch, n_atoms, 1, name)

    matrix, k = randn(n_edges, *within.shape) * within, randn(n_edges, 16, 16)
    orders = [randn(n_edges, n, CHANNELS) for n in signature.sizes]
    x, weights = randn(n_atoms, 16, CHANNELS), randn(n_edges, CHANNELS)
    vectors = [randn(n_edges, 3, dtype=torch.float64) for _ in range(2)]
    wide = randn(n_edges, 5, 2 * CHANNELS)
    return [
        Operator("both ends into the frames", frames, [randn(n_atoms, 25, CHANNELS), matrix, wide]),
        Operator("back to the targets", back, [matrix, randn(n_edges, 1, CHANNELS), *orders]),
        Operator("K x of both ends", gather, [x, k, weights]),
        Operator("K y to the targets", scatter, [randn(n_edges, 16, CHANNELS), k, weights]),
        Operator("forces and virial", forces, vectors),
        *sphere_operators(n_atoms, n_edges, device),
    ]


def sphere_operators(n_atoms: int, n_edges: int, device: torch.device) -> list[Operator]:
    """Make random inputs of products on the sphere: of atoms, and of edges in their frames."""
    basis = SphereBasis(4, 2, in_frame=True)
    matrices = grid_matrices(SphereBasis(2, 2, in_frame=False))

    def products(name: str, u: Tensor) -> tuple[Tensor, ...]:
        tables = (matrix.to(u) for matrix in matrices)
        return (sphere_products(u, *tables, 3, name),)

    def gated(name: str, gate: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        return gated_product(basis, hidden, 0, gate, name)

    u = torch.randn(n_atoms, 9, 3 * CHANNELS, device=device)
    gate = torch.randn(n_edges, CHANNELS, device=device)
    hidden = [torch.randn(n_edges, 2 * CHANNELS * n, device=device) for n in order_sizes(4, 2)]
    return [
        Operator("three factors on the sphere", products, [u]),
        Operator("gated product of edges", gated, [gate, *hidden]),
    ]


def call(operator: Operator, name: str, inputs: list[Tensor], both: bool) -> list[Tensor]:
    """Results, and the gradients of half the sum of their squares."""
    leaves = [tensor.detach().requires_grad_(both) for tensor in inputs]
    out = operator.function(name, *leaves)
    slopes = torch.autograd.grad(out, leaves, [part.detach() for part in out]) if both else ()
    return [part.detach() for part in (*out, *slopes)]


def seconds(operator: Operator, name: str, both: bool) -> float:
    """Time of a call that the device has finished."""
    wait(operator.inputs[0].device)
    start = time.perf_counter()
    call(operator, name, operator.inputs, both)
    wait(operator.inputs[0].device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for all that was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def errors(operator: Operator, names: tuple[str, str]) -> list[float]:
    """Largest relative errors over results and gradients that the kernel computes."""
    double = [tensor.double() for tensor in operator.inputs]
    truth = call(operator, "torch", double, True)
    worst = [0.0, 0.0]
    found = [call(operator, name, operator.inputs, True) for name in names]
    for exact, *parts in zip(truth, *found, strict=True):
        known = parts[0] != 0  # entries of matrices that are always zero have no gradient
        norm = exact[known].norm()
        errors = [float((part.double() - exact)[known].norm() / norm) for part in parts]
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst


def row(operator: Operator, kernel: str, repeats: int) -> str:
    """Measure one operator."""
    cells = [operator.name]
    for both in (False, True):
        times: dict[str, list[float]] = {kernel: [], "torch": []}
        for repeat in range(-3, repeats):
            for name, found in times.items():
                taken = seconds(operator, name, both)
                if repeat >= 0:
                    found.append(taken)
        ratios = [b / a for a, b in zip(times[kernel], times["torch"], strict=True)]
        milliseconds = statistics.median(times[kernel]) * 1e3
        cells.append(f"{milliseconds:.3f}")
        cells.append(spread(ratios, 1))
        if not both:
            out = operator.function(kernel, *operator.inputs)
            moved = sum(tensor.nbytes for tensor in (*operator.inputs, *out))
            cells.append(f"{moved / milliseconds / 1e6:.0f}")
    cells += [f"{error:.0e}" for error in errors(operator, (kernel, "torch"))]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; --device cpu times the kernels of the CPU")
    torch.manual_seed(0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    print(f"{where}, {args.atoms} atoms, {NEIGHBORS} neighbours, {CHANNELS} channels")
    print(
        "| | forward (ms) | times faster | GB/s | both (ms) | times faster | error | "
        "error of PyTorch |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for operator in operators(args.atoms, device):
        print(row(operator, "cuda" if device.type == "cuda" else "numba", args.repeats), flush=True)


if __name__ == "__main__":
    main()
