"""``mlip demo``: parse, call ``run_demo``, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlip.cli import DEFAULT_POTENTIAL, PotentialOption


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo makes.")] = Path(
        "demo-output"
    ),
    potential: PotentialOption = DEFAULT_POTENTIAL,
    quick: Annotated[bool, typer.Option("--quick", help="Do a small part of everything.")] = False,
) -> None:
    """Run the main job on what ships: relax, simulate, compare with DFT, train.

    Takes a few minutes on two cores. The folder gets trajectories (extxyz), plots (PNG) and a
    summary; if an earlier demo made it, it is emptied first. The exit code is 0 only if all went
    well.
    """
    from mlip.demo.run import run_demo

    values = run_demo(out, potential, quick=quick)
    raise typer.Exit(1 if values["problems"] else 0)
