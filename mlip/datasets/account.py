"""Add up what came of the chunks of a conversion, for its checks, its metadata and its report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlip.datasets.chunks import Place
from mlip.datasets.labels import LabelKeys
from mlip.datasets.report import ConversionReport, InputFile, make_report
from mlip.datasets.sources import Sources
from mlip.datasets.statistics import Statistics
from mlip.datasets.structure import Array
from mlip.errors import DataError
from mlip.files import atomic_write

PROBLEMS_KEPT = 100
HINTS_KEPT = 20
_ENTRY = re.compile(r"(?:frame|entry|id) \S+(?=: )")


class Account:
    """Sums over the chunks so far; a chunk comes as its record in the journal."""

    def __init__(self, files: Sequence[Path], sources: Sources) -> None:
        self.files = files
        self.sources = sources
        self.place = Place()
        self.kept = 0
        self.dropped = 0
        self.statistics = Statistics()
        self.inputs = [InputFile(str(file)) for file in files]
        self.problems: list[str] = []
        self.label_keys: dict[str, dict[str, int]] = {}
        self.not_kept: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self.hints: list[str] = []

    @property
    def read(self) -> int:
        """Give the number of frames that were read."""
        return self.kept + self.dropped + sum(self.left_out.values())

    def add(self, record: dict[str, Any]) -> None:
        """Add the next chunk."""
        file = self.inputs[record["file"]]
        file.kept += record["kept"]
        file.dropped += [frame for frame, _ in record["bad"]]
        file.left_out += sum(record["left_out"].values())
        file.damage = record["damage"] or file.damage
        self.kept += record["kept"]
        self.dropped += len(record["bad"])
        problems = [reason for _, reason in record["bad"]]
        problems += [record["damage"]] if record["damage"] else []
        self.problems += problems[: PROBLEMS_KEPT - len(self.problems)]
        self.statistics.extend(record["statistics"], record["file"])
        for label, counts in record["label_keys"].items():
            _add(self.label_keys.setdefault(label, {}), counts)
        _add(self.not_kept, record["not_kept"])
        _add(self.left_out, record["left_out"])
        new = [hint for hint in record["hints"] if hint not in self.hints]
        self.hints += new[: HINTS_KEPT - len(self.hints)]
        end = record["start"] + record["frames"]
        self.place = Place(record["file"] + 1) if record["last"] else Place(record["file"], end)

    def check(self, keys: LabelKeys, allow_unlabelled: bool) -> None:
        """Refuse a result that is of no use.

        Raises:
            DataError: nothing was kept, nothing has a label, or a key that was named was not found.
        """
        hints = ", ".join(self.hints) or "none"
        if not self.kept:
            wanted = sum(self.left_out.values())
            first = self.problems[0] if self.problems else f"{wanted} frames were not wanted"
            raise DataError(f"no frame of the input is usable; the first problem: {first}")
        if not self.label_keys and not allow_unlabelled:
            raise DataError(
                f"none of the {self.kept} frames has an energy, forces or stress; "
                f"numbers found under other keys: {hints}; name the right ones (--energy-key, "
                "--forces-key, --stress-key, --virial-key)"
            )
        for label, key in keys.named().items():
            found = self.label_keys.get("stress" if label == "virial" else label, {})
            if not any(name.rpartition(" (")[0] == key for name in found):
                raise DataError(
                    f"no frame has the {label} key {key!r}; numbers found under other keys: {hints}"
                )

    def facts(self) -> dict[str, Any]:
        """Give what is known of the data before they are read."""
        convention = self.sources.energy_convention
        stated = {} if convention is None else {"energy_convention": convention}
        return {**stated, **self.sources.carried}

    def metadata(self) -> dict[str, Any]:
        """Give what the output says about its origin."""
        sources = [{"name": file.name, "structures": x.kept} for file, x in self._pairs()]
        return {"sources": sources, "label_keys": self.label_keys}

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [kept] int64."""
        return self.statistics.column("atoms").astype("int64")

    def report(self, output: Path) -> ConversionReport:
        """Draw up the report."""
        report = make_report(
            str(output), self.inputs, self.problems, self.label_keys, self.not_kept, self.statistics
        )
        report.warnings[:0] = self.sources.problems
        report.left_out = self.left_out
        report.energy_convention = self.sources.energy_convention
        return report

    def _pairs(self) -> Iterable[tuple[Path, InputFile]]:
        return zip(self.files, self.inputs, strict=True)


def write_quarantine(path: Path, files: Sequence[Path], records: Iterable[dict[str, Any]]) -> None:
    """List all bad frames and files: tab-separated file, entry, reason.

    Raises:
        MlipError: the list cannot be written.
    """
    with atomic_write(path, "w") as file:
        file.write("file\tentry\treason\n")
        for record in records:
            source = str(files[record["file"]])
            rows = [(f"frame {frame}", problem) for frame, problem in record["bad"]]
            rows += [("-", record["damage"])] if record["damage"] else []
            for entry, problem in rows:
                reason = problem.removeprefix(source).lstrip(": ")
                named = _ENTRY.match(reason)
                if named:
                    entry, reason = named[0], reason[named.end() + 2 :]
                file.write("\t".join(" ".join(x.split()) for x in (source, entry, reason)) + "\n")


def _add(sums: dict[str, int], counts: dict[str, int]) -> None:
    for key, count in counts.items():
        sums[key] = sums.get(key, 0) + count
