"""Compare a model with numbers that its official code produced.

    python scripts/check_parity.py MODEL FILE.npz …

Prints the worst deviation of each quantity in float64 and float32, and what was not compared, with
the reason; the exit code is 1 if any deviation is above its tolerance, 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from mlip.errors import MlipError
from mlip.validation.parity import Omission, Row

CHECKERS = {
    "equiformer_v3": "mlip.validation.parity_equiformer_v3",
    "facet": "mlip.validation.parity_facet",
    "tdn": "mlip.validation.parity_tdn",
}


def main() -> int:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", choices=sorted(CHECKERS))
    parser.add_argument("paths", nargs="+", metavar="PATH")
    arguments = parser.parse_args()
    compare_file = importlib.import_module(CHECKERS[arguments.model]).compare_file
    status = 0
    for path in arguments.paths:
        print(path)
        try:
            rows = compare_file(path)
        except MlipError as error:
            print(f"  error: {error}")
            status = 2
            continue
        for row in rows:
            print(f"  {_line(row)}")
        if not all(row.passed for row in rows):
            status = max(status, 1)
    print("parity: " + ("all within tolerance" if status == 0 else "FAILED"))
    return status


def _line(row: Row) -> str:
    if isinstance(row, Omission):
        return f"not compared: {row.quantity}: {row.reason}"
    verdict = "ok" if row.passed else "FAILED"
    return (
        f"{row.dtype:8s} {row.quantity:60s} {row.worst:9.2e}"
        f"  (tolerance {row.tolerance:.0e})  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
