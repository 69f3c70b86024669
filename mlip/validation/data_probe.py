"""Open one data folder in a process of its own, with limits, and write down what happened.

For damaged and hostile files: the caller sees a crash, a marker file or a bomb, and lives on.
"""

from __future__ import annotations

import json
import os
import resource
import warnings
from pathlib import Path
from typing import Any

from mlip.datasets.check import check
from mlip.datasets.collection import open_dataset
from mlip.datasets.dataset import Dataset
from mlip.datasets.structure import Structure
from mlip.errors import DataError


def probe(path: Path) -> dict[str, Any]:
    """Read every entry of a data set and tell what came of it.

    Returns:
        ``error`` of opening or None, ``entries`` (name, and ``values`` or ``error``), ``problems``
        that the data set reports, ``skipping`` (number of entries when bad ones are left out, where
        opening failed), ``check`` (findings of the report of the data set) and ``peak_mb``. An
        error is its ``text`` and its ``kind``, the name of its class.
    """
    answer: dict[str, Any] = {"error": None, "entries": [], "problems": [], "skipping": None}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = open_dataset(path)
            answer["problems"] = list(dataset.facts.problems)
            answer["entries"] = [_entry(dataset, i) for i in range(len(dataset))]
        except Exception as error:
            answer["error"] = _fault(error)
            answer["skipping"] = _skipping(path)
        answer["check"] = _report(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**answer, "peak_mb": round((peak - before) / 1024, 1)}


def _entry(dataset: Dataset, index: int) -> dict[str, Any]:
    name = dataset.name(index)
    try:
        return {"name": name, "values": _values(dataset[index])}
    except Exception as error:
        return {"name": name, "error": _fault(error)}


def _values(s: Structure) -> dict[str, Any]:
    """Give a few numbers by which the same structure is known again, whatever its dtype was."""
    return {
        "atoms": len(s),
        "numbers": int(s.numbers.sum()),
        "positions": float((s.positions**2).sum()),
        "cell": float((s.cell**2).sum()),
        "energy": s.energy,
        "forces": None if s.forces is None else float((s.forces**2).sum()),
        "stress": None if s.stress is None else float((s.stress**2).sum()),
        "tags": None if s.tags is None else int(s.tags.sum()),
        "fixed": None if s.fixed is None else int(s.fixed.sum()),
        "lists": {k: v for k, v in s.info.items() if isinstance(v, list) and len(v) < 100},
    }


def _skipping(path: Path) -> int | dict[str, str]:
    try:
        dataset = open_dataset(path, policy="skip")
        return sum(1 for i in range(len(dataset)) if len(dataset[i]))
    except Exception as error:
        return _fault(error)


def _report(path: Path) -> dict[str, Any]:
    try:
        report = check([path])
    except Exception as error:
        return {"error": _fault(error)}
    return {"error": None, "findings": report.findings, "bad": report.bad}


def _fault(error: Exception) -> dict[str, str]:
    kind = DataError.__name__ if isinstance(error, DataError) else type(error).__name__
    return {"kind": kind, "text": str(error)}


def run_probe(folder: Path, work: Path, target: Path, log: Path, megabytes: int) -> None:
    """Probe in this process, which must be a fresh one: its limits and folder are changed.

    Args:
        folder: data.
        work: working directory, where a payload would leave its marker.
        target: file for the answer, JSON.
        log: file for whatever is printed.
        megabytes: memory allowed above what is in use now.
    """
    os.chdir(work)
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target.write_text(json.dumps(probe(folder)))
