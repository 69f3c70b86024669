"""Check that data files of every kind are read exactly as expected, and bad ones safely.

    python scripts/check_dataset.py FOLDER [--expected FOLDER/expected.json] [--json FILE]

FOLDER holds the samples that the keys of expected.json name. Its folders bad/ and variants/, where
they exist, hold one folder a case, described in CASES.json; each case runs in a process of its own,
with limits on time and memory. Prints the verdict of every field and every case; the exit code is
1 if any is not as expected, 2 if FOLDER or expected.json cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlip.files import atomic_write
from mlip.validation.data_cases import Verdict, find_cases, judge, run_case, usual_values
from mlip.validation.data_samples import Row, check_sample

WIDTH = 44  # of an expected or found value


def main() -> int:
    """Check samples and cases, and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--expected", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    arguments = parser.parse_args()
    root: Path = arguments.folder.resolve()
    try:
        records = json.loads((arguments.expected or root / "expected.json").read_text())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    samples: dict[str, list[Row]] = {}
    further = root / "variants" / "expected.json"
    if further.is_file():
        own = json.loads(further.read_text())
        records |= {f"variants/{name}": record for name, record in own.items()}
    for name, record in records.items():
        for label, rows in check_sample(root, name, record).items():
            samples[label] = rows
            _print_sample(label, rows)
    verdicts = list(_cases(root))
    counts = _print_summary(samples, verdicts)
    if arguments.json is not None:
        content = {
            **counts,
            "samples": {label: [row._asdict() for row in rows] for label, rows in samples.items()},
            "cases": [asdict(verdict) for verdict in verdicts],
        }
        with atomic_write(arguments.json, "w") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False, default=str))
    return 0 if counts["passed"] else 1


def _cases(root: Path) -> Iterator[Verdict]:
    """Run all cases, then judge them: what most agree on is known only at the end."""
    cases = find_cases(root)
    runs = []
    for number, case in enumerate(cases):
        print(f"\rcase {number + 1} of {len(cases)}: {case.name:40.40s}", end="", file=sys.stderr)
        runs.append(run_case(case))
    if cases:
        print(file=sys.stderr)
    usual = usual_values(cases, runs)
    for case, run in zip(cases, runs, strict=True):
        verdict = judge(case, run, usual)
        print(f"\n{case.folder.parent.name}/{verdict.case}: {'ok' if verdict.ok else 'FAILED'}")
        print(f"  expected: {verdict.expected}\n  happened: {verdict.happened}")
        for fault in verdict.faults:
            print(f"  FAULT: {fault}")
        yield verdict


def _print_sample(label: str, rows: list[Row]) -> None:
    print(f"\n{label}")
    for row in rows:
        verdict = "ok" if row.ok else "DIFFERENT"
        values = f"{_short(row.expected):{WIDTH}s} {_short(row.found):{WIDTH}s}"
        print(f"  {row.field:40s} {values} {verdict}{'  ' + row.note if row.note else ''}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _print_summary(samples: dict[str, list[Row]], verdicts: list[Verdict]) -> dict[str, Any]:
    rows = [(label, row) for label, content in samples.items() for row in content]
    different = [f"{label}: {row.field}" for label, row in rows if not row.ok]
    failed = [verdict.case for verdict in verdicts if not verdict.ok]
    print(f"\nfields: {len(rows) - len(different)} of {len(rows)} as expected")
    print(f"cases:  {len(verdicts) - len(failed)} of {len(verdicts)} as expected")
    for text in [*different, *failed]:
        print(f"  not so: {text}")
    print("data check: " + ("FAILED" if different or failed else "all as expected"))
    return {
        "passed": not (different or failed),
        "fields": len(rows),
        "fields_different": different,
        "cases_run": len(verdicts),
        "cases_failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main())
