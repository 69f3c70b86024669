"""The command ``mlip convert-model``: a checkpoint of an official code into a potential."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlip.potential import Potential

Options = dict[str, Any]
V3, TDN = "Only for EquiformerV3", "Only for TDN"  # headings in the help


def convert_model(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of the official EquiformerV3 (.pt) or TDN (.pth).")
    ],
    output: Annotated[Path, typer.Argument(help="Potential to write: NAME.safetensors.")],
    elements: Annotated[
        str | None,
        typer.Option(help="Elements to keep, as 'Li,Fe,O'; default all it knows.", metavar="LIST"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of its training, if the checkpoint holds no configuration.",
            rich_help_panel=V3,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="ema (moving average: default if there) or raw.",
            metavar="KIND",
            rich_help_panel=V3,
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="npz file of reference energies (coeff, by atomic number).", rich_help_panel=V3
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Keep the official errors for edges along y (to compare).",
            rich_help_panel=V3,
        ),
    ] = False,
    cutoff: Annotated[
        float | None, typer.Option(help="Its cutoff, Å; default 4.5.", rich_help_panel=TDN)
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            help="PubChemQCR-S (default) or PubChemQCR: sets constants of the official code.",
            metavar="SET",
            rich_help_panel=TDN,
        ),
    ] = None,
    factors: Annotated[
        Path | None,
        typer.Option(
            help="File of the factors it was trained with, if the checkpoint holds none.",
            rich_help_panel=TDN,
        ),
    ] = None,
    gradient: Annotated[
        bool,
        typer.Option(
            "--gradient",
            help="Forces as derivatives of the energy, not of the force head.",
            rich_help_panel=TDN,
        ),
    ] = False,
) -> None:
    """Convert an official EquiformerV3 or TDN checkpoint; nothing in it is executed."""
    from mlip.errors import InputError
    from mlip.models.official_files import read_checkpoint_file, recognise

    if output.suffix != ".safetensors":
        raise InputError(f"{output}: potentials are named NAME.safetensors")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists: choose another name, or replace it (--overwrite)")
    if weights not in (None, "ema", "raw"):
        raise InputError(f"--weights is {weights!r}; use ema or raw")
    of_v3: Options = {
        "config": config,
        "weights": weights,
        "references": references,
        "published": published,
    }
    of_tdn: Options = {
        "cutoff": cutoff,
        "trained_on": trained_on,
        "factors": factors,
        "gradient": gradient,
    }
    convert: Any
    content = read_checkpoint_file(checkpoint)
    if recognise(content, checkpoint) == "tdn":
        from mlip.models.tdn_import import import_tdn as convert

        own, foreign = of_tdn, of_v3
    else:
        from mlip.models.equiformer_v3_import import import_potential as convert

        own, foreign = of_v3, of_tdn
    if misplaced := _given(foreign):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in misplaced)
        raise InputError(f"{checkpoint}: its architecture has no use for {flags}")
    kept = _atomic_numbers(elements)
    potential = convert(checkpoint, content=content, elements=kept, **_given(own))
    potential.save(output)
    _report(potential, output)


def _given(options: Options) -> Options:
    return {k: value for k, value in options.items() if value is not None and value is not False}


def _report(potential: Potential, output: Path) -> None:
    """Say what was written, and warn of what its numbers are not."""
    card = potential.metadata
    count = sum(p.numel() for p in potential.parameters())
    typer.echo(
        f"{output}: {count} weights ({card['source']['weights']}), {len(potential.elements)} "
        f"elements, {potential.model.config.prediction} forces"  # type: ignore[union-attr]
    )
    if isinstance(card.get("normalizers"), str):
        typer.secho(f"warning: normalizers: {card['normalizers']}", fg="yellow", err=True)
    if "assumed" in card:
        typer.secho(f"assumed: {card['assumed']}", err=True)
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
