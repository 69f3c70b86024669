"""What the commands on data sets share: options, progress, report and exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlip.datasets.report import ConversionReport

WorkersOption = Annotated[
    int, typer.Option(help="Processes that read and check beside this one", metavar="N")
]
ShardSizeOption = Annotated[
    int | None,
    typer.Option(help="Write a folder of files with this many structures each", metavar="N"),
]
ReportOption = Annotated[Path | None, typer.Option(help="Also write the report here (JSON)")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output")]
EnergyConventionOption = Annotated[
    str | None,
    typer.Option(help="What the energies of OC20 files are: adsorption or total", metavar="KIND"),
]
EnergyKeyOption = Annotated[str | None, typer.Option(help="Key of the total energy, eV")]
ForcesKeyOption = Annotated[str | None, typer.Option(help="Key of the forces, eV/Å")]
StressKeyOption = Annotated[
    str | None, typer.Option(help="Key of the stress, eV/Å³, tension positive")
]
VirialKeyOption = Annotated[str | None, typer.Option(help="Key of the virial, eV")]


def run_conversion(
    convert: Callable[..., ConversionReport], *arguments: Any, report: Path | None, **options: Any
) -> None:
    """Run a conversion with a progress line, print its report, and exit with 1 if data were bad.

    Args:
        convert: function that takes ``on_frames`` beside what follows, and gives a report.
        arguments: its arguments.
        report: file for the report as JSON.
        options: its keyword arguments.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from mlip.files import atomic_write

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("reading")

        def show(path: Path, read: int, dropped: int) -> None:
            progress.update(task, description=f"{path.name}: {read} frames, {dropped} dropped")

        result = convert(*arguments, on_frames=show, **options)
    Console().print(result)
    if report is not None:
        with atomic_write(report, "w") as file:
            file.write(result.to_json())
    if result.dropped or result.damaged:
        raise typer.Exit(1)
