"""The commands ``mlip data ...``: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlip.cli.conversion import (
    EnergyConventionOption,
    OverwriteOption,
    ReportOption,
    ResumeOption,
    ShardSizeOption,
    WorkersOption,
    run_conversion,
)

data = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Merge, split, subset, filter and index data sets; a demo of the data layer.",
)

Inputs = Annotated[list[str], typer.Argument(help="Files, folders or patterns")]
Target = Annotated[
    Path, typer.Argument(help="NAME.lmdb, NAME.aselmdb, NAME.extxyz, or a folder of shards")
]
Seed = Annotated[int, typer.Option(help="Seed of the draw")]


def _options(energy_convention: str | None) -> Any:
    from mlip.datasets.options import ReadOptions

    return ReadOptions(energy_convention=energy_convention)  # type: ignore[arg-type]


@data.command()
def merge(
    inputs: Inputs,
    output: Target,
    energy_convention: EnergyConventionOption = None,
    workers: WorkersOption = 0,
    shard_size: ShardSizeOption = None,
    report: ReportOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write several data sets one after the other into one."""
    from mlip.datasets import transform

    run_conversion(
        transform.merge, inputs, output, report=report, options=_options(energy_convention),
        workers=workers, shard_size=shard_size, resume=resume, overwrite=overwrite,
    )  # fmt: skip


@data.command()
def split(
    inputs: Inputs,
    folder: Annotated[Path, typer.Argument(help="Folder for train.lmdb, valid.lmdb, test.lmdb")],
    fractions: Annotated[str, typer.Option(help="Share of each part")] = "0.8,0.1,0.1",
    by: Annotated[
        str,
        typer.Option(help="What stays together: geometry, composition, or an info key (sid, ...)"),
    ] = "geometry",
    stratify: Annotated[
        str | None, typer.Option(help="Spread in proportion: composition, or an info key")
    ] = None,
    seed: Seed = 0,
    suffix: Annotated[str, typer.Option(help="Kind of the outputs")] = ".lmdb",
    energy_convention: EnergyConventionOption = None,
    workers: WorkersOption = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Split data sets into parts that share no geometry, composition or other group."""
    from mlip.datasets import transform

    reports = transform.split(
        inputs, folder, _numbers(fractions), by=by, stratify=stratify, seed=seed, suffix=suffix,
        options=_options(energy_convention), workers=workers, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    if not reports:
        typer.echo(f"all parts in {folder} were finished before")
    for name, report in reports.items():
        typer.echo(f"{name}: {report.kept} structures in {report.output}")
    dropped = sum(report.dropped for report in reports.values())
    if dropped:
        typer.echo(f"{dropped} bad frames were left out: look at them with  mlip check")
        raise typer.Exit(1)


@data.command()
def subset(
    inputs: Inputs,
    output: Target,
    number: Annotated[int | None, typer.Option(help="How many frames to draw")] = None,
    fraction: Annotated[float | None, typer.Option(help="Which share of them to draw")] = None,
    indices: Annotated[
        Path | None, typer.Option(help="File with frame numbers, counted from 0")
    ] = None,
    seed: Seed = 0,
    energy_convention: EnergyConventionOption = None,
    workers: WorkersOption = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Take some frames, drawn at random or listed in a file."""
    from mlip.datasets import transform

    run_conversion(
        transform.subset, inputs, output, report=None, number=number, fraction=fraction,
        indices=None if indices is None else _read_indices(indices), seed=seed,
        options=_options(energy_convention), workers=workers, resume=resume, overwrite=overwrite,
    )  # fmt: skip


@data.command(name="filter")
def filter_command(
    inputs: Inputs,
    output: Target,
    elements: Annotated[str, typer.Option(help="Only these, for instance Cu,O,H")] = "",
    max_atoms: Annotated[int | None, typer.Option(help="Largest number of atoms")] = None,
    max_forces: Annotated[float | None, typer.Option(help="Largest force, eV/Å")] = None,
    min_distance: Annotated[float | None, typer.Option(help="Smallest distance, Å")] = None,
    has: Annotated[str, typer.Option(help="Labels that must be there: energy,forces,stress")] = "",
    where: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of info; may be repeated")
    ] = None,
    energy_convention: EnergyConventionOption = None,
    workers: WorkersOption = 0,
    report: ReportOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Keep the structures that meet all criteria; the report counts why others were left out."""
    from mlip.datasets import transform

    criteria = transform.Criteria(
        elements=_words(elements), max_atoms=max_atoms, max_forces=max_forces,
        min_distance=min_distance, has=_words(has), where=tuple(map(_pair, where or [])),
    )  # fmt: skip
    run_conversion(
        transform.filter_structures, inputs, output, criteria, report=report,
        options=_options(energy_convention), workers=workers, resume=resume, overwrite=overwrite,
    )  # fmt: skip


@data.command()
def index(
    inputs: Inputs,
    cutoff: Annotated[float, typer.Option(help="Neighbour cutoff, Å")],
    workers: WorkersOption = 0,
) -> None:
    """Count atoms and edges of every structure once and keep the counts beside the data."""
    from rich.console import Console
    from rich.progress import Progress

    from mlip.datasets import open_dataset
    from mlip.datasets.sizes import count_atoms, count_edges

    dataset = open_dataset(inputs)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("counting edges", total=len(dataset))

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        edges = count_edges(dataset, cutoff, show, workers)
    atoms = count_atoms(dataset)
    typer.echo(
        f"{len(dataset)} structures, {int(atoms.sum(dtype=int))} atoms (at most {atoms.max()} in "
        f"one), {int(edges.sum(dtype=int))} edges within {cutoff:g} Å (at most {edges.max()})"
    )


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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> list[float]:
    from mlip.errors import InputError

    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise InputError(f"fractions {text!r}: expected numbers such as 0.8,0.1,0.1") from None


def _pair(text: str) -> tuple[str, str]:
    from mlip.errors import InputError

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"--where {text!r}: expected KEY=VALUE")
    return key, value


def _read_indices(path: Path) -> list[int]:
    from mlip.errors import DataError

    try:
        return [int(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected whole numbers, one a line ({error})") from None
