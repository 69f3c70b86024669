"""Train a small EquiformerV3: first direct forces with denoising, then forces as derivatives.

    python scripts/train_equiformer_v3.py FOLDER --minutes 60 120 [--out runs/equiformer_v3]
    python scripts/train_equiformer_v3.py FOLDER --minutes 0 180      # derivatives from scratch

FOLDER holds mlearn_Li, mlearn_Si and so on with train.extxyz.xz and test.extxyz.xz in each (see
train_mlearn.py), or the files themselves: train*.extxyz* and test*.extxyz*, of which ``--train``
and ``--test`` choose.

The settings are those of recipes/equiformer_v3_small_*.yaml, changed by ``--set`` (for mlearn
``--set batch.max_edges=6000``, one to twenty structures). A schedule fitted to the wall time
depends on the machine; with ``--steps A B`` in place of ``--minutes`` the same seed gives the same
potential, bit for bit on one machine. A killed stage continues with ``mlip train --resume
OUT/direct`` (or ``OUT/gradient``); called again, this script skips a stage that is finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from mlearn_data import ELEMENTS

from mlip.errors import InputError
from mlip.training.config import TrainConfig, build_config
from mlip.training.run import POTENTIAL_FILE, train

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def data_files(folder: Path, pattern: str) -> list[str]:
    """Find the files of one split, also one folder below for mlearn.

    Raises:
        InputError: there are none.
    """
    found = [
        path for name in ELEMENTS for path in sorted((folder / f"mlearn_{name}").glob(pattern))
    ]
    found = found or sorted(folder.glob(pattern))
    if not found:
        raise InputError(f"{folder} holds no {pattern}, nor do folders mlearn_Li … in it")
    return [str(path) for path in found]


def stage_settings(arguments: argparse.Namespace, stage: str, limit: float) -> TrainConfig:
    """Complete the recipe of ``"direct"`` or ``"gradient"`` with data, limit and folder."""
    recipe = _recipe(stage)
    if stage == "gradient" and arguments.limits[0] == 0:  # from scratch
        del recipe["initial"], recipe["initial_reset"]
        recipe["model"] = {**_recipe("direct")["model"], **recipe["model"]}
        recipe["optimizer"] = _recipe("direct")["optimizer"]
    elif stage == "gradient":
        recipe["initial"] = str(arguments.out / "direct" / POTENTIAL_FILE)
    recipe["data"] |= {"train": data_files(arguments.folder, arguments.train)}
    recipe["data"] |= {"test": data_files(arguments.folder, arguments.test)}
    recipe |= {"seed": arguments.seed, "out": str(arguments.out / stage)}
    name = "max_steps" if arguments.steps else "max_time_minutes"
    recipe[name] = int(limit) if arguments.steps else limit
    return build_config(recipe, arguments.set, source=f"the {stage} recipe")


def _recipe(stage: str) -> dict[str, Any]:
    text = (RECIPES / f"equiformer_v3_small_{stage}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def main() -> None:
    """Parse the command line and train both stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/equiformer_v3"))
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--minutes", nargs=2, type=float, metavar=("A", "B"), help="of each stage")
    limit.add_argument("--steps", nargs=2, type=int, metavar=("A", "B"), help="of each stage")
    parser.add_argument("--train", default="train*.extxyz*", help="pattern of the training files")
    parser.add_argument("--test", default="test*.extxyz*", help="pattern of the test files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arguments.limits = arguments.minutes or arguments.steps
    for stage, amount in zip(("direct", "gradient"), arguments.limits, strict=True):
        if amount > 0 and not (arguments.out / stage / POTENTIAL_FILE).exists():
            train(stage_settings(arguments, stage, amount))


if __name__ == "__main__":
    main()
