"""The commands ``mlip data ...``: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Work on data sets.",
)


@data.callback()
def _group() -> None:
    """Keep the name of a command necessary, also while there is one."""


@data.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo makes.")] = Path("data-demo"),
) -> None:
    """Make slabs with adsorbates labelled by EMT, check, convert and split them, train, test.

    A tutorial of about two minutes that needs no network. If it is interrupted, the same command
    goes on with it.
    """
    from mlip.demo.data_set import run_data_demo

    run_data_demo(out)
