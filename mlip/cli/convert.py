"""The command ``mlip convert``: data files of any known format into one store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    inputs: Annotated[
        list[str], typer.Argument(help="Files or patterns: extxyz(.xz), traj, db, OUTCAR, ...")
    ],
    output: Annotated[Path, typer.Argument(help="NAME.lmdb (store) or NAME.extxyz (text)")],
    energy_key: Annotated[str | None, typer.Option(help="Key of the total energy, eV")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Key of the forces, eV/Å")] = None,
    stress_key: Annotated[
        str | None, typer.Option(help="Key of the stress, eV/Å³, tension positive")
    ] = None,
    virial_key: Annotated[str | None, typer.Option(help="Key of the virial, eV")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write the report here (JSON)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output")] = False,
    allow_unlabelled: Annotated[
        bool, typer.Option("--allow-unlabelled", help="Accept data without any label")
    ] = False,
) -> None:
    """Convert data files into one store and print a report; exit code 1 if frames were dropped."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from mlip.datasets.convert import convert as run
    from mlip.datasets.labels import LabelKeys
    from mlip.files import atomic_write

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")

        def show(path: Path, read: int, dropped: int) -> None:
            progress.update(task, description=f"{path.name}: {read} frames, {dropped} dropped")

        result = run(
            inputs,
            output,
            keys=LabelKeys(energy_key, forces_key, stress_key, virial_key),
            resume=resume,
            overwrite=overwrite,
            allow_unlabelled=allow_unlabelled,
            on_frame=show,
        )
    Console().print(result)
    if report is not None:
        with atomic_write(report, "w") as file:
            file.write(result.to_json())
    if result.dropped:
        raise typer.Exit(1)
