"""Train the shipped potential for Li, Si, Cu, Ni, Ge and Mo, in stages.

    python scripts/mlearn_data.py SOURCE FOLDER
    python scripts/train_mlearn.py FOLDER --minutes 128 --out runs/first
    python scripts/train_mlearn.py FOLDER --minutes 25 --out runs/second \\
        --initial runs/first/potential.safetensors

SOURCE holds the official splits of mlearn and the alloy set that more frames of Mo come from;
mlearn_data.py corrects stresses that contradict energies, and says where the data come from. The
second stage leads with the energy, shows surfaces, which are few, more often, and adds the frames
of Mo. The potential that ships had it twice, the first time with other numbers: see its card. A
killed run continues with ``mlip train --resume OUT``. The schedule is fitted to the wall time, so
the result depends on the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlearn_data import ELEMENTS, MOLYBDENUM, SURFACES

from mlip.training.config import build_config
from mlip.training.run import train

MODEL = {
    "name": "facet",
    "cutoff": 5.0,
    "hidden": [[64, 32, 16]],
    "message": [48, 48, 32, 32],
    "embedding": 64,
    "outputs": 64,
}
LOSS = {
    "energy_delta": 0.001,
    "forces_weight": 10.0,
    "forces_delta": 0.02,
    "stress_delta": 0.002,
}
FIRST = {  # forces first, the weight of the energy raised late
    "model": MODEL,
    "loss": {
        **LOSS,
        "energy_weight": 4.0,
        "energy_weight_final": 40.0,
        "switch_fraction": 0.5,
        "stress_weight": 20.0,
    },
    "optimizer": {"lr": 0.01, "weight_decay": 1e-6, "betas": [0.9, 0.99]},
    "zbl": True,
}
SECOND = {
    "loss": {**LOSS, "energy_weight": 80.0, "stress_weight": 8.0},
    "optimizer": {"lr": 0.002, "weight_decay": 0.003, "betas": [0.9, 0.99]},
}
SURFACES_SHOWN = 6.0  # times an epoch, in the second stage


def settings(folder: Path, out: str, minutes: float, initial: str | None) -> dict[str, Any]:
    """Settings of the first stage, or of the second, which goes on from a potential."""
    sets: list[dict[str, Any]] = [
        {"name": "bulk", "paths": _paths(folder, "bulk")},
        {"name": "surfaces", "paths": [str(folder / SURFACES)]},
    ]
    if initial is not None:
        sets[1]["weight"] = SURFACES_SHOWN
        more = {"name": "Mo_dynamics", "paths": [str(folder / MOLYBDENUM)], "labels": ["forces"]}
        sets.append(more)
    tests = [{"name": "mlearn", "paths": _paths(folder, "test")}]
    return {
        "data": {"train": sets, "test": tests, "valid_fraction": 0.04},
        **(FIRST if initial is None else {**SECOND, "initial": initial}),
        "schedule": {"warmup_steps": 200, "lr_min_fraction": 0.002},
        "batch": {"max_edges": 6000},
        "ema_decay": 0.999,
        "max_time_minutes": minutes,
        "level_of_theory": "PBE (VASP PAW), Zuo et al. 2020",
        "licence": "weights: MIT; training data: BSD-3, mlearn and maml",
        "seed": 1,
        "out": out,
    }


def _paths(folder: Path, part: str) -> list[str]:
    return [str(folder / f"mlearn_{name}" / f"{part}.extxyz.xz") for name in ELEMENTS]


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", default="runs/mlearn")
    parser.add_argument("--minutes", type=float, default=128.0, help="wall time of the training")
    parser.add_argument("--initial", help="potential of the first stage")
    arguments = parser.parse_args()
    values = settings(arguments.folder, arguments.out, arguments.minutes, arguments.initial)
    train(build_config(values))


if __name__ == "__main__":
    main()
