"""``mlip evaluate``: parse, call ``evaluate``, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlip.cli import (
    DEFAULT_POTENTIAL,
    DeviceOption,
    DtypeOption,
    PotentialOption,
    load_model,
    number,
    progress_bar,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from mlip.simulation.evaluate import Errors, EvaluationReport


def evaluate(
    data: Annotated[list[str], typer.Argument(help="Labelled structures: files or stores.")],
    potential: PotentialOption = DEFAULT_POTENTIAL,
    out: Annotated[
        Path, typer.Option(help="Folder of report.json, worst.extxyz and parity.png.")
    ] = Path("evaluation"),
    config_key: Annotated[
        str, typer.Option(help="Key of the configuration type in the files.")
    ] = "config_type",
    plots: Annotated[bool, typer.Option(help="Draw parity.png.")] = True,
    max_edges: Annotated[
        int, typer.Option(help="Neighbour pairs in one batch: lower it if memory is short.")
    ] = 20_000,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Compare a potential with labelled structures.

    Prints errors overall, by configuration type and by element, and writes them with the 20 worst
    frames and parity plots. The exit code is 0 only if every frame was predicted.
    """
    from rich.console import Console

    from mlip.simulation.evaluate import evaluate as run

    model = load_model(potential, device, dtype)
    with progress_bar() as progress:
        task = progress.add_task("evaluate", total=None, note="")
        report = run(
            data,
            model,
            out=out,
            max_edges=max_edges,
            plots=plots,
            config_key=config_key,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    console = Console()
    console.print(_errors_table(report))
    console.print(_elements_table(report))
    console.print(f"{report.structures} frames ({report.unlabelled} without labels); see {out}")
    for name, reason in report.failed[:10]:
        typer.echo(f"failed: {name}: {reason}", err=True)
    if len(report.failed) > 10:
        typer.echo(f"… {len(report.failed)} frames failed, see {out}/report.json", err=True)
    raise typer.Exit(0 if report.ok else 1)


def _errors_table(report: EvaluationReport) -> Table:
    from rich.table import Table

    table = Table("configuration", "frames", title="MAE / RMSE", box=None)
    for header in ("energy (meV/atom)", "force (meV/Å)", "stress (GPa)"):
        table.add_column(header, justify="right")
    kinds: dict[str, Mapping[str, Errors]] = {"all": report.overall}
    if len(report.configurations) > 1:
        kinds.update(sorted(report.configurations.items()))
    for kind, errors in kinds.items():
        table.add_row(
            kind,
            str(errors["energy"].count or "–"),
            _pair(errors["energy"], 1000, 1),
            _pair(errors["forces"], 1000, 1),
            _pair(errors["stress"], 1, 3),
        )
    return table


def _elements_table(report: EvaluationReport) -> Table:
    from rich.table import Table

    table = Table("element", "force MAE / RMSE (meV/Å)", "components", box=None)
    for symbol, errors in sorted(report.elements.items()):
        table.add_row(symbol, _pair(errors, 1000, 1), str(errors.count))
    return table


def _pair(errors: Errors, factor: float, digits: int) -> str:
    return f"{number(factor * errors.mae, digits)} / {number(factor * errors.rmse, digits)}"
