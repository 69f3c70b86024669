"""The data layer as a tutorial: from raw files to a potential, what `mlip data demo` runs.

Every step is what one command does, and the command is shown first. A run that was killed goes on
with the step that it was in.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from ase.data import atomic_numbers
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from mlip.datasets import open_dataset, structure_to_graph
from mlip.datasets.check import check
from mlip.datasets.convert import convert
from mlip.datasets.dataset import Dataset
from mlip.datasets.transform import split
from mlip.demo.data_slabs import ADSORBATE, METALS, write_raw_files
from mlip.demo.summary import Table
from mlip.errors import DataError, InputError
from mlip.files import atomic_write
from mlip.potential import Potential, load_potential
from mlip.simulation.evaluate import Errors, evaluate
from mlip.simulation.predict import predict_stream
from mlip.training.config import load_config
from mlip.training.run import resume, train
from mlip.training.state import state_files

# Marks a folder as one that this demo made, and says which steps are done.
MARKER = ".mlip-data-demo.json"
PARTS = {"train": 0.8, "valid": 0.1, "test": 0.1}


class Size(NamedTuple):
    """How much data the demo makes, and how long it trains."""

    systems: int = 200
    frames: int = 4  # of each system
    files: int = 4
    epochs: int = 16
    seed: int = 0


FULL = Size()


def run_data_demo(
    out: str | os.PathLike[str], console: Console | None = None, *, size: Size = FULL
) -> dict[str, Any]:
    """Make an OC20-like data set, check, convert and split it, train on it and test the result.

    Args:
        out: folder for everything; an interrupted demo in it goes on.
        console: where the tutorial goes; default the standard output.
        size: how much to do.

    Returns:
        Errors on the held-out systems by what they are of, each with the mean absolute error
        (``mae``) and what it would be without the model (``baseline``); eV/atom, eV/Å.

    Raises:
        InputError: the folder holds something else, or a demo of another size.
    """
    run = _Tutorial(Path(out), console or Console(soft_wrap=True), size)
    run.make_files()
    run.check()
    run.convert()
    run.split()
    run.train()
    return run.evaluate()


class _Tutorial:
    """A demo under way: its folder, what it shows, and which steps are done."""

    def __init__(self, out: Path, console: Console, size: Size) -> None:
        self.out, self.console, self.size = out, console, size
        self.raw, self.store = out / "raw", out / "all.lmdb"
        self.parts = {part: out / "split" / f"{part}.lmdb" for part in PARTS}
        self.settings, self.run = out / "train.yaml", out / "run"
        self.done = _read_marker(out, size)

    def make_files(self) -> None:
        """Write raw files as a group that runs DFT would have them."""
        size = self.size
        self._say(
            "1. The data",
            f"{size.systems} adsorbates on fcc metals, {size.frames} frames of each: steps of a "
            "relaxation, and rattled copies. EMT, a potential of ASE, takes the place of DFT. The "
            "files look like raw OC20: N.extxyz with tags (0 sub-surface, 1 surface, 2 adsorbate), "
            "fixed atoms and raw forces; N.txt with system, frame and reference energy.",
        )
        if self._kept("files", self.raw):
            return
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("EMT", total=size.systems)
            count = write_raw_files(
                self.raw,
                systems=size.systems,
                frames=size.frames,
                files=size.files,
                seed=size.seed,
                report=lambda done, _: progress.update(task, completed=done),
            )
        self._finished("files")
        self.console.print(f"{count} frames in {self.raw}")

    def check(self) -> None:
        """Show what is in the raw files."""
        self._say(
            "2. Look before you train",
            "Nothing is written; every entry is read. (EMT counts from the bulk metal, so that its "
            "totals are as small as adsorption energies: the page can only guess.)",
        )
        self._command("check", self.raw)
        self.console.print(check(self.raw))

    def convert(self) -> None:
        """Convert the raw files to a store."""
        self._say(
            "3. Convert",
            "One file that opens at once and is read at random, without pickle. Raw OC20 has total "
            "and reference energies: the total is taken unless you say otherwise.",
        )
        self._command("convert", self.raw, self.store, "--resume")
        if not self._kept("convert", self.store):
            report = convert(self.raw, self.store, resume=True)
            self._finished("convert")
            self.console.print(f"{report.kept} frames kept, {report.dropped} dropped")

    def split(self) -> None:
        """Divide the systems among training, validation and test."""
        self._say(
            "4. Split without leaks",
            "Frames of one relaxation are near copies: a system (sid) goes whole to one side.",
        )
        folder = self.parts["test"].parent
        shares = list(PARTS.values())
        self._command(
            "data", "split", self.store, folder, "--by", "sid",
            "--fractions", ",".join(map(str, shares)),
        )  # fmt: skip
        if not self._kept("split", folder):
            split(self.store, folder, shares, by="sid", seed=self.size.seed, overwrite=True)
            self._finished("split")
        for part, path in self.parts.items():
            dataset = open_dataset(path)
            systems = {dataset[i].info["sid"] for i in range(len(dataset))}
            self.console.print(f"{part}: {len(dataset)} frames of {len(systems)} systems")

    def train(self) -> None:
        """Train a small potential, or go on with it."""
        self._say("5. Train", "A small Facet, for about a minute.")
        begun = state_files(self.run)
        if begun and "train" not in self.done:
            self._command("train", "--resume", self.run)
        else:
            self._command("train", self.settings)
        if self._kept("train", self.run):
            return
        if begun:
            resume(self.run, console=self.console)
        else:
            shutil.rmtree(self.run, ignore_errors=True)  # killed before there was a state
            with atomic_write(self.settings, "w") as file:
                yaml.safe_dump(self._training_settings(), file, sort_keys=False)
            train(load_config(self.settings), console=self.console)
        self._finished("train")

    def evaluate(self) -> dict[str, Any]:
        """Measure the potential on systems that it never saw."""
        self._say("6. Test on systems that the potential never saw")
        path, folder = self.run / "potential.safetensors", self.out / "evaluation"
        self._command("evaluate", self.parts["test"], "-p", path, "--out", folder)
        potential = load_potential(path)
        evaluate(self.parts["test"], potential, out=folder)
        errors = held_out_errors(open_dataset(self.parts["test"]), potential)
        self.console.print(_table(errors).rich(), soft_wrap=False)
        self.console.print(
            "Without the model: reference energies alone, and no forces. Benchmarks of OC20 count "
            f"free atoms only. Parity plot: {folder / 'parity.png'}"
        )
        with atomic_write(self.out / "errors.json", "w") as file:
            json.dump(errors, file, indent=1)
        self._suggest(path)
        return errors

    def _suggest(self, potential: Path) -> None:
        self._say("What next")
        adsorption = self.out / "adsorption.lmdb"
        self._command("train", self.settings, "--set", "epochs=60", "--out", self.out / "longer")
        self._command("convert", self.raw, adsorption, "--energy-convention", "adsorption")
        self._command("relax", self.out / "evaluation" / "worst.extxyz", "-p", potential)
        self.console.print("Your own files take the same road; docs/datasets.md has the details.")

    def _training_settings(self) -> dict[str, Any]:
        return {
            "data": {part: str(self.parts[part]) for part in ("train", "valid")},
            "model": {
                "name": "facet",
                "elements": sorted(atomic_numbers[name] for name in (*METALS, *"HCNO")),
                "cutoff": 4.5,
                "hidden": [[16, 8]],
                "message": [16, 16, 16],
            },
            "loss": {"energy_weight": 5.0, "energy_weight_final": 20.0},
            "batch": {"max_edges": 3000},
            "optimizer": {"lr": 0.02, "weight_decay": 1e-3},
            "schedule": {"warmup_steps": 20},
            "epochs": self.size.epochs,
            "checkpoint": {"minutes": 0.2},
            "ema_decay": 0.98,
            "seed": self.size.seed,
            "level_of_theory": "EMT (ASE)",
            "device": "cpu",
            "out": str(self.run),
        }

    def _say(self, title: str, text: str = "") -> None:
        self.console.print(Text(f"\n{title}", style="bold"))
        if text:
            self.console.print(text, highlight=False, soft_wrap=False)

    def _command(self, *words: str | Path) -> None:
        line = shlex.join(["mlip", *map(str, words)])
        self.console.print(Text(f"$ {line}", style="cyan"), soft_wrap=True)

    def _kept(self, step: str, path: Path) -> bool:
        if step in self.done:
            self.console.print(f"{path} is there from an earlier run and is kept", highlight=False)
        return step in self.done

    def _finished(self, step: str) -> None:
        self.done.append(step)
        _write_marker(self.out, self.size, self.done)


def held_out_errors(dataset: Dataset, potential: Potential) -> dict[str, dict[str, float]]:
    """Compare predictions with labels by kind of atom.

    Args:
        dataset: structures with energy, forces, tags and fixed atoms.
        potential: what is measured.

    Returns:
        ``mae`` and ``baseline`` (mean absolute label; of energies, what reference energies leave)
        of ``energy`` (eV/atom) and of forces (eV/Å) on all, free and adsorbate atoms.
    """
    references = potential.reference_energies
    kinds = ("energy", "forces", "forces on free atoms", "forces on adsorbates")
    errors = {kind: (Errors(), Errors()) for kind in kinds}
    places = range(len(dataset))

    def to_graph(index: int) -> Any:
        return structure_to_graph(dataset[index], potential.cutoff, index)

    for batch in predict_stream(places, to_graph, potential):
        for index, prediction in batch:
            s = dataset[index]
            if s.energy is None or s.forces is None or s.fixed is None or prediction.forces is None:
                raise DataError(f"{dataset.name(index)}: a label is missing, or a prediction")
            rest = s.energy - sum(references[int(z)] for z in s.numbers)
            _add(errors["energy"], (prediction.energy - s.energy) / len(s), rest / len(s))
            chosen = (np.full(len(s), True), ~s.fixed, s.tags == ADSORBATE)
            for kind, atoms in zip(kinds[1:], chosen, strict=True):
                _add(errors[kind], (prediction.forces - s.forces)[atoms], s.forces[atoms])
    return {
        kind: {"mae": error.mae, "baseline": size.mae} for kind, (error, size) in errors.items()
    }


def _add(errors: tuple[Errors, Errors], difference: Any, label: Any) -> None:
    for one, values in zip(errors, (difference, label), strict=True):
        one.add(np.atleast_1d(values))


def _table(errors: Mapping[str, Mapping[str, float]]) -> Table:
    rows = []
    for kind, row in errors.items():
        name = f"{kind} (meV/atom)" if kind == "energy" else f"{kind} (meV/Å)"
        rows.append([name, *(f"{1000 * row[key]:.1f}" for key in ("mae", "baseline"))])
    return Table("Mean absolute errors on held-out systems", ["", "model", "without"], rows)


def _read_marker(out: Path, size: Size) -> list[str]:
    """Give the steps that an earlier run of the same size finished; claim a new folder.

    Raises:
        InputError: the folder is not this demo's, or was begun with another size.
    """
    marker = out / MARKER
    if not marker.is_file():
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise InputError(f"{out} exists and was not made by this demo: choose another --out")
        _write_marker(out, size, [])
        return []
    found = json.loads(marker.read_text(encoding="utf-8"))
    if found["size"] != size._asdict():
        raise InputError(f"{out} was begun with another size of demo: delete it, or choose another")
    return list(found["done"])


def _write_marker(out: Path, size: Size, done: list[str]) -> None:
    with atomic_write(out / MARKER, "w") as file:
        json.dump({"size": size._asdict(), "done": done}, file)
