"""The ``mlip`` command: finds the subcommands, and turns expected errors into one line.

A subcommand's file is imported only when that subcommand runs, so that help is fast.
"""

from __future__ import annotations

import importlib
import logging
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mlip import __version__
from mlip.errors import MlipError
from mlip.memory import keep_freed_memory

NOTICE_SECONDS = 1.0
COMMANDS = {
    "relax": "Relax structures: atoms, and the cell if wanted.",
    "md": "Run molecular dynamics on a structure.",
    "predict": "Predict energies, forces and stress of any number of structures.",
    "evaluate": "Compare a potential with labelled structures.",
    "train": "Train a potential.",
    "convert": "Convert data files of any known format to one data set, with a report.",
    "convert-model": "Convert an official EquiformerV3 or TDN checkpoint to a potential.",
    "check": "Report what a data set holds and what is wrong with it.",
    "data": "Merge, split, filter and index data sets; a demo of the data layer.",
    "bench": "Measure operators on this machine.",
    "info": "Show a potential's card, or versions and devices.",
    "demo": "Run the main job on what ships: relax, simulate, compare, train.",
}


class _LazyGroup(TyperGroup):
    """List commands from the table above; import one only when it is to run."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        loaded = ctx.meta.get("mlip.load") or ctx.resilient_parsing
        return _load(cmd_name) if loaded else TyperCommand(cmd_name, help=COMMANDS[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta["mlip.load"] = True
        self.commands = {name: TyperCommand(name) for name in COMMANDS}  # to suggest
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MlipError as error:
            typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(2) from None


def _load(name: str) -> Any:
    module = name.replace("-", "_")
    function = getattr(importlib.import_module(f"mlip.cli.{module}"), module)
    if isinstance(function, typer.Typer):  # a command with commands of its own
        return typer.main.get_command(function)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help=function.__doc__ or COMMANDS[name])(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Machine-learning interatomic potentials: train them, relax crystals, run dynamics.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlip {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


class _Notices(logging.Handler):
    """Tell which kernels were compiled, or read from a slow disk: why a command paused."""

    def emit(self, record: logging.LogRecord) -> None:
        seconds = getattr(record, "seconds", 0.0)
        if seconds > NOTICE_SECONDS:
            name = record.getMessage().split(":")[0]
            text = f"{seconds:.0f} s to make ready (compiled once, kept on disk): {name}"
            typer.secho(text, dim=True, err=True)


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    logger = logging.getLogger("mlip")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Notices())
    app()
