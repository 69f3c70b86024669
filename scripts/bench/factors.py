"""Error of low-rank Clebsch–Gordan tensors against their rank: the table of docs/tdn.md.

    python scripts/bench/factors.py [--starts 4] [--lmax 1 2 3 4] [--ranks 28 30]

Prints one Markdown row for each degree and rank: relative error in the Frobenius norm, relative
equivariance error, and the seconds that all starts took; the first is the last where it is exact.
"""

from __future__ import annotations

import argparse
import time

from mlip.ops.tensor_products import Degrees, Factors, equivariance_error
from mlip.ops.tensor_products.interface import coupling_tensor
from mlip.ops.tensor_products.solver import decompose

RANKS = {
    1: (4, 6, 7, 8),
    2: (10, 15, 20, 24, 28, 29, 30),
    3: (21, 40, 63, 72, 80, 86, 90),
    4: (28, 112, 160, 200, 210, 216),
}


def main() -> None:
    """Solve and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=4, help="random starts, the best is kept")
    parser.add_argument("--lmax", type=int, nargs="+", choices=sorted(RANKS), default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", help="default: those of the table")
    arguments = parser.parse_args()
    print("| L | rank | error | equivariance error | s |")
    print("|---|---|---|---|---|")
    for lmax in arguments.lmax:
        tensor = coupling_tensor(Degrees(lmax, lmax, lmax))
        for rank in arguments.ranks or RANKS[lmax]:
            begin = time.perf_counter()
            found = decompose(tensor, rank, starts=arguments.starts)
            seconds = time.perf_counter() - begin
            turned = equivariance_error(Factors(*found.factors))
            row = f"| {lmax} | {rank} | {found.error:.2g} | {turned:.2g} | {seconds:.1f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
