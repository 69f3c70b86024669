"""``mlip md``: parse, call ``run_md``, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlip.cli import (
    DEFAULT_POTENTIAL,
    DeviceOption,
    DtypeOption,
    PotentialOption,
    ResumeOption,
    build_calculator,
    number,
    plain_warnings,
    progress_bar,
)

if TYPE_CHECKING:
    from ase import Atoms

    from mlip.simulation.md import MDResult, MDRow


OutOption = Annotated[
    Path | None,
    typer.Option(help="Prefix of the files written. Default: STRUCTURE-md.", metavar="PREFIX"),
]
EnsembleOption = Annotated[str, typer.Option(help="nve, nvt-langevin, nvt-bussi or npt.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="K; also of velocities drawn if the structure has none.", metavar="K"),
]
TimestepOption = Annotated[float, typer.Option(help="Time step, fs.", metavar="FS")]
StepsOption = Annotated[int | None, typer.Option(help="Length of the whole run in steps.")]
TimeOption = Annotated[float | None, typer.Option(help="Length of the whole run.", metavar="PS")]
PressureOption = Annotated[float, typer.Option(help="External pressure; npt only.", metavar="GPA")]
CellOption = Annotated[str, typer.Option(help="npt only: iso (volume) or full (shape too).")]
ThermostatOption = Annotated[
    float,
    typer.Option(help="Time constant; its inverse is the friction of Langevin.", metavar="FS"),
]
BarostatOption = Annotated[float, typer.Option(help="Time constant, npt only.", metavar="FS")]
RepeatOption = Annotated[
    tuple[int, int, int], typer.Option(help="Repeat the cell along its vectors.")
]
IntervalOption = Annotated[int, typer.Option(help="Steps between trajectory frames.")]
LogIntervalOption = Annotated[int, typer.Option(help="Steps between lines of the log.")]
CheckpointIntervalOption = Annotated[int, typer.Option(help="Steps between checkpoints.")]
TabulateOption = Annotated[
    bool, typer.Option("--tabulate", help="EquiformerV3: splines for its radial networks.")
]
SeedOption = Annotated[int, typer.Option(help="Of velocities and random forces.")]


def md(
    structure: Annotated[str, typer.Argument(help="Structure file; its last frame is taken.")],
    potential: PotentialOption = DEFAULT_POTENTIAL,
    out: OutOption = None,
    ensemble: EnsembleOption = "nve",
    temperature: TemperatureOption = None,
    timestep: TimestepOption = 1.0,
    steps: StepsOption = None,
    time: TimeOption = None,
    pressure: PressureOption = 0.0,
    cell: CellOption = "iso",
    thermostat: ThermostatOption = 100.0,
    barostat: BarostatOption = 1000.0,
    repeat: RepeatOption = (1, 1, 1),
    interval: IntervalOption = 100,
    log_interval: LogIntervalOption = 10,
    checkpoint_interval: CheckpointIntervalOption = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    tabulate: TabulateOption = False,
    resume: ResumeOption = False,
) -> None:
    """Run molecular dynamics on a structure.

    Writes PREFIX.extxyz (trajectory), PREFIX.csv (log) and PREFIX.checkpoint. With --resume it goes
    on from the checkpoint, bit for bit, up to the same total length or a longer one. The exit code
    is 0 only if the run reached its end.
    """
    from mlip.simulation.md import run_md

    prefix = out or Path(structure).with_name(f"{Path(structure).name.split('.')[0]}-md")
    trajectory, log, checkpoint = (
        prefix.with_name(prefix.name + ending) for ending in (".extxyz", ".csv", ".checkpoint")
    )
    if not resume:
        _refuse_to_replace((trajectory, log, checkpoint))
    atoms = _read(structure, repeat)
    calculator = build_calculator(potential, device, dtype, tabulate=tabulate)
    with plain_warnings(), progress_bar() as progress:
        total = steps if time is None else round(1000 * time / timestep)
        task = progress.add_task(ensemble, total=total, note="")

        def on_log(row: MDRow) -> None:
            note = f"{row.time_ps:.3f} ps  {row.temperature_K:.0f} K  {row.total_eV:.4f} eV"
            progress.update(task, completed=row.step, note=note)

        result = run_md(
            atoms,
            calculator,
            ensemble=ensemble,
            temperature_K=temperature,
            timestep_fs=timestep,
            steps=steps,
            time_ps=time,
            pressure_GPa=pressure,
            cell=cell,
            thermostat_fs=thermostat,
            barostat_fs=barostat,
            seed=seed,
            trajectory=trajectory,
            log=log,
            checkpoint=checkpoint,
            trajectory_interval=interval,
            log_interval=log_interval,
            checkpoint_interval=checkpoint_interval,
            resume=resume,
            on_log=on_log,
        )
    if tabulate:
        typer.echo(calculator.potential.model.table_report, err=True)
    _print(result, trajectory)
    raise typer.Exit(0 if result.status == "completed" else 1)


def _refuse_to_replace(files: tuple[Path, ...]) -> None:
    from mlip.errors import InputError

    for file in files:
        if file.exists():
            raise InputError(
                f"{file} exists: go on with --resume, choose another --out, or delete it"
            )


def _read(structure: str, repeat: tuple[int, int, int]) -> Atoms:
    from mlip.errors import InputError
    from mlip.simulation.inputs import iter_structures

    name, atoms = "", None
    for name, atoms in iter_structures(structure):  # noqa: B007  the last one is wanted
        pass
    if atoms is None or isinstance(atoms, Exception):
        raise atoms or InputError(f"{structure}: there are no structures in this file")
    if min(repeat) < 1:
        raise InputError(f"--repeat is {repeat}; give three numbers of 1 or more")
    return atoms.repeat(repeat)


def _print(result: MDResult, trajectory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    half = result.temperatures[len(result.rows) // 2 :]
    table.add_row("status", f"{result.status} {result.message}".strip())
    table.add_row("steps", str(result.steps))
    if not result.conservative:
        table.add_row("forces", "direct, not derivatives of the energy")
    if len(half):
        table.add_row("temperature, second half", f"{half.mean():.1f} ± {half.std():.1f} K")
    drift = number(result.drift_meV_per_atom_per_ps, 6)
    table.add_row("drift of the conserved energy", f"{drift} meV/atom/ps")
    table.add_row("trajectory", str(trajectory))
    Console().print(table)
