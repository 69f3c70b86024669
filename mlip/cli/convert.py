"""The command ``mlip convert``: data files of any known format into one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlip.cli.conversion import (
    EnergyConventionOption,
    EnergyKeyOption,
    ForcesKeyOption,
    OverwriteOption,
    ReportOption,
    ResumeOption,
    ShardSizeOption,
    StressKeyOption,
    VirialKeyOption,
    WorkersOption,
    run_conversion,
)


def convert(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or patterns: OC20 .lmdb, .aselmdb, extxyz(.xz), MPtrj .json, ASE "
            ".db and .traj, OUTCAR, ..."
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            help="NAME.lmdb (store), NAME.aselmdb (fairchem), NAME.extxyz (text), or a folder "
            "with --shard-size"
        ),
    ],
    energy_convention: EnergyConventionOption = None,
    is2re: Annotated[
        str | None,
        typer.Option(help="Frame of IS2RE entries: initial or relaxed", metavar="FRAME"),
    ] = None,
    energy_key: EnergyKeyOption = None,
    forces_key: ForcesKeyOption = None,
    stress_key: StressKeyOption = None,
    virial_key: VirialKeyOption = None,
    workers: WorkersOption = 0,
    shard_size: ShardSizeOption = None,
    policy: Annotated[
        str, typer.Option(help="Bad frames and files: skip (and report) or raise (stop)")
    ] = "skip",
    quarantine: Annotated[
        Path | None, typer.Option(help="List what was skipped here (tab-separated)")
    ] = None,
    report: ReportOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    allow_unlabelled: Annotated[
        bool, typer.Option("--allow-unlabelled", help="Accept data without any label")
    ] = False,
) -> None:
    """Convert data files into one data set and print a report.

    Bad frames and files are left out and reported; the exit code is then 1.
    """
    from mlip.datasets.convert import convert as run
    from mlip.datasets.labels import LabelKeys
    from mlip.datasets.options import ReadOptions

    keys = LabelKeys(energy_key, forces_key, stress_key, virial_key)
    run_conversion(
        run,
        inputs,
        output,
        report=report,
        options=ReadOptions(keys, energy_convention, is2re),  # type: ignore[arg-type]
        workers=workers,
        shard_size=shard_size,
        policy="quarantine" if quarantine and policy == "skip" else policy,
        quarantine=quarantine,
        resume=resume,
        overwrite=overwrite,
        allow_unlabelled=allow_unlabelled,
    )
