"""Time `import mlip` beside `import torch`, each in a fresh interpreter, alternating.

    python scripts/bench/import_time.py [--repeats 9]

Prints medians with the spread and the ratio; nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

# `import mlip` loads public names on first use, so the second line is what a script really pays.
STATEMENTS = {
    "torch": "import torch",
    "mlip": "import mlip",
    "mlip.Calculator": "import mlip; mlip.Calculator",
    "mlip.relax, run_md": "import mlip; mlip.relax; mlip.run_md",
}
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def seconds(statement: str) -> float:
    """Run a statement in a fresh interpreter and return the seconds it took there."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    for statement in STATEMENTS.values():
        seconds(statement)  # fills the file cache and writes byte code
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    base = statistics.median(times["torch"])
    print(f"import time, {repeats} fresh interpreters each, Python {sys.version.split()[0]}")
    print("| statement | median (s) | min–max (s) | / torch |")
    print("|---|--:|--:|--:|")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.3f}–{max(values):.3f}"
        print(f"| `{STATEMENTS[name]}` | {median:.3f} | {spread} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
