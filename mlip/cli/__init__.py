"""Commands: one file each, with one function that parses, calls one function and prints.

Here are the options that several commands share. Nothing heavy is imported at the top of these
files, so that help is fast.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress

DEFAULT_POTENTIAL = "mlearn-facet"

PotentialOption = Annotated[
    str,
    typer.Option(
        "--potential", "-p", help="File of a potential, or name of a shipped one.", metavar="MODEL"
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Model arithmetic: float32 or float64.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on where a killed run with these settings stopped.")
]


def build_calculator(potential: str, device: str, dtype: str, *, tabulate: bool = False) -> Any:
    """Load a potential as calculator and print which one, where and in which precision."""
    from mlip.simulation.calculator import Calculator

    calculator = Calculator(potential, device=device, dtype=dtype, tabulate=tabulate)
    typer.echo(calculator.description, err=True)
    return calculator


def load_model(potential: str, device: str, dtype: str) -> Any:
    """Load a potential and print which one, where and in which precision."""
    from mlip.potential import load_potential
    from mlip.simulation.calculator import check_device

    check_device(device)
    model = load_potential(potential, device, dtype)
    typer.echo(
        f"potential {potential} (hash {model.model_hash()}), device {device}, dtype {dtype}"
        + ("" if model.conservative else ", direct forces (not conservative)"),
        err=True,
    )
    return model


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings on stderr as one line for the user, without file and line of the source."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        typer.secho(f"warning: {' '.join(str(message).split())}", fg="yellow", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def progress_bar() -> Progress:
    """Make a progress display on stderr: name, bar, counts, time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def number(value: float, digits: int = 4) -> str:
    """Format a number for a table; a missing one is a dash."""
    return "–" if value != value else f"{value:.{digits}f}"
