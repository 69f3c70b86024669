"""The report of a check: what a data set holds, what is wrong, and what looks wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip.datasets.dataset import Dataset, DatasetFacts
from mlip.datasets.folders import folder_files
from mlip.datasets.formats.npz import SIZES_FILE, read_sizes
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import find_reader
from mlip.datasets.report import UNITS, suspicions
from mlip.datasets.structure import LABELS
from mlip.datasets.tally import Tally
from mlip.errors import DataError

if TYPE_CHECKING:
    from rich.console import Group

EXAMPLES = 20  # repeated names and geometries that are named; all are counted
NET_FORCE = 0.1  # eV/Å; DFT forces of a whole structure cancel better than this
ADSORPTION = 10.0  # eV; released OC20 files hold no adsorption energy beyond


@dataclass
class CheckedFile:
    """One file: format, size, entries (None: not known before reading), and what went wrong.

    ``fields`` are names, types and shapes in the first entry, where the format shows them.
    """

    path: str
    format: str = "unknown"
    bytes: int = 0
    entries: int | None = None
    checked: int = 0
    bad: int = 0
    unreadable: str | None = None
    problems: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    facts: DatasetFacts | None = None


@dataclass
class CheckReport:
    """What a check found; ``print`` it with Rich, or take ``to_json()``.

    Attributes:
        files: format, size, entries, and problems of each file.
        structures: number of entries in the files as far as known.
        checked: number of entries read.
        bad: number of entries with bad content; ``bad_entries`` names the first of them.
        sample: how the entries were chosen, empty for all.
        problems: what is wrong with files that can be read.
        labels: per label the structures that have it, the keys it was found under, and the
            first structures without it.
        units: units of all numbers here.
        ranges: minimum, median and maximum of each quantity.
        elements: per element the structures and atoms that have it.
        sizes: numbers of structures by number of atoms, in classes that double.
        pbc: structures by periodic directions.
        present: structures with tags, fixed atoms, charge and spin; ``values`` the values.
        extras: structures by the further things they carry (sid, ...).
        names: structures with a name (sid and fid), and those whose name came before.
        duplicates: structures whose exact geometry came before, and geometries among them with
            different energies; the first are named.
        outliers: suspicious structures, each with the reason.
        energy: ``convention`` as stated, the evidence, and what it looks like.
        relaxation_frame: of IS2RE files.
        neighbors: at the cutoff, where asked for.
        warnings: what looks wrong.
    """

    files: list[CheckedFile]
    structures: int
    checked: int
    bad: int
    bad_entries: list[str]
    sample: str
    problems: list[str]
    labels: dict[str, dict[str, Any]]
    ranges: dict[str, dict[str, Any]]
    elements: dict[str, dict[str, int]]
    sizes: dict[str, int]
    pbc: dict[str, int]
    present: dict[str, int]
    values: dict[str, dict[str, int]]
    extras: dict[str, int]
    not_kept: dict[str, int]
    names: dict[str, Any]
    duplicates: dict[str, Any]
    outliers: dict[str, str]
    energy: dict[str, Any]
    relaxation_frame: str | None
    neighbors: dict[str, Any] | None
    warnings: list[str]
    units: str = UNITS

    @property
    def unreadable(self) -> list[str]:
        """Errors of files that could not be read, or not to their end."""
        return [file.unreadable for file in self.files if file.unreadable]

    @property
    def findings(self) -> list[str]:
        """Everything that is wrong or looks wrong, the worst first."""
        return [*self.unreadable, *self.bad_entries, *self.problems, *self.warnings]

    @property
    def passed(self) -> bool:
        """Tell whether every entry is good and the files agree with themselves."""
        return not (self.unreadable or self.bad or self.problems)

    def to_json(self) -> str:
        """Give everything as JSON."""
        content = {"passed": self.passed, **asdict(self)}
        for file in content["files"]:
            file.pop("facts")
        return json.dumps(content, indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        from mlip.datasets.check_page import page

        return page(self)


def draw_up(
    files: Sequence[CheckedFile], tally: Tally, options: ReadOptions, limit: int | None, seed: int
) -> CheckReport:
    """Make the report from the counters."""
    from ase.data import chemical_symbols

    s, name = tally.statistics, Namer(files, tally, options)
    known = [file.entries if file.entries is not None else file.checked for file in files]
    report = CheckReport(
        files=list(files),
        structures=sum(known),
        checked=tally.done,
        bad=tally.bad,
        bad_entries=tally.problems,
        sample=_sample_text(files, tally.done, limit, seed),
        problems=[p for file in files for p in file.problems] + _size_tables(files, tally, name),
        labels=_labels(tally, name),
        ranges=s.ranges(),
        elements={
            chemical_symbols[z]: {"structures": s.element_frames[z], "atoms": s.element_atoms[z]}
            for z in sorted(s.element_atoms)
        },
        sizes=_sizes(s.column("atoms")),
        pbc=dict(tally.pbc.most_common()),
        present=dict(tally.present),
        values={k: dict(sorted(v.items())) for k, v in tally.values.items() if v},
        extras=dict(tally.extras.most_common()),
        not_kept=dict(tally.not_kept.most_common()),
        names=_names(tally, name),
        duplicates=_duplicates(tally, name),
        outliers={name(i): why for i, why in s.outliers().items()},
        energy=_energy(files, tally, options),
        relaxation_frame=_common([f.facts.relaxation_frame for f in files if f.facts]),
        neighbors=_neighbors(tally),
        warnings=[],
    )
    report.warnings = list(_warnings(report, tally))
    return report


class Namer:
    """Name good structures by their number in the tally, as the reader of their file does."""

    def __init__(self, files: Sequence[CheckedFile], tally: Tally, options: ReadOptions) -> None:
        self._files = files
        self._places = tally.statistics.files(), tally.frames()
        self._options = options
        self._open: dict[int, Dataset] = {}

    def __call__(self, index: int) -> str:
        """Name a structure."""
        return self.place(int(self._places[0][index]), int(self._places[1][index]))

    def place(self, file: int, frame: int) -> str:
        """Name the entry at a place of a file."""
        path = Path(self._files[file].path)
        reader = find_reader(path)
        if reader.open is None:
            return f"{path} frame {frame}"
        if file not in self._open:
            self._open = {file: reader.open(path, self._options)}
        return self._open[file].name(frame)


def _sample_text(files: Sequence[CheckedFile], done: int, limit: int | None, seed: int) -> str:
    """Say which entries were read, empty for all."""
    partly = [f for f in files if (f.checked >= (limit or np.inf) if f.entries is None
                                   else f.checked < f.entries and not f.unreadable)]  # fmt: skip
    if not partly:
        return ""
    streamed = any(f.entries is None for f in partly)
    how = f"a random sample (seed {seed})" if any(f.entries for f in partly) else ""
    first = "the first of each file, which has no random access" if streamed else ""
    return f"{done} entries: {' and '.join(x for x in (how, first) if x)}"


def _labels(tally: Tally, name: Namer) -> dict[str, dict[str, Any]]:
    n, found = len(tally.statistics), tally.statistics.labelled
    return {
        label: {
            "present": found[label],
            "missing": n - found[label],
            "keys": dict(tally.label_keys[label].most_common()),
            "first_missing": [
                name.place(file, frame)
                for file, frame in tally.missing[label][:EXAMPLES]
                if found[label]
            ],
        }
        for label in LABELS
    }


def _sizes(atoms: Any) -> dict[str, int]:
    if not len(atoms):
        return {}
    classes = np.floor(np.log2(atoms)).astype(int)
    counts = np.bincount(classes)
    return {
        f"{2**k}-{2 ** (k + 1) - 1}" if k else "1": int(counts[k])
        for k in range(int(classes.min()), len(counts))
    }


def _names(tally: Tally, name: Namer) -> dict[str, Any]:
    named, repeated, places = tally.named_twice()
    examples = [name(i) for i in places[:EXAMPLES]]
    return {"named": named, "repeated": repeated, "first_repeated": examples}


def _duplicates(tally: Tally, name: Namer) -> dict[str, Any]:
    same, differ = tally.statistics.duplicates()
    groups = tally.statistics.same_geometry()[:EXAMPLES]
    examples = [[name(int(i)) for i in members[:3]] for members in groups]
    return {"repeated": same, "different_energies": differ, "first": examples}


def _energy(files: Sequence[CheckedFile], tally: Tally, options: ReadOptions) -> dict[str, Any]:
    """Give the convention, and the evidence where the files leave it open."""
    convention = _common([f.facts.energy_convention for f in files if f.facts])
    per_atom = tally.statistics.column("energy per atom")
    total = np.abs(per_atom * tally.statistics.column("atoms"))
    total, per_atom = total[~np.isnan(total)], per_atom[~np.isnan(per_atom)]
    result: dict[str, Any] = {"convention": options.energy_convention or convention}
    if len(total):
        small = float((total <= ADSORPTION).mean())
        result["median_abs_energy"] = float(np.median(total))
        result["median_abs_energy_per_atom"] = float(np.median(np.abs(per_atom)))
        result["within_10_eV"] = small
        looks = "undecided"
        if small > 0.95 and np.median(np.abs(per_atom)) < 0.5:
            looks = "adsorption"
        elif np.median(per_atom) < -1.0 and small < 0.05:
            looks = "total"
        result["looks_like"] = looks
    return result


def _neighbors(tally: Tally) -> dict[str, Any] | None:
    counts = tally.neighbors()
    if tally.cutoff is None or not len(counts):
        return None
    low, middle, high = (float(f(counts)) for f in (np.min, np.median, np.max))
    mean = float((counts * tally.statistics.column("atoms")).sum())
    mean /= float(tally.statistics.column("atoms").sum())
    return {
        "cutoff": tally.cutoff,
        "per_atom": {"min": low, "median": middle, "max": high, "mean": mean},
        "isolated_atoms": tally.isolated,
    }


def _size_tables(files: Sequence[CheckedFile], tally: Tally, name: Namer) -> list[str]:
    """Compare the ``metadata.npz`` of every folder whose files are all here with what was read."""
    problems: list[str] = []
    for folder in dict.fromkeys(Path(file.path).parent for file in files):
        numbers = [i for i, file in enumerate(files) if Path(file.path).parent == folder]
        complete = all(files[i].entries is not None for i in numbers)
        if complete and (folder / SIZES_FILE).is_file() and _is_whole(folder, files, numbers):
            problems += _size_table(folder / SIZES_FILE, numbers, files, tally, name)
    return problems


def _is_whole(folder: Path, files: Sequence[CheckedFile], numbers: list[int]) -> bool:
    try:
        return folder_files(folder) == [Path(files[i].path) for i in numbers]
    except DataError:
        return False


def _size_table(
    table: Path, numbers: list[int], files: Sequence[CheckedFile], tally: Tally, name: Namer
) -> list[str]:
    lengths = [files[i].entries or 0 for i in numbers]
    try:
        stated, problems = read_sizes(table, sum(lengths))
    except DataError as error:
        return [str(error)]
    if stated is None:
        return problems
    starts = np.zeros(len(files), dtype=np.int64)
    starts[numbers] = np.cumsum(lengths) - lengths
    of_file, atoms = tally.statistics.files(), tally.statistics.column("atoms")
    here = np.flatnonzero(np.isin(of_file, numbers))
    claimed = stated[starts[of_file[here]] + tally.frames()[here]]
    wrong = np.flatnonzero(claimed != atoms[here])
    if not len(wrong):
        return []
    order = np.array_equal(np.sort(claimed), np.sort(atoms[here]))
    first = int(here[wrong[0]])
    return [
        f"{table}: natoms is wrong for {len(wrong)} of {len(here)} entries, for instance "
        f"{claimed[wrong[0]]} for {name(first)}, which has {atoms[first]:.0f} atoms "
        + ("(the same numbers in another order)" if order else "(edge counts?)")
    ]


def _warnings(report: CheckReport, tally: Tally) -> list[str]:
    s = tally.statistics
    n = len(s)
    found = suspicions(report.ranges, s)
    for label, facts in report.labels.items():
        if facts["present"] and facts["missing"]:
            found.append(f"{facts['missing']} of {n} structures have no {label}")
    if n and not s.labelled.total():
        hints = ", ".join(tally.hints) or "none"
        found.append(f"no structure has a label; numbers found under other keys: {hints}")
    if report.names["repeated"]:
        found.append(f"{report.names['repeated']} structures have the name (sid) of one before")
    if report.duplicates["different_energies"]:
        found.append(
            f"{report.duplicates['different_energies']} geometries occur more than once with "
            "different energies"
        )
    net = report.ranges.get("net force", {}).get("median", 0.0)
    if net > NET_FORCE:
        found.append(
            f"the forces of a structure do not cancel (median net force {net:.3g} eV/Å): "
            "written with constraints applied, or not of DFT?"
        )
    found += _open_questions(report)
    return found


def _open_questions(report: CheckReport) -> list[str]:
    """Say what the files leave open and which option settles it."""
    found: list[str] = []
    energy = report.energy
    if energy["convention"] == "unstated" and "looks_like" in energy:
        found.append(
            "the files do not say whether energies are adsorption or total "
            f"(median |E| {energy['median_abs_energy']:.4g} eV, "
            f"{energy['median_abs_energy_per_atom']:.3g} eV/atom: {energy['looks_like']}): "
            "state it with --energy-convention"
        )
    if report.relaxation_frame == "unstated":
        found.append(
            "IS2RE entries: positions of the first frame with the energy of the last; "
            "to train a potential choose one with --is2re initial or --is2re relaxed"
        )
    return found


def _common(values: list[str | None]) -> str | None:
    stated = set(values)
    return stated.pop() if len(stated) == 1 else "mixed" if stated else None
