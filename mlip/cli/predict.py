"""``mlip predict``: parse, call ``predict``, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlip.cli import (
    DEFAULT_POTENTIAL,
    DeviceOption,
    DtypeOption,
    PotentialOption,
    ResumeOption,
    load_model,
    progress_bar,
)


def predict(
    inputs: Annotated[list[str], typer.Argument(help="Structure files or native stores.")],
    out: Annotated[Path, typer.Argument(help="Result, extxyz.")],
    potential: PotentialOption = DEFAULT_POTENTIAL,
    max_edges: Annotated[
        int, typer.Option(help="Neighbour pairs in one batch: lower it if memory is short.")
    ] = 20_000,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    resume: ResumeOption = False,
) -> None:
    """Predict energies, forces and stress of any number of structures.

    Structures that fail are named in OUT.errors.csv and do not stop the others. The exit code is 0
    only if none failed.
    """
    from mlip.simulation.predict import predict as run

    model = load_model(potential, device, dtype)
    with progress_bar() as progress:
        task = progress.add_task("predict", total=None, note="")

        def on_progress(done: int, failed: int) -> None:
            progress.update(task, completed=done, note=f"{failed} failed" if failed else "")

        summary = run(
            inputs, out, model, max_edges=max_edges, resume=resume, on_progress=on_progress
        )
    typer.echo(f"{summary.structures - summary.failed} structures predicted: {out}")
    if summary.failed:
        typer.echo(f"{summary.failed} failed, see {summary.errors_file}", err=True)
    raise typer.Exit(1 if summary.failed else 0)
