"""The command ``mlip check``: what is in data files and what is wrong with them, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlip.cli.conversion import (
    EnergyKeyOption,
    ForcesKeyOption,
    StressKeyOption,
    VirialKeyOption,
)


def check(
    data: Annotated[list[str], typer.Argument(help="Files, folders or patterns of any format")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write everything here (JSON)")
    ] = None,
    cutoff: Annotated[
        float | None, typer.Option(help="Also count neighbours within this distance, Å")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Check a random sample of this many entries (the first of streamed files)"
        ),
    ] = None,
    energy_convention: Annotated[
        str | None, typer.Option(help="What OC20 energies are: adsorption or total")
    ] = None,
    is2re: Annotated[
        str | None, typer.Option(help="Frame of IS2RE entries: initial or relaxed")
    ] = None,
    energy_key: EnergyKeyOption = None,
    forces_key: ForcesKeyOption = None,
    stress_key: StressKeyOption = None,
    virial_key: VirialKeyOption = None,
) -> None:
    """Report what data files hold; exit code 1 if an entry is bad, 2 if a file is unreadable."""
    from rich.console import Console

    from mlip.cli import progress_bar
    from mlip.datasets.check import check as run
    from mlip.datasets.labels import LabelKeys
    from mlip.datasets.options import ReadOptions
    from mlip.files import atomic_write

    keys = LabelKeys(energy_key, forces_key, stress_key, virial_key)
    options = ReadOptions(keys, energy_convention, is2re)  # type: ignore[arg-type]
    with progress_bar() as progress:
        task = progress.add_task("checking", total=None, note="")

        def show(done: int, total: int | None, bad: int) -> None:
            progress.update(task, completed=done, total=total, note=f"{bad} bad" if bad else "")

        report = run(data, options, cutoff=cutoff, limit=limit, on_entry=show)
    Console().print(report)
    if json_file is not None:
        with atomic_write(json_file, "w") as file:
            file.write(report.to_json())
    if not report.passed:
        raise typer.Exit(2 if report.unreadable else 1)
