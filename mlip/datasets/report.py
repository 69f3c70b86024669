"""The one-page report of a conversion: counts, labels, units, ranges, and what looks wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip.datasets.statistics import Statistics
from mlip.datasets.structure import LABELS

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 8  # problems, outliers and groups that are named; all are counted
MAX_COMPARED_INPUTS = 20
UNITS = "eV, Å, eV/Å, eV/Å³ (ASE sign: tension positive)"
HIGH_STRESS = 100 / 160.21766  # 100 GPa in eV/Å³
OPPOSITE = -0.7  # correlation of stress and volume below which the sign is doubted


@dataclass
class InputFile:
    """How many frames of one input were read and kept, and the numbers of those dropped.

    ``left_out`` counts frames that were not wanted; ``damage`` says why a file could not be read
    to its end.
    """

    path: str
    kept: int = 0
    dropped: list[int] = field(default_factory=list)
    left_out: int = 0
    damage: str | None = None

    def frame(self, kept_index: int) -> int:
        """Give the frame number of the kept frame number ``kept_index``."""
        frame = kept_index
        for dropped in self.dropped:
            frame += dropped <= frame
        return frame


@dataclass
class ConversionReport:
    """What a conversion read, dropped and found; ``print`` it with Rich, or take ``to_json()``."""

    output: str
    inputs: list[InputFile]
    problems: list[str]
    label_keys: dict[str, dict[str, int]]
    labelled: dict[str, int]
    not_kept: dict[str, int]
    ranges: dict[str, dict[str, Any]]
    elements: dict[str, dict[str, int]]
    config_types: dict[str, int]
    duplicates: int
    overlaps: dict[str, int]
    outliers: dict[str, str]
    warnings: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    energy_convention: str | None = None
    units: str = UNITS

    @property
    def read(self) -> int:
        """Number of frames read."""
        return self.kept + self.dropped + sum(file.left_out for file in self.inputs)

    @property
    def kept(self) -> int:
        """Number of frames written."""
        return sum(file.kept for file in self.inputs)

    @property
    def dropped(self) -> int:
        """Number of frames left out."""
        return sum(len(file.dropped) for file in self.inputs)

    @property
    def damaged(self) -> int:
        """Number of inputs that could not be read to their end."""
        return sum(file.damage is not None for file in self.inputs)

    def to_json(self) -> str:
        """Give everything as JSON."""
        counts = {"read": self.read, "kept": self.kept, "dropped": self.dropped}
        return json.dumps({**counts, **asdict(self)}, indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        from mlip.datasets.report_page import page

        return page(self)


def make_report(
    output: str,
    files: Sequence[InputFile],
    problems: Sequence[str],
    label_keys: dict[str, dict[str, int]],
    not_kept: dict[str, int],
    statistics: Statistics,
) -> ConversionReport:
    """Draw up the report of a conversion from its counters and the statistics of what was kept."""
    from ase.data import chemical_symbols

    s = statistics
    elements = {
        chemical_symbols[z]: {"frames": s.element_frames[z], "atoms": s.element_atoms[z]}
        for z in sorted(s.element_atoms)
    }
    duplicates, differ = s.duplicates()
    report = ConversionReport(
        output=output,
        inputs=list(files),
        problems=list(problems),
        label_keys=label_keys,
        labelled=dict(s.labelled),
        not_kept=dict(sorted(not_kept.items())),
        ranges=s.ranges(),
        elements=elements,
        config_types=dict(s.config_types.most_common()),
        duplicates=duplicates,
        overlaps=_overlaps(files, s),
        outliers=_name_outliers(files, s),
        warnings=[],
    )
    report.warnings = _warnings(report, s, differ)
    return report


def _overlaps(files: Sequence[InputFile], s: Statistics) -> dict[str, int]:
    if len(files) > MAX_COMPARED_INPUTS:
        return {}
    pairs = combinations(range(len(files)), 2)
    counts = {f"{files[a].path} and {files[b].path}": s.overlap(a, b) for a, b in pairs}
    return {pair: count for pair, count in counts.items() if count}


def _name_outliers(files: Sequence[InputFile], s: Statistics) -> dict[str, str]:
    first = np.cumsum([0, *(file.kept for file in files)])
    of_file = s.files()
    named: dict[str, str] = {}
    for i, reason in s.outliers().items():
        file = files[of_file[i]]
        if file.left_out:
            named[f"entry {i} of the output"] = reason
            continue
        named[f"{file.path} frame {file.frame(i - int(first[of_file[i]]))}"] = reason
    return named


def suspicions(ranges: dict[str, dict[str, Any]], s: Statistics) -> list[str]:
    """Say what numbers look as if they had other units or another sign than assumed."""

    def median(name: str) -> float:
        return ranges.get(name, {}).get("median", np.nan)

    follows = s.stress_follows_volume()
    found: list[tuple[bool, str]] = [
        (
            median("largest stress") > HIGH_STRESS,
            f"half of the stresses exceed 100 GPa (median {median('largest stress'):.3g} eV/Å³): "
            "are they in GPa or kbar?",
        ),
        (
            follows is not None and follows < OPPOSITE,
            f"stress falls when the volume grows (correlation {follows or 0:.2f}): is its sign "
            "opposite (compression positive)?",
        ),
        (
            median("largest force") > 10,
            f"half of the frames have forces above 10 eV/Å (median {median('largest force'):.3g}): "
            "are they in other units?",
        ),
        (
            median("nearest distance") < 0.6 or median("nearest distance") > 6,
            f"the median nearest distance is {median('nearest distance'):.3g} Å: "
            "are positions in Å?",
        ),
        (
            s.zero_forces_on_fixed > 0,
            f"forces on fixed atoms are exactly zero in {s.zero_forces_on_fixed} frames: "
            "written with constraints applied? the true forces are lost there",
        ),
    ]
    return [text for applies, text in found if applies]


def _warnings(report: ConversionReport, s: Statistics, differ: int) -> list[str]:
    n = report.kept
    found: list[tuple[bool, str]] = [
        (report.dropped > 0, f"{report.dropped} of {report.read} frames were dropped"),
        (
            report.damaged > 0,
            f"{report.damaged} of {len(report.inputs)} inputs could not be read to their end",
        ),
        (differ > 0, f"{differ} geometries occur more than once with different energies"),
        (bool(report.overlaps), "inputs share structures: they are no independent splits"),
        (
            len(report.inputs) > MAX_COMPARED_INPUTS,
            f"more than {MAX_COMPARED_INPUTS} inputs: their overlap was not counted pair by pair",
        ),
    ]
    for label in LABELS:
        with_label = report.labelled.get(label, 0)
        found.append((0 < with_label < n, f"{n - with_label} of {n} frames have no {label}"))
    return [text for applies, text in found if applies] + suspicions(report.ranges, s)
