"""The road from data to potential, in small: label frames with EMT, convert, train, evaluate.

EMT (effective-medium theory, part of ASE) stands in for density functional theory: it is fast, and
needs no licence. The trained potential is a toy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

from mlip.datasets.convert import convert
from mlip.simulation.evaluate import EvaluationReport, evaluate
from mlip.training.config import build_config
from mlip.training.report import read_metrics
from mlip.training.run import train

A_COPPER, A_GOLD = 3.60, 4.06  # Å


class Learned(NamedTuple):
    """Outcome of the small training: values for the summary, errors, and a row per epoch."""

    values: dict[str, Any]
    evaluation: EvaluationReport
    epochs: list[dict[str, float]]


def learn(folder: Path, console: Console, *, frames: int, epochs: int) -> Learned:
    """Make a labelled LMDB of a copper–gold alloy, train on it and test the result.

    Args:
        folder: for data, run and evaluation.
        console: shows the table of the training.
        frames: to train and validate on; a quarter as many again for the test.
        epochs: of the training.
    """
    stores = {}
    for name, count, seed in (("train", frames, 0), ("test", max(frames // 4, 2), 1)):
        text = folder / f"{name}.extxyz"
        text.parent.mkdir(parents=True, exist_ok=True)
        ase.io.write(text, emt_frames(count, seed=seed))
        stores[name] = folder / f"{name}.lmdb"
        convert(text, stores[name])
    config = build_config(
        {
            "data": {"train": str(stores["train"]), "valid_fraction": 0.2},
            "model": {"name": "facet", "cutoff": 5.0, "hidden": [[16, 8, 4], [16, 8, 4]]},
            "batch": {"max_edges": 3000},
            "schedule": {"warmup_steps": 20},
            "epochs": epochs,
            "ema_decay": 0.95,
            "level_of_theory": "EMT (ASE)",
            "device": "cpu",
            "out": str(folder / "run"),
        }
    )
    result = train(config, console=console)
    report = evaluate(stores["test"], result.path, out=folder / "evaluation", plots=False)
    values = {
        "frames": frames,
        "epochs": epochs,
        "potential": os.path.relpath(result.path, folder.parent),
        "test": {name: errors.summary() for name, errors in report.overall.items()},
    }
    return Learned(values, report, read_metrics(result.folder))


def emt_frames(count: int, seed: int) -> list[Atoms]:
    """Make random strained and rattled fcc copper–gold cells of 16 atoms, labelled by EMT."""
    rng = np.random.default_rng(seed)
    return [_emt_frame(rng) for _ in range(count)]


def _emt_frame(rng: np.random.Generator) -> Atoms:
    gold = rng.uniform(0, 1)
    a = (1 - gold) * A_COPPER + gold * A_GOLD
    atoms = bulk("Cu", "fcc", a=a * rng.normal(1.0, 0.01), cubic=True).repeat((2, 2, 1))
    atoms.symbols[rng.random(len(atoms)) < gold] = "Au"
    strain = rng.normal(0, 0.015, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(0, rng.uniform(0.02, 0.15), atoms.positions.shape)
    atoms.calc = EMT()
    labels = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(),
    }
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms
