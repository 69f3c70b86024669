"""Run damaged, hostile and unusual data files, each in its own process, and judge what happened.

What must happen comes from a machine-readable list (``CASES.json``): from its keys where they say
it, else from the words of ``expect``.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlip.validation.data_probe import run_probe
from mlip.validation.data_samples import check_sample

LISTS = "CASES.json"
TIME_LIMIT = 120.0  # s
MEMORY_LIMIT_MB = 1024  # above what the process needs before it opens the data
STRAY = re.compile(r"pwned|marker", re.IGNORECASE)
SAME = 1e-5  # relative; the same structure may be stored in another precision

HARMLESS = re.compile(r"(no|without|not an|never an?) (error|crash|exception)s?")
ERROR = re.compile(r"\b(refuse|reject|must raise|error|must fail|corrupt|damaged|hostile)")
REPORT = re.compile(r"report|mismatch|detect|flag|promise|no nextid|warn")
BOTH_LEGAL = re.compile(
    r"both .* (occur|are legal|are allowed)|must (be )?read|is legal|same (values )?as"
)
SOME_ENTRIES = re.compile(r"per-entry|all others? read|others fine")
FRAMES_BEFORE = re.compile(r"before it (are )?usable|frames before")
COUNT = re.compile(r"\b(\d+) (?:rows|structures|entries|frames)\b")
FLAT = re.compile(r"\bflat\b")
EQUAL = re.compile(r"\b(same|identical|equal)\b")

KEYS = {"case", "expect", "n", "n_entries", "length", "bad_index", "bad_id", "missing", "marker"}
FOR_PEOPLE = {"page"}


@dataclass(frozen=True)
class Case:
    """A folder of data and what is said about it."""

    name: str
    folder: Path
    legal: bool  # among the unusual but legal ones
    keys: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """What is expected, in words, without phrases that negate an error."""
        words = str((self.keys or {}).get("expect", "")).lower()
        return HARMLESS.sub("", words)


@dataclass
class Verdict:
    """The judgement of one case."""

    case: str
    ok: bool
    expected: str
    happened: str
    faults: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What a probe brought back: its answer, or how it ended instead."""

    answer: dict[str, Any] | None
    ended: str | None
    stray: list[str]

    def entries(self) -> list[dict[str, Any]]:
        """Give the entries, none if the data could not be opened."""
        return self.answer["entries"] if self.answer else []

    def read(self) -> list[int]:
        """Give the places of the entries that were read."""
        return [i for i, entry in enumerate(self.entries()) if "values" in entry]

    def failed(self) -> list[int]:
        """Give the places of the entries that gave an error."""
        return [i for i, entry in enumerate(self.entries()) if "error" in entry]

    def open_error(self) -> str | None:
        """Give the error of opening, or None."""
        return self.answer["error"]["text"] if self.answer and self.answer["error"] else None

    def reported(self) -> list[str]:
        """Give everything that was reported about the data as a whole."""
        if not self.answer:
            return []
        return [*self.answer["problems"], *self.answer["check"].get("findings", [])]


def find_cases(root: Path) -> list[Case]:
    """List the cases below a folder: those of ``CASES.json`` files, then unlisted folders."""
    described: dict[str, Mapping[str, Any]] = {}
    for place in (root, root / "bad", root / "variants"):
        if (place / LISTS).is_file():
            content = json.loads((place / LISTS).read_text())
            if isinstance(content, dict):
                content = [{"case": name, **record} for name, record in content.items()]
            described |= {str(record["case"]).split("/")[-1]: record for record in content}
    cases: list[Case] = []
    for place in (root / "bad", root / "variants"):
        folders = sorted(p for p in place.iterdir() if p.name != LISTS) if place.is_dir() else []
        cases += [
            Case(p.name, p, place.name == "variants", described.pop(p.name, None)) for p in folders
        ]
    absent = [Case(name, root / "bad" / name, False, keys) for name, keys in described.items()]
    return cases + absent


