"""Do on a GPU what only a GPU can show: tests of the kernels, their speed, compute-sanitizer.

    python scripts/check_gpu.py [--out gpu-output] [--minutes 20] [--only tests convolution ...]
    make gpu

Steps run in the order of what they tell, each as a process of its own whose output is a file of
the folder, and the table at the end is its file summary.md. What does not end within the minutes
is stopped; --only goes on with the rest, and leaves the rows of other steps in the summary. The
exit code is 1 if a step failed or was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
SANITIZED = [sys.executable, *TESTS, "tests/ops/test_ops_cuda_on_gpu.py"]
SANITIZER = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "1", "--tool"]
STEPS: dict[str, list[str]] = {
    "tests": [sys.executable, *TESTS, "tests"],
    "convolution": [sys.executable, "scripts/bench/convolution_on_gpu.py"],
    "kernels": [sys.executable, "scripts/bench/device_kernels.py"],
    "operators": [sys.executable, "-m", "mlip", "bench", "kernels", "--device", "cuda"],
    "memcheck": [*SANITIZER, "memcheck", *SANITIZED],
    "racecheck": [*SANITIZER, "racecheck", *SANITIZED],
}

HEAD = ("| step | result | s |", "|---|---|--:|")


def run(name: str, command: Sequence[str], folder: Path, seconds: float) -> tuple[str, float]:
    """Run a step.

    Args:
        name: of the step and of its file.
        command: program and arguments.
        folder: where the file goes.
        seconds: after which it is stopped, with every process that it started.

    Returns:
        How it ended, and seconds.
    """
    if shutil.which(command[0]) is None:
        return f"not run: {command[0]} is not installed", 0.0
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    start = time.monotonic()
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        try:
            code = process.wait(max(seconds, 0.0))
            ended = "passed" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "stopped: no time left"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return ended, time.monotonic() - start


def other_rows(summary: Path, steps: Iterable[str]) -> list[str]:
    """Give the rows of a summary that belong to other steps; none without the file."""
    if not summary.exists():
        return []
    rows = summary.read_text(encoding="utf-8").splitlines()[len(HEAD) :]
    return [row for row in rows if row.split("|")[1].strip() not in steps]


def check(
    steps: dict[str, list[str]], folder: Path, minutes: float, *, go_on: bool = False
) -> bool:
    """Run steps and write the summary after each; tell whether all passed.

    With ``go_on`` the rows of other steps stay in the summary of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    summary = folder / "summary.md"
    lines = [*HEAD, *(other_rows(summary, steps) if go_on else ())]
    passed = True
    print("\n".join(lines), flush=True)
    for name, command in steps.items():
        ended, seconds = run(name, command, folder, end - time.monotonic())
        lines.append(f"| {name} | {ended} | {seconds:.0f} |")
        summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(lines[-1], flush=True)
        passed = passed and ended == "passed"
    return passed


def main() -> None:
    """Parse the command line and run the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-output"))
    parser.add_argument("--minutes", type=float, default=20.0, help="for all steps together")
    parser.add_argument("--only", nargs="+", choices=STEPS)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.exit(1, "check_gpu.py: PyTorch finds no CUDA device, so there is nothing to check\n")
    steps = {name: STEPS[name] for name in args.only or STEPS}
    sys.exit(not check(steps, args.out, args.minutes, go_on=bool(args.only)))


if __name__ == "__main__":
    main()
