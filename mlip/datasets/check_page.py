"""Lay out the report of a check on one terminal page with Rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mlip.datasets.check_report import CheckReport
from mlip.datasets.report_page import ranges_table

SHOWN = 4  # files, bad entries, outliers and further things that are named on the page
ELEMENTS = 12
KINDS = 6
FIELDS = 20


def page(report: CheckReport) -> Group:
    """Give the whole report as one renderable of some fifty lines."""
    parts: list[RenderableType] = [_verdict(report)]
    if report.sample:
        parts.append(f"[yellow]checked {escape(report.sample)}[/yellow]")
    parts += [_files(report), _labels(report), ranges_table(report.ranges)]
    parts += [f"[bold]{name}[/bold]: {escape(text)}" for name, text in _facts(report) if text]
    parts += _listed("red", "unreadable", report.unreadable, len(report.unreadable))
    parts += _listed("red", "bad entry", report.bad_entries, report.bad)
    parts += _listed("red", "problem", report.problems, len(report.problems))
    parts += _listed("yellow", "warning", report.warnings, len(report.warnings), 8)
    return Group(*parts)


def _verdict(report: CheckReport) -> str:
    counts = (
        (len(report.unreadable), "unreadable file", "unreadable files"),
        (report.bad, "bad entry", "bad entries"),
        (len(report.problems), "problem", "problems"),
    )
    wrong = [_count(*count) for count in counts if count[0]]
    colour, verdict = ("green", "nothing wrong") if report.passed else ("red", ", ".join(wrong))
    text = f"{_count(report.checked, 'entry', 'entries')} in {_count(len(report.files), 'file')}"
    if report.warnings:
        verdict += f", {_count(len(report.warnings), 'warning')}"
    return f"[bold {colour}]{text}: {verdict}[/bold {colour}]"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _files(report: CheckReport) -> Table:
    table = Table("file", "format", "MB", "entries", "bad", box=None, pad_edge=False)
    worst = sorted(report.files, key=lambda f: (f.unreadable is None, -f.bad))
    chosen = report.files if len(report.files) <= SHOWN else worst[:SHOWN]
    for file in chosen:
        entries = "-" if file.unreadable else str(file.entries or file.checked)
        row = (_end(file.path), file.format.split(" (")[0], f"{file.bytes / 1e6:.3g}", entries)
        table.add_row(*map(escape, row), str(file.bad))
    rest = len(report.files) - len(chosen)
    if rest:
        table.add_row(f"and {rest} more files", *_formats(report))
    return table


def _formats(report: CheckReport) -> tuple[str, str, str]:
    size = sum(file.bytes for file in report.files) / 1e6
    return f"{len({f.format for f in report.files})} format(s)", f"{size:.3g} in all", ""


def _labels(report: CheckReport) -> Table:
    table = Table("label", "found under", "with", "without", box=None, pad_edge=False)
    for label, facts in report.labels.items():
        keys = ", ".join(f"{k}" for k in list(facts["keys"])[:3]) or "-"
        table.add_row(label, escape(keys), str(facts["present"]), str(facts["missing"]))
    return table


def _facts(report: CheckReport) -> Iterator[tuple[str, str]]:
    """Give name and text of everything that fits a line."""
    yield "units assumed", report.units
    elements = {k: v["structures"] for k, v in report.elements.items()}
    yield f"{len(elements)} elements (structures)", _join(elements, ELEMENTS)
    yield "sizes (atoms: structures)", _join(report.sizes, 12, ": ")
    yield "periodic", _join(report.pbc)
    yield "also there", _optional(report) or "no tags, fixed atoms, charge or spin"
    yield "stored fields", _join(next((f.fields for f in report.files if f.fields), {}), FIELDS)
    yield "extras", _join(report.extras, 8)
    yield "not kept", _join(report.not_kept)
    names = report.names
    yield "names (sid)", f"{names['named']}, {names['repeated']} repeated" if names["named"] else ""
    yield (
        "same geometry",
        (
            f"{report.duplicates['repeated']} repeated, "
            f"{report.duplicates['different_energies']} with different energies"
        ),
    )
    yield "energy", _energy(report.energy)
    yield "IS2RE frame", report.relaxation_frame or ""
    if report.neighbors:
        per_atom = report.neighbors["per_atom"]
        text = (
            f"{per_atom['mean']:.1f} an atom ({per_atom['min']:.1f} to {per_atom['max']:.1f} by "
            f"structure), {report.neighbors['isolated_atoms']} isolated atoms"
        )
        yield f"neighbours within {report.neighbors['cutoff']:g} Å", text
    outliers = [f"{_end(name)}: {why}" for name, why in list(report.outliers.items())[:SHOWN]]
    yield f"{len(report.outliers)} outliers", "; ".join(outliers) or "-"


def _optional(report: CheckReport) -> str:
    texts = []
    for name, count in report.present.items():
        values = report.values[name]
        if name == "fixed":
            kinds = f"{values.get('True', 0)} atoms"
        else:
            unit = " atoms" if name == "tags" else ""
            kinds = _join(values, KINDS, ": ") + unit
        texts.append(f"{name} in {count} ({kinds})")
    return "; ".join(texts)


def _energy(energy: Mapping[str, Any]) -> str:
    if "median_abs_energy" not in energy:
        return ""
    convention = energy["convention"] or "total (by the format)"
    return (
        f"{convention}; median |E| {energy['median_abs_energy']:.4g} eV, "
        f"{energy['median_abs_energy_per_atom']:.3g} eV/atom, "
        f"{100 * energy['within_10_eV']:.0f} % within 10 eV; looks like: {energy['looks_like']}"
    )


def _listed(
    colour: str, name: str, texts: list[str], count: int, shown: int = SHOWN
) -> list[RenderableType]:
    lines = [f"[{colour}]{name}[/{colour}]: {escape(text)}" for text in texts[:shown]]
    if count > shown:
        lines.append(f"[{colour}]{name}[/{colour}]: and {count - shown} more")
    return list(lines)


def _join(counts: Mapping[str, Any], shown: int = 8, between: str = " ") -> str:
    texts = [f"{name}{between}{count}" for name, count in list(counts.items())[:shown]]
    more = len(counts) - shown
    return ", ".join([*texts, f"and {more} more"] if more > 0 else texts)


def _end(path: str, parts: int = 2) -> str:
    """Give the last parts of a path, enough to know the file."""
    return "/".join(path.split("/")[-parts:])
