"""Rotation error and cost of the node updates of Facet, in one run.

    python scripts/bench/node_update.py

Random weights, features of l = 0, 1, 2 with 32 channels on 500 atoms. The error is the largest
change of the energy-like scalars under 20 random rotations, relative to their spread, in float64;
the time is forward plus backward in float32 on one thread, median and range of the repeats.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from mlip.nn.node_update import SphereGridUpdate, SphereProductUpdate
from mlip.ops import Features
from mlip.so3 import wigner_matrices

CHANNELS = (32, 32, 32)
N_ATOMS = 500


def grid_update(n_latitude: int, n_longitude: int, quadrature: str) -> torch.nn.Module:
    """The published S2 mixer on a given grid."""
    grid = (n_latitude, n_longitude, quadrature)
    return SphereGridUpdate(CHANNELS, CHANNELS, grid, (16,), 2, "silu", "silu", False)


def product_update(order: int) -> torch.nn.Module:
    """The exact update."""
    return SphereProductUpdate(CHANNELS, CHANNELS, order, 64)


CASES = {
    "published grid 18x17 soft (306 points)": lambda: grid_update(18, 17, "soft"),
    "published grid 36x35 soft (1260 points)": lambda: grid_update(36, 35, "soft"),
    "published grid 18x17 Gauss-Legendre": lambda: grid_update(18, 17, "gauss_legendre"),
    "sphere product, order 2": lambda: product_update(2),
    "sphere product, order 3 (default)": lambda: product_update(3),
}


def random_features(dtype: torch.dtype) -> Features:
    """Normal features of all atoms."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(N_ATOMS, 2 * degree + 1, n, generator=generator, dtype=dtype)
        for degree, n in enumerate(CHANNELS)
    )


def random_rotations(n: int) -> Tensor:
    """Proper rotations, [n, 3, 3] float64."""
    generator = torch.Generator().manual_seed(1)
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[:, None, :]
    return q * torch.linalg.det(q)[:, None, None]


def rotation_error(update: torch.nn.Module) -> float:
    """Largest change of the output scalars under rotation, relative to their spread."""
    update = update.double()
    x = random_features(torch.float64)
    with torch.no_grad():
        truth = update(x)[0]
        worst = 0.0
        for rotation in random_rotations(20):
            matrices = wigner_matrices(len(CHANNELS) - 1, rotation)
            turned = tuple(d @ part for d, part in zip(matrices, x, strict=True))
            worst = max(worst, float((update(turned)[0] - truth).abs().max()))
    return worst / float(truth.std())


def seconds(update: torch.nn.Module, repeats: int = 9) -> tuple[float, float, float]:
    """Median, smallest and largest time of one forward and backward pass."""
    update = update.float()
    x = tuple(part.requires_grad_(True) for part in random_features(torch.float32))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        out = update(x)
        torch.autograd.grad(sum(part.square().sum() for part in out), x)
        times.append(time.perf_counter() - start)
    times = times[2:]
    return statistics.median(times), min(times), max(times)


def main() -> None:
    """Print one row for each node update."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'node update':42s} {'rotation error':>15s} {'µs/atom':>9s}   range")
    for name, build in CASES.items():
        error = rotation_error(build())
        median, low, high = (1e6 * t / N_ATOMS for t in seconds(build()))
        print(f"{name:42s} {error:15.1e} {median:9.1f}   {low:.1f}-{high:.1f}")


if __name__ == "__main__":
    main()
