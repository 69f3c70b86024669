"""The command ``mlip train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    source: Annotated[
        Path | None, typer.Argument(help="Labelled structures, or settings (.yaml).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="With --resume: only write its best potential so far.")
    ] = False,
) -> None:
    """Train a potential on labelled structures."""
    from mlip.errors import InputError
    from mlip.training import run
    from mlip.training.config import build_config, load_config

    if (source is None) == (resume is None):
        raise InputError("give either data (or a configuration file), or --resume FOLDER")
    if finish and resume is None:
        raise InputError("--finish goes with --resume FOLDER")
    if resume is not None:
        if settings or out is not None:
            raise InputError("--resume continues a run with its own settings: drop --set and --out")
        run.resume(resume, finish=finish)
        return
    assert source is not None
    overrides = [*(settings or []), *([f"out={out}"] if out is not None else [])]
    if source.suffix in (".yaml", ".yml"):
        config = load_config(source, overrides)
    else:
        config = build_config({"data": {"train": str(source)}}, overrides)
    run.train(config)
