"""Time the shared-operator product beside low rank as published and e3nn.

    OMP_NUM_THREADS=1 python scripts/bench/shared_operator.py [--lmax 2 3] [--repeats 15]

"low rank, one einsum" is the arrangement of the official TDN layer: the whole product is one
einsum over factors and features, whose planner rebuilds K from the factors. The products take turns
within each repeat; a median of CPU times, their range, and how many times slower than the shared
operator, as the median of the ratios within a repeat. K is built anew each time. e3nn is left out
if it is not installed; its product also mixes channels.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mlip.ops.tensor_products import Degrees, SharedProduct, find_factors, published_rank
from mlip.so3 import spherical_harmonics

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def cases(lmax: int, edges: int, channels: int) -> dict[str, Case]:
    """Make the products and their inputs; the first is what others are divided by."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(edges, (lmax + 1) ** 2, channels, generator=generator).requires_grad_()
    vectors = torch.randn(edges, 3, generator=generator, dtype=torch.float64)
    y = spherical_harmonics(lmax, vectors).float()[:, :, None].requires_grad_()
    weights = torch.randn(edges, 1, channels, generator=generator).requires_grad_()
    factors = [part.float() for part in find_factors(lmax, published_rank(lmax))]

    def published(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("ir,jr,kr,eic,ejz,ezc->ekc", *factors, x, y, weights)

    found: dict[str, Case] = {
        "shared operator": (SharedProduct(Degrees(lmax, lmax, lmax)), (x, y, weights)),
        "low rank, one einsum": (published, (x, y, weights)),
    }
    if importlib.util.find_spec("e3nn") is not None:
        from e3nn import o3

        features = o3.Irreps([(channels, (degree, 1)) for degree in range(lmax + 1)])
        harmonics = o3.Irreps([(1, (degree, 1)) for degree in range(lmax + 1)])
        mixing = o3.FullyConnectedTensorProduct(features, harmonics, features)
        flat = tuple(part.detach().flatten(1).requires_grad_() for part in (x, y))
        found["e3nn, fully connected"] = (mixing, flat)
    return found


def measure(case: Case, backward: bool, runs: int = 3) -> float:
    """Return the CPU time of one forward pass, or of one with all gradients, ms.

    The first of the ``runs`` does not count: it finds caches and free memory as another product
    left them. Of the others the shortest does.
    """
    function, inputs = case
    with torch.no_grad():
        seed = torch.ones_like(function(*inputs))
    times = []
    for _ in range(runs):
        begin = time.process_time()
        if backward:
            torch.autograd.grad(function(*inputs), inputs, seed)
        else:
            with torch.no_grad():
                function(*inputs)
        times.append(1e3 * (time.process_time() - begin))
    return min(times[1:])


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lmax", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--edges", type=int, default=5000)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print("| L | pass | product | median (ms) | min–max (ms) | times slower |")
    print("|--:|---|---|--:|--:|--:|")
    for lmax in arguments.lmax:
        compared = cases(lmax, arguments.edges, arguments.channels)
        for backward in (False, True):
            times: dict[str, list[float]] = {name: [] for name in compared}
            for _ in range(arguments.repeats + 2):
                for name, case in compared.items():
                    times[name].append(measure(case, backward))
            times = {name: own[2:] for name, own in times.items()}  # warm-up
            base = times["shared operator"]
            for name, own in times.items():
                ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
                kind = "with gradients" if backward else "forward"
                print(
                    f"| {lmax} | {kind} | {name} | {statistics.median(own):.2f} "
                    f"| {min(own):.2f}–{max(own):.2f} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
