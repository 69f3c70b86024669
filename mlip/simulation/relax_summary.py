"""Summary of many relaxations: one row a structure, kept as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RelaxRow:
    """One line of the summary of many relaxations; units as in ``RelaxResult``."""

    index: int
    name: str
    formula: str
    atoms: int
    status: str
    energy: float
    max_force: float
    max_stress_GPa: float
    steps: int
    message: str

    @classmethod
    def columns(cls) -> list[str]:
        """Name the columns in order."""
        return [field.name for field in fields(cls)]


def csv_line(values: Iterable[Any]) -> str:
    """Format one line of the file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def read_rows(path: Path) -> list[RelaxRow]:
    """Read the rows of a summary back."""
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            RelaxRow(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(RelaxRow)})
            for row in csv.DictReader(file)
        ]
