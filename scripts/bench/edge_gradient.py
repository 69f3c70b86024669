"""Time forces and virial from edge gradients: the CPU kernel beside plain PyTorch.

    OMP_NUM_THREADS=1 python scripts/bench/edge_gradient.py [--repeats 15]

Atoms with 42 neighbours each, near in order, float64 as in a potential; kernel and plain form take
turns. "Both" is the sums and their derivatives, which training asks for. Time of the processor,
because other work on the machine only stretches the clock; median and range of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from spread import spread
from torch import Tensor

from mlip.ops import forces_and_virial

NEIGHBORS, NAMES = 42, ("torch", "numba")


def example(n_atoms: int) -> tuple[Tensor, Tensor]:
    """Random edge gradients, vectors and edges, sorted by target."""
    target = torch.arange(n_atoms).repeat_interleave(NEIGHBORS)
    source = (target + torch.randint(-200, 200, target.shape)) % n_atoms
    return torch.randn(2, len(target), 3, dtype=torch.float64), torch.stack([source, target])


def seconds(name: str, numbers: Tensor, index: Tensor, n_atoms: int, both: bool) -> float:
    """Processor time of one call."""
    gradient, vector = (part.clone().requires_grad_(both) for part in numbers)
    batch = torch.zeros(n_atoms, dtype=torch.int64)
    start = time.process_time()
    forces, virial = forces_and_virial(gradient, vector, index, batch, n_atoms, 1, name)
    if both:
        torch.autograd.grad(forces.sum() + virial.square().sum(), (gradient, vector))
    return time.process_time() - start


def row(n_atoms: int, repeats: int) -> str:
    """Measure one size."""
    numbers, index = example(n_atoms)
    cells = [f"{n_atoms}"]
    for both in (False, True):
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for repeat in range(-2, repeats):
            for name in NAMES:
                found = seconds(name, numbers, index, n_atoms, both)
                if repeat >= 0:
                    times[name].append(found)
        ratios = [a / b for a, b in zip(times["torch"], times["numba"], strict=True)]
        cells += [f"{1e3 * statistics.median(times[name]):.2f}" for name in NAMES]
        cells.append(spread(ratios, 1))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} thread(s), ms, {args.repeats} repeats after 2")
    print("| atoms | PyTorch | kernel | times faster | both: PyTorch | kernel | times faster |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for n_atoms in (32, 108, 500, 2000, 20000):
        print(row(n_atoms, args.repeats), flush=True)


if __name__ == "__main__":
    main()
