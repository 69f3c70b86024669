"""Lay out a conversion report on one terminal page with Rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mlip.datasets.report import SHOWN, ConversionReport
from mlip.datasets.structure import LABELS


def page(report: ConversionReport) -> Group:
    """Give the whole report as one renderable."""
    parts: list[RenderableType] = [
        f"[bold]{report.read} frames read, {report.kept} written, {report.dropped} dropped[/bold]"
        f"  → {escape(report.output)}",
        _inputs(report),
        _labels(report),
        ranges_table(report.ranges),
        f"units assumed: {report.units}",
        *([f"energies: {report.energy_convention}"] if report.energy_convention else []),
        "elements (frames / atoms): " + _join(report.elements, "{v[frames]} / {v[atoms]}"),
    ]
    if report.left_out:
        parts.append("left out on purpose: " + _join(report.left_out, "{v}"))
    if report.config_types:
        parts.append("config_type: " + _join(report.config_types, "{v}"))
    if report.not_kept:
        parts.append("not stored (frames): " + _join(report.not_kept, "{v}"))
    parts.append(f"exact duplicates: {report.duplicates}")
    parts += [f"overlap: {escape(pair)}: {n}" for pair, n in _first(report.overlaps.items())]
    parts.append(f"outliers: {len(report.outliers)}")
    parts += [f"  {escape(name)}: {why}" for name, why in _first(report.outliers.items())]
    if report.problems:
        parts.append("what could not be used first:")
        parts += [f"  {escape(problem)}" for problem in report.problems[:SHOWN]]
    parts += [f"[yellow]warning: {escape(text)}[/yellow]" for text in report.warnings]
    return Group(*parts)


def _inputs(report: ConversionReport) -> Table:
    table = Table("input", "read", "written", "dropped", box=None, pad_edge=False)
    for file in report.inputs[:SHOWN]:
        read = file.kept + len(file.dropped) + file.left_out
        counts = (read, file.kept, len(file.dropped))
        table.add_row(escape(file.path), *map(str, counts))
    if len(report.inputs) > SHOWN:
        table.add_row(f"... and {len(report.inputs) - SHOWN} more files")
    return table


def _labels(report: ConversionReport) -> Table:
    table = Table("label", "found under", "frames", box=None, pad_edge=False)
    for label in LABELS:
        keys = report.label_keys.get(label, {})
        for key, count in keys.items():
            table.add_row(label, escape(key), str(count))
        if not keys:
            table.add_row(label, "-", "0")
    return table


def ranges_table(ranges: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay out minimum, median, maximum and unit of each quantity."""
    table = Table("quantity", "min", "median", "max", "unit", box=None, pad_edge=False)
    for name, r in ranges.items():
        table.add_row(name, *(f"{r[x]:.5g}" for x in ("min", "median", "max")), r["unit"])
    return table


def _first(items: Iterable[Any]) -> list[Any]:
    return list(items)[:SHOWN]


def _join(counts: Mapping[str, Any], template: str) -> str:
    shown = [f"{escape(k)} {template.format(v=v)}" for k, v in _first(counts.items())]
    more = len(counts) - SHOWN
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown)
