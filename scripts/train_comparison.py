"""Train TDN, Facet and EquiformerV3 of about equal size for equal time and compare their errors.

    python scripts/train_comparison.py FOLDER [--minutes 5.5] [--out runs/comparison]

FOLDER holds acac/train_300K.extxyz.xz, test_MD_300K.extxyz.xz and test_MD_600K.extxyz.xz
(github.com/davkovacs/BOTNet-datasets, MIT licence) and rmd17/ethanol/train_01.extxyz.xz and
test_01.extxyz.xz (figshare 12672038, CC0; official split 1): extended XYZ, energy in eV, forces in
eV/Å. Training: acac 450 structures, ethanol 950 and 50, each with 50 others for validation.

All models share cutoff, loss, batch, schedule and seed. Learning rates are barely tuned: two rates
of each model were tried for 21 seconds on structures held out of acac's training set. TDN (then of
another shape) and EquiformerV3 have the better one, the highest tried; Facet one in between.
Batches of the three are the same structures, but a faster model sees more of them
in the same time. The schedule is fitted to the wall time, so the result depends on the machine.
A finished run is skipped, a killed one goes on where it was. The table is printed and written to
OUT/table.md: errors by ``mlip.simulation.evaluate``, inference with forces, one structure a call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
from ase import Atoms

from mlip.files import atomic_write
from mlip.potential import load_potential
from mlip.simulation.calculator import Calculator
from mlip.simulation.evaluate import evaluate
from mlip.training.config import TrainConfig, build_config
from mlip.training.run import CONFIG_FILE, POTENTIAL_FILE, resume, train
from mlip.training.state import state_files

CUTOFF = 5.0  # Å
MODELS: dict[str, dict[str, Any]] = {  # 0.31 million weights each
    "tdn": {"lmax": 2, "channels": 92, "layers": 3, "n_radial": 32},
    "facet": {"hidden": [[64, 64, 64]] * 2, "embedding": 64, "outputs": 64},
    "equiformer_v3": {
        "lmax": 2,
        "mmax": 2,
        "channels": 32,
        "layers": 2,
        "attention_hidden": 16,
        "heads": 4,
        "alpha_channels": 32,
        "value_channels": 16,
        "feed_forward_hidden": 64,
        "edge_channels": 48,
    },
}
LEARNING_RATES = {"tdn": 4e-3, "facet": 1e-2, "equiformer_v3": 4e-3}


class Task(NamedTuple):
    """Training file, structures used of it, batch size, and test files by name."""

    train: str
    count: int
    batch: int
    tests: dict[str, str]


ACAC = {k: f"acac/test_MD_{k}.extxyz.xz" for k in ("300K", "600K")}
ETHANOL = "rmd17/ethanol/train_01.extxyz.xz"
ETHANOL_TEST = {"test": "rmd17/ethanol/test_01.extxyz.xz"}
VALID = 50
TASKS = {
    "acac": Task("acac/train_300K.extxyz.xz", 450, 5, ACAC),
    "ethanol_950": Task(ETHANOL, 950, 5, ETHANOL_TEST),
    "ethanol_50": Task(ETHANOL, 50, 5, ETHANOL_TEST),
}
INFERENCE_CALLS = 200


def split(task: Task, folder: Path, out: Path) -> dict[str, Path]:
    """Write the training and validation structures of a task, drawn with a fixed seed."""
    frames = ase.io.read(folder / task.train, ":", format="extxyz")
    order = np.random.default_rng(0).permutation(len(frames))
    chosen = {"valid": order[:VALID], "train": order[VALID : VALID + task.count]}
    out.mkdir(parents=True, exist_ok=True)
    for part, indices in chosen.items():
        ase.io.write(out / f"{part}.extxyz", [frames[i] for i in sorted(indices)], format="extxyz")
    return {part: out / f"{part}.extxyz" for part in chosen}


def settings(model: str, task: Task, files: dict[str, Path], out: Path, minutes: float) -> Any:
    """Give the settings of one run; an epoch of few structures shows each of them many times."""
    atoms = ase.io.read(files["train"], 0)
    assert isinstance(atoms, Atoms)
    return {
        "data": {
            "train": [{"paths": [str(files["train"])], "weight": 950 / task.count}],
            "valid": [{"paths": [str(files["valid"])], "name": "train"}],
        },
        "model": {"name": model, "cutoff": CUTOFF, **MODELS[model]},
        "loss": {
            "kind": "l1",
            "normalised": True,
            "energy_weight": 5.0,
            "forces_weight": 20.0,
            "energy_weight_final": 40.0,
        },
        "optimizer": {"lr": LEARNING_RATES[model], "weight_decay": 1e-4, "betas": [0.9, 0.98]},
        "schedule": {"warmup_steps": 100, "lr_min_fraction": 0.01},
        "batch": {"max_edges": task.batch * len(atoms) * (len(atoms) - 1)},
        "ema_decay": 0.998,
        "max_time_minutes": minutes,
        "seed": 1,
        "out": str(out),
    }


def run(config: TrainConfig, out: Path) -> None:
    """Train, or go on where a killed run stopped."""
    if (out / CONFIG_FILE).exists() and state_files(out):
        resume(out)
    else:
        train(config)


def inference_ms(path: Path, frames: list[Atoms]) -> float:
    """Time energy and forces of one structure a call: median, ms, neighbours included."""
    calculator = Calculator(path)
    times = []
    for atoms in (frames * INFERENCE_CALLS)[:INFERENCE_CALLS]:
        atoms.calc = calculator
        start = time.perf_counter()
        atoms.get_forces()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[INFERENCE_CALLS // 10 :])


def test(path: Path, task: Task, folder: Path) -> dict[str, Any]:
    """Evaluate a trained potential on all tests of its task."""
    potential = load_potential(path)
    errors = {}
    for name, file in task.tests.items():
        overall = evaluate(str(folder / file), potential, plots=False).overall
        errors[name] = {label: overall[label].summary() for label in ("energy", "forces")}
    frames = ase.io.read(folder / next(iter(task.tests.values())), ":20", format="extxyz")
    return {
        "parameters": sum(p.numel() for p in potential.model.parameters()),
        "errors": errors,
        "inference_ms": inference_ms(path, frames),
    }


def steps_of(out: Path) -> int:
    """Count the training steps that a run made."""
    return int((out / "steps.csv").read_text().splitlines()[-1].split(",")[0])


def table(results: dict[str, dict[str, Any]], minutes: float) -> str:
    """Write all results as Markdown."""
    lines = [
        "| training | model | weights (k) | minutes | steps | test | energy MAE (meV/atom) "
        "| force MAE (meV/Å) | force RMSE (meV/Å) | inference (ms) |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for key, result in results.items():
        task, model = key.split("/")
        head = f"| {task} | {model} | {result['parameters'] / 1e3:.0f} | {minutes:g}"
        head += f" | {result['steps']}"
        for name, error in result["errors"].items():
            energy, force = (error[label] for label in ("energy", "forces"))
            lines.append(
                f"{head} | {name} | {1e3 * energy['mae']:.2f} | {1e3 * force['mae']:.1f} "
                f"| {1e3 * force['rmse']:.1f} | {result['inference_ms']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, train what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--minutes", type=float, default=5.5, help="wall time of each training")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.tasks:
        task = TASKS[name]
        files = split(task, arguments.folder, arguments.out / name)
        for model in MODELS:
            out = arguments.out / name / model
            if not (out / POTENTIAL_FILE).exists():
                values = settings(model, task, files, out, arguments.minutes)
                run(build_config(values), out)
            stored = out / "comparison.json"
            if not stored.exists():
                found = test(out / POTENTIAL_FILE, task, arguments.folder)
                with atomic_write(stored, "w") as file:
                    json.dump({"steps": steps_of(out), **found}, file, indent=1)
            results[f"{name}/{model}"] = json.loads(stored.read_text())
            with atomic_write(arguments.out / "table.md", "w") as file:
                file.write(table(results, arguments.minutes))
    print(table(results, arguments.minutes), end="")


if __name__ == "__main__":
    main()
