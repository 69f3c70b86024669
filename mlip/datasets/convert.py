"""Convert any known files into one store (or extxyz), frame by frame, resumably, with a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mlip.datasets.labels import LabelKeys
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import Entry, PathLike, expand, find_reader, iterate_file
from mlip.datasets.report import ConversionReport, InputFile, make_report
from mlip.datasets.statistics import Statistics
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, InputError
from mlip.files import atomic_write

PROBLEMS_KEPT = 100
EXTXYZ = frozenset({".extxyz", ".xyz"})

OnFrame = Callable[[Path, int, int], None]


class Sink(Protocol):
    """Where converted structures go."""

    def append(self, structure: Structure, progress: dict[str, Any]) -> None:
        """Take one more structure."""


def convert(
    inputs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    keys: LabelKeys | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_unlabelled: bool = False,
    on_frame: OnFrame | None = None,
) -> ConversionReport:
    """Convert files that :func:`mlip.datasets.read.iterate_file` reads into one store.

    A frame with bad content is dropped and reported. Nothing appears under the name of the output
    unless the whole conversion succeeds.

    Args:
        inputs: files or patterns, read in this order.
        output: ``*.lmdb`` for the native store; ``*.extxyz`` or ``*.xyz`` for text (8 decimals).
        keys: keys of the labels, where the usual names do not fit.
        resume: continue an interrupted conversion of the same inputs (store only).
        overwrite: replace an existing output.
        allow_unlabelled: accept inputs without any label.
        on_frame: called after each frame with its file, frames read and frames dropped so far.

    Raises:
        DataError: a file is missing, unknown or damaged; no frame is usable, none has a label, or
            none has a key that was named; the inputs changed before a resume.
        MlipError: the output cannot be written.
    """
    files, target = expand(inputs), Path(output)
    for file in files:
        find_reader(file)
        if target.exists() and file.samefile(target):
            raise DataError(f"{file} is both input and output: choose another name")
    job = _Job(files, keys or LabelKeys(), on_frame)
    with ExitStack() as stack:
        if target.suffix in EXTXYZ:
            if resume:
                raise InputError(f"{target}: only a store (.lmdb) can be resumed")
            job.run(stack.enter_context(_ExtxyzWriter(target, overwrite)))
        else:
            writer = StructureWriter(target, resume=resume, overwrite=overwrite)
            stack.enter_context(writer)
            job.restore(writer)
            job.run(writer)
            writer.metadata = job.provenance()
        job.check(allow_unlabelled)
        return job.report(target)


class _Job:
    """State of one conversion; ``state`` is what a resumed run needs, JSON-able."""

    def __init__(self, files: list[Path], keys: LabelKeys, on_frame: OnFrame | None) -> None:
        self.files = files
        self.keys = keys
        self.on_frame = on_frame
        self.statistics = Statistics()
        self.dropped = 0
        self.inputs = [InputFile(str(file)) for file in files]
        self.state: dict[str, Any] = {
            "job": self._fingerprint(),
            "inputs": [asdict(file) for file in self.inputs],
            "problems": [],
            "label_keys": {},
            "not_kept": {},
            "hints": [],
        }

    def restore(self, writer: StructureWriter) -> None:
        """Take up the state of an interrupted run from a partial store."""
        if not writer.progress:
            return
        if writer.progress["job"] != self.state["job"]:
            raise DataError(
                f"{writer.partial} was begun with other inputs or keys (or the inputs changed "
                "since): start again with --overwrite"
            )
        self.state = writer.progress
        self.inputs = [InputFile(**file) for file in self.state["inputs"]]
        self.dropped = sum(len(file.dropped) for file in self.inputs)
        index = 0
        for number, file in enumerate(self.inputs):
            for _ in range(file.kept):
                self.statistics.add(writer.read_committed(index), number)
                index += 1

    def run(self, sink: Sink) -> None:
        """Read all inputs from where the state stands and hand on what is usable."""
        for number, path in enumerate(self.files):
            file = self.inputs[number]
            done = file.kept + len(file.dropped)
            for entry in iterate_file(path, ReadOptions(self.keys), done):
                self._take(entry, number, sink)
                if self.on_frame is not None:
                    self.on_frame(path, self.dropped + len(self.statistics), self.dropped)

    def check(self, allow_unlabelled: bool) -> None:
        """Refuse a result that is of no use."""
        hints = ", ".join(self.state["hints"]) or "none"
        if not len(self.statistics):
            first = self.state["problems"][0] if self.state["problems"] else "no frames"
            raise DataError(f"no frame of the input is usable; the first problem: {first}")
        if not self.state["label_keys"] and not allow_unlabelled:
            raise DataError(
                f"none of the {len(self.statistics)} frames has an energy, forces or stress; "
                f"numbers found under other keys: {hints}; name the right ones (--energy-key, "
                "--forces-key, --stress-key, --virial-key)"
            )
        for label, key in self.keys.named().items():
            found = self.state["label_keys"].get("stress" if label == "virial" else label, {})
            if not any(name.rpartition(" (")[0] == key for name in found):
                raise DataError(
                    f"no frame has the {label} key {key!r}; numbers found under other keys: {hints}"
                )

    def provenance(self) -> dict[str, Any]:
        """Give what the store says about its origin."""
        sources = [{"name": Path(f.path).name, "structures": f.kept} for f in self.inputs]
        return {"sources": sources, "label_keys": self.state["label_keys"]}

    def report(self, output: Path) -> ConversionReport:
        """Draw up the report."""
        s = self.state
        return make_report(
            str(output), self.inputs, s["problems"], s["label_keys"], s["not_kept"], self.statistics
        )

    def _take(self, entry: Entry, number: int, sink: Sink) -> None:
        """Count one frame and, if it is usable, hand it on together with the new state."""
        file, record = self.inputs[number], self.state["inputs"][number]
        problem = entry.problem
        if entry.structure is not None:
            try:
                self.statistics.add(entry.structure, number)
            except InputError as error:
                problem = f"{entry.name}: {error}"
        if problem is not None or entry.structure is None:
            self.dropped += 1
            file.dropped.append(entry.frame)
            record["dropped"] = file.dropped
            if len(self.state["problems"]) < PROBLEMS_KEPT:
                self.state["problems"].append(problem)
            return
        file.kept += 1
        record["kept"] = file.kept
        for label, key in entry.used.items():
            _increment(self.state["label_keys"].setdefault(label, {}), key)
        for name in entry.not_kept:
            _increment(self.state["not_kept"], name)
        new_hints = [h for h in entry.hints if h not in self.state["hints"]]
        self.state["hints"] = [*self.state["hints"], *new_hints][:20]
        sink.append(entry.structure, self.state)

    def _fingerprint(self) -> dict[str, Any]:
        facts = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return {"files": [list(fact) for fact in facts], "keys": asdict(self.keys)}


def _increment(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


class _ExtxyzWriter(AbstractContextManager["_ExtxyzWriter"]):
    """Write structures as extxyz text that takes its name at the end."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists: choose another name or allow overwriting it")
        self._opened = atomic_write(path, "w")

    def append(self, structure: Structure, progress: dict[str, Any]) -> None:  # noqa: ARG002
        """Write one frame."""
        from ase.io.extxyz import write_extxyz

        write_extxyz(self._file, [structure.to_atoms()])

    def __enter__(self) -> Self:
        self._file = self._opened.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)