def run_case(case: Case) -> Run:
    """Probe a case in a process of its own, in an empty working directory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlip.validation.data_probe"])
    with tempfile.TemporaryDirectory() as scratch:
        place, target, log = Path(scratch, "work"), Path(scratch, "answer"), Path(scratch, "log")
        place.mkdir()
        before = _listing(case.folder)
        arguments = (case.folder.resolve(), place, target, log, MEMORY_LIMIT_MB)
        process = context.Process(target=run_probe, args=arguments)
        process.start()
        process.join(TIME_LIMIT)
        ended = _end(process, log)
        answer = json.loads(target.read_text()) if target.exists() and not ended else None
        stray = sorted(str(p.relative_to(place)) for p in place.rglob("*"))
        stray += sorted(_listing(case.folder) - before)
    return Run(answer, ended, stray)


def _end(process: BaseProcess, log: Path) -> str | None:
    """Tell how a process ended if it did not end well."""
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end after {TIME_LIMIT:.0f} s"
    code = process.exitcode or 0
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return (lines[-1] if lines else f"exit status {code}") if code else None


def judge(case: Case, run: Run, usual: Mapping[str, Any]) -> Verdict:
    """Compare what happened with what must happen.

    Keys of sample records (``energy_sum``, ...) are checked as those are, in this process, once the
    probe has read the whole data without harm; other keys count as not checked.

    Args:
        case: the case.
        run: what the probe brought back.
        usual: values of entries that most cases agree on, by ``entry_key``.
    """
    expected, faults = _demand(case, run)
    general = list(_general_faults(case, run))
    if not general and EQUAL.search(case.text):
        faults += _differences(case, run, usual)
    values = {k: v for k, v in (case.keys or {}).items() if k not in KEYS | FOR_PEOPLE}
    if values and run.read() and not (general or run.failed()):
        rows = check_sample(case.folder.parent, case.folder.name, values)[case.folder.name]
        general += [f"{row.field}: {row.found}, not {row.expected} {row.note}"
                    for row in rows if not row.ok]  # fmt: skip
    elif values:
        general.append(f"UNKNOWN KEYS {sorted(values)}: NOT CHECKED")
    faults = general + ([] if run.ended else faults)
    return Verdict(case.name, not faults, expected, _happened(run), faults)


def usual_values(cases: list[Case], runs: list[Run]) -> dict[str, Any]:
    """Give the values of each entry that at least two cases agree on and most have."""
    votes: dict[str, Counter[str]] = {}
    values: dict[str, Any] = {}
    for case, run in zip(cases, runs, strict=True):
        for i in run.read():
            content = run.entries()[i]["values"]
            text = json.dumps(content, sort_keys=True)
            votes.setdefault(entry_key(case, i), Counter())[text] += 1
            values[text] = content
    best = {key: counts.most_common(1)[0] for key, counts in votes.items()}
    return {key: values[text] for key, (text, count) in best.items() if count > 1}


def entry_key(case: Case, index: int) -> str:
    """Name an entry among all cases of one kind of file."""
    kinds = sorted({p.suffix for p in _files(case.folder) if p.suffix in {".lmdb", ".aselmdb"}})
    return f"{''.join(kinds)} {index}"


def _general_faults(case: Case, run: Run) -> Iterator[str]:
    """Give what is wrong whatever the case is."""
    if run.ended:
        yield run.ended
    if not case.folder.exists():
        yield "the folder of the case is missing"
    marker = (case.keys or {}).get("marker")
    for name in run.stray:
        named = name == marker or STRAY.search(name)
        yield f"SOMETHING OF THE FILE WAS EXECUTED: {name}" if named else f"left a file: {name}"
    if not run.answer:
        return
    errors = [run.answer["error"], run.answer["check"]["error"], run.answer["skipping"]]
    errors += [entry.get("error") for entry in run.entries()]
    for error in errors:
        if isinstance(error, dict) and error["kind"] != "DataError":
            yield f"{error['kind']} instead of a DataError: {error['text']}"
    names = {p.name for p in _files(case.folder)}
    for error in errors:
        if isinstance(error, dict) and not any(name in error["text"] for name in names):
            yield f"the error names no file: {error['text']}"


def _demand(case: Case, run: Run) -> tuple[str, list[str]]:
    """Give what must happen, and what did not."""
    keys, text = case.keys, case.text
    if keys is None:
        return ("all read", _all_read(run)) if case.legal else ("no crash (not described)", [])
    bad = "bad_index" in keys or "bad_id" in keys
    if bad and not BOTH_LEGAL.search(text):
        return _one_bad_entry(case, run)
    if "missing" in keys:
        return _entries_fail(run, list(keys["missing"]), keys.get("length"))
    if keys.get("n_entries") is not None and keys.get("length") is not None:
        return _length_disagrees(run, int(keys["n_entries"]), int(keys["length"]))
    if "marker" in keys:
        return "refused, or read and reported", _refused_or_reported(run, keys.get("n"))
    if SOME_ENTRIES.search(text):
        ok = run.open_error() is None and bool(run.read() and run.failed())
        return "errors of some entries, the others read", [] if ok else ["not so"]
    if FRAMES_BEFORE.search(text):
        return _stream_with_bad_end(run)
    if ERROR.search(text) and not case.legal and not REPORT.search(text):
        ok = not run.read() and (run.open_error() is not None or bool(run.failed()))
        return "refused", [] if ok else ["was read"]
    return _all_read_and_reported(case, run)


def _one_bad_entry(case: Case, run: Run) -> tuple[str, list[str]]:
    assert case.keys is not None
    by_id = "bad_id" in case.keys
    key = case.keys["bad_id" if by_id else "bad_index"]
    n = case.keys.get("n")
    expected = f"{'row' if by_id else 'entry'} {key} refused, the others read"
    if run.open_error() is not None:
        return expected, ["could not be opened"]
    faults = [] if n in {None, len(run.entries())} else [f"{len(run.entries())} entries, not {n}"]
    if not run.failed() and "report" in case.text:
        return f"{expected} or reported", faults + _absent_and_reported(run, int(key))
    place = int(key) - 1 if by_id else int(key)
    if run.failed() != [place]:
        faults.append(f"the entries that failed are {run.failed()}, not [{place}]")
    for i in run.failed():
        message = run.entries()[i]["error"]["text"]
        if not re.search(rf"\b{key}\b", message):
            faults.append(f"the error does not name entry {key}")
    return expected, faults


def _absent_and_reported(run: Run, place: int) -> list[str]:
    values = run.entries()[place].get("values", {})
    filled = all(values.get(name) is not None for name in ("energy", "forces"))
    faults = ["a missing label was filled in"] if filled else []
    return faults + ([] if run.reported() else ["nothing was reported"])


def _entries_fail(run: Run, missing: list[int], length: int | None) -> tuple[str, list[str]]:
    expected = f"entries {missing} refused, the others read"
    if run.open_error() is not None:
        return expected, ["could not be opened"]
    faults = [] if run.failed() == missing else [f"the entries that failed are {run.failed()}"]
    if length is not None and len(run.entries()) != length:
        faults.append(f"{len(run.entries())} entries, not {length}")
    return expected, faults


def _length_disagrees(run: Run, entries: int, length: int) -> tuple[str, list[str]]:
    expected = f"{entries} entries read, {length} and {entries} reported"
    faults = [] if len(run.read()) == entries else [f"{len(run.read())} entries read"]
    wanted = {str(entries), str(length)}
    if not any(wanted <= set(re.findall(r"\d+", text)) for text in run.reported()):
        faults.append("the two numbers were not reported")
    return expected, faults


def _refused_or_reported(run: Run, n: int | None) -> list[str]:
    if run.open_error() is not None or run.failed():
        return []
    faults = [] if run.reported() else ["nothing was reported"]
    return faults + ([] if n in {None, len(run.read())} else [f"{len(run.read())} entries read"])


def _stream_with_bad_end(run: Run) -> tuple[str, list[str]]:
    expected = "an error, and the frames before it when bad ones are skipped"
    if run.open_error() is None and not run.failed():
        return expected, ["no error"]
    if run.read():
        return expected, []
    skipping = run.answer["skipping"] if run.answer else None
    ok = isinstance(skipping, int) and skipping > 0
    return expected, [] if ok else [f"frames before it: {skipping}"]


def _all_read(run: Run) -> list[str]:
    if run.open_error() is not None:
        return ["could not be opened"]
    if run.failed():
        return [f"entries {run.failed()} failed"]
    return [] if run.read() else ["nothing was read"]


def _all_read_and_reported(case: Case, run: Run) -> tuple[str, list[str]]:
    assert case.keys is not None
    counted = COUNT.search(case.text) if not REPORT.search(case.text) else None
    n = int(counted[1]) if counted else case.keys.get("n")
    faults = _all_read(run)
    if n is not None and len(run.read()) != n:
        faults.append(f"{len(run.read())} entries read")
    expected = "all read" if n is None else f"{n} read"
    if REPORT.search(case.text):
        expected += " and reported"
        faults += [] if run.reported() else ["nothing was reported"]
    if FLAT.search(case.text):
        lists = [x for i in run.read() for x in run.entries()[i]["values"]["lists"].values()]
        flat = all(not isinstance(x, list) for values in lists for x in values)
        expected += ", lists flat"
        faults += [] if lists and flat else ["the lists are not flat"]
    return expected, faults


def _differences(case: Case, run: Run, usual: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    for i in run.read():
        values = run.entries()[i]["values"]
        other = usual.get(entry_key(case, i))
        if other is not None:
            labels = (name for name in other if name != "lists")  # extras may differ
            names = [name for name in labels if not _alike(values[name], other[name])]
            faults += [f"entry {i}: {name} differs from the same entry elsewhere" for name in names]
    return faults


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= SAME * max(abs(a), abs(b), 1e-3)
    return bool(a == b)


def _happened(run: Run) -> str:
    if run.ended:
        return run.ended
    if run.open_error() is not None:
        return f"not opened: {run.open_error()}"
    told = f"{len(run.read())} of {len(run.entries())} read"
    texts = [run.entries()[i]["error"]["text"] for i in run.failed()[:1]] + run.reported()[:1]
    return "; ".join([told, *(text.splitlines()[0] for text in texts if text)])


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]


def _listing(folder: Path) -> set[str]:
    return {str(p) for p in folder.rglob("*")} if folder.is_dir() else set()
