"""``mlip relax``: parse, call ``relax_many``, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlip.cli import (
    DEFAULT_POTENTIAL,
    DeviceOption,
    DtypeOption,
    PotentialOption,
    ResumeOption,
    build_calculator,
    number,
    plain_warnings,
    progress_bar,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

    from mlip.simulation.relax_summary import RelaxRow

SHOWN = 40
STATUS_STYLES = {"converged": "green", "max_steps": "yellow", "diverged": "red", "error": "red"}


def relax(
    structures: Annotated[list[str], typer.Argument(help="Structure files; all frames are taken.")],
    potential: PotentialOption = DEFAULT_POTENTIAL,
    out: Annotated[
        Path | None, typer.Option(help="Result, extxyz. Default: FIRST-relaxed.extxyz.")
    ] = None,
    cell: Annotated[str, typer.Option(help="fixed, iso (volume), shape or full.")] = "fixed",
    pressure: Annotated[
        float, typer.Option(help="External pressure, GPa; with iso and full.", metavar="GPA")
    ] = 0.0,
    fmax: Annotated[float, typer.Option(help="Converged below this force, eV/Å.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Limit of optimiser steps.")] = 500,
    optimizer: Annotated[str, typer.Option(help="fire or lbfgs.")] = "fire",
    fix: Annotated[
        str | None,
        typer.Option(
            help="Hold atoms: numbers from 0 (0,4-9) or elements (Cu,O).", metavar="ATOMS"
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    resume: ResumeOption = False,
) -> None:
    """Relax structures: atoms, and the cell if wanted.

    Writes the final structures, and beside them a summary (.csv) and a record of the run (.json).
    Constraints in the files are kept. The exit code is 0 only if every structure converged.
    """
    from mlip.simulation.inputs import iter_structures
    from mlip.simulation.output import check_not_input
    from mlip.simulation.relax import RelaxSettings, relax_many

    settings = RelaxSettings(optimizer, cell, pressure, fmax, steps)
    first = Path(structures[0])
    output = out or first.with_name(f"{first.name.split('.')[0]}-relaxed.extxyz")
    check_not_input(output, structures)
    items = iter_structures(structures)
    calculator = build_calculator(potential, device, dtype)
    with plain_warnings(), progress_bar() as progress:
        task = progress.add_task("relax", total=None, note="")

        def on_structure(row: RelaxRow) -> None:
            progress.update(task, completed=row.index + 1, note=f"{row.name}: {row.status}")

        def on_step(step: int, energy: float, force: float) -> None:
            progress.update(task, note=f"step {step}  {energy:.4f} eV  {force:.4f} eV/Å")

        rows = relax_many(
            _fixed(items, fix) if fix else items,
            calculator,
            output,
            settings=settings,
            facts={"fix": fix},
            resume=resume,
            on_structure=on_structure,
            on_step=on_step,
        )
    _print(rows, output)
    raise typer.Exit(0 if all(row.status == "converged" for row in rows) else 1)


def _fixed(items: Iterator[Any], selection: str) -> Iterator[Any]:
    for name, atoms in items:
        yield name, atoms if isinstance(atoms, Exception) else _hold(atoms, selection)


def _hold(atoms: Atoms, selection: str) -> Atoms | Exception:
    """Add a constraint on chosen atoms to those that the structure has."""
    from ase.constraints import FixAtoms

    from mlip.errors import DataError

    chosen: set[int] = set()
    for part in selection.split(","):
        first, dash, last = part.strip().partition("-")
        if first.isdigit() and (not dash or last.isdigit()):
            chosen.update(range(int(first), int(last if dash else first) + 1))
        else:
            chosen.update(i for i, s in enumerate(atoms.symbols) if s == part.strip())
    if not chosen or max(chosen) >= len(atoms):
        return DataError(
            f"--fix {selection} names no atom, or one beyond the {len(atoms)} of the structure; "
            "give numbers from 0, ranges such as 4-9, or element symbols"
        )
    atoms.set_constraint([*atoms.constraints, FixAtoms(sorted(chosen))])
    return atoms


def _print(rows: list[RelaxRow], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("structure", overflow="fold")
    for header in ("atoms", "status", "energy\n(eV)", "max force\n(eV/Å)", "max stress\n(GPa)"):
        table.add_column(header, no_wrap=True)
    table.add_column("steps")
    bad = [row for row in rows if row.status != "converged"]
    shown = rows if len(rows) <= SHOWN else bad[:SHOWN]
    for row in shown:
        style = STATUS_STYLES[row.status]
        values = [number(row.energy), number(row.max_force), number(row.max_stress_GPa, 3)]
        status = f"[{style}]{row.status}[/{style}]"
        table.add_row(row.name, str(row.atoms), status, *values, str(row.steps))
    console = Console()
    console.print(table)
    for row in bad[:SHOWN]:
        console.print(f"{row.name}: {row.message}", markup=False, highlight=False)
    console.print(f"{len(rows) - len(bad)} of {len(rows)} converged; written to {output}")
