"""The command ``mlip convert-model``: an official EquiformerV3 checkpoint into a potential."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_model(
    checkpoint: Annotated[Path, typer.Argument(help="Official EquiformerV3 checkpoint (.pt).")],
    output: Annotated[Path, typer.Argument(help="Potential to write: NAME.safetensors.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of its training, if the checkpoint holds no configuration."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="ema (moving average: default if there) or raw.", metavar="KIND"),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="npz file of reference energies (coeff, by atomic number).")
    ] = None,
    elements: Annotated[
        str | None,
        typer.Option(help="Elements to keep, as 'Li,Fe,O'; default all it knows.", metavar="LIST"),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Keep the official errors for edges along y (to compare)."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Convert an official EquiformerV3 checkpoint; nothing in it is executed."""
    from mlip.errors import InputError
    from mlip.models.equiformer_v3_import import import_potential

    if output.suffix != ".safetensors":
        raise InputError(f"{output}: potentials are named NAME.safetensors")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists: choose another name, or replace it (--overwrite)")
    if weights not in (None, "ema", "raw"):
        raise InputError(f"--weights is {weights!r}; use ema or raw")
    potential = import_potential(
        checkpoint,
        config=config,
        weights=weights,  # type: ignore[arg-type]
        references=references,
        elements=_atomic_numbers(elements),
        published=published,
    )
    potential.save(output)
    card = potential.metadata
    count = sum(p.numel() for p in potential.parameters())
    typer.echo(
        f"{output}: {count} weights ({card['source']['weights']}), {len(potential.elements)} "
        f"elements, {potential.model.config.prediction} forces"  # type: ignore[union-attr]
    )
    if isinstance(card["normalizers"], str):
        typer.secho(f"warning: normalizers: {card['normalizers']}", fg="yellow", err=True)
    if not any(potential.reference_energies.values()):
        typer.secho(f"warning: energies are {card['energies']}", fg="yellow", err=True)


def _atomic_numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    from ase.data import atomic_numbers

    from mlip.errors import InputError

    symbols = text.replace(",", " ").split()
    if unknown := [symbol for symbol in symbols if atomic_numbers.get(symbol, 0) < 1]:
        raise InputError(f"--elements: {', '.join(unknown)}: not chemical symbols")
    if not symbols:
        raise InputError("--elements names no element")
    return [atomic_numbers[symbol] for symbol in symbols]
