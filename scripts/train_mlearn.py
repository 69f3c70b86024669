"""Train the shipped potential for Li, Si, Cu, Ni, Ge and Mo.

    python scripts/mlearn_data.py SOURCE FOLDER
    python scripts/train_mlearn.py FOLDER [--minutes 84] [--out runs/mlearn]

The first command corrects the stress labels of the official splits, which contradict the energies
(it says where they come from). A killed run continues with ``mlip train --resume OUT``. The
schedule is fitted to the wall time, so the result depends on the machine: the shipped file came
from STEPS steps on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlip.training.config import build_config
from mlip.training.run import train

ELEMENTS = ("Li", "Si", "Cu", "Ni", "Ge", "Mo")
MODEL = {
    "name": "facet",
    "cutoff": 5.0,
    "hidden": [[32, 16]],
    "message": [32, 32, 32, 32],
    "embedding": 32,
    "outputs": 32,
}


def settings(folder: Path, out: str, minutes: float) -> dict[str, Any]:
    """Settings of the run: forces first, the weight of the energy raised late."""
    files = {
        part: [str(folder / f"mlearn_{name}" / f"{part}.extxyz.xz") for name in ELEMENTS]
        for part in ("train", "test")
    }
    return {
        "data": {**files, "valid_fraction": 0.04},
        "model": MODEL,
        "loss": {
            "energy_weight": 40.0,
            "forces_weight": 10.0,
            "stress_weight": 20.0,
            "energy_weight_final": 400.0,
            "switch_fraction": 0.6,
            "energy_delta": 0.001,
            "forces_delta": 0.02,
            "stress_delta": 0.002,
        },
        "optimizer": {"lr": 0.01, "weight_decay": 1e-6, "betas": [0.9, 0.99]},
        "schedule": {"warmup_steps": 200, "lr_min_fraction": 0.002},
        "batch": {"max_edges": 6000},
        "ema_decay": 0.999,
        "max_time_minutes": minutes,
        "zbl": True,
        "level_of_theory": "PBE (VASP PAW), Zuo et al. 2020",
        "licence": "weights: MIT; training data: BSD-3, mlearn",
        "seed": 1,
        "out": out,
    }


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", default="runs/mlearn")
    parser.add_argument("--minutes", type=float, default=84.0, help="wall time of the training")
    arguments = parser.parse_args()
    train(build_config(settings(arguments.folder, arguments.out, arguments.minutes)))


if __name__ == "__main__":
    main()
