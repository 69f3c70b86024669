"""Run the demo: relax, measure, simulate, train; leave trajectories, plots and a summary."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ase.data import atomic_numbers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mlip import __version__
from mlip.demo import crystals as known
from mlip.demo import learning, stages, summary
from mlip.errors import InputError
from mlip.files import atomic_write
from mlip.simulation.calculator import as_calculator
from mlip.simulation.parity import save_parity_plot
from mlip.validation import plots

# Marks a folder as one that the demo made, and may empty when it runs again.
MARKER = ".mlip-demo"


class Size(NamedTuple):
    """How much the demo does."""

    nvt_ps: float = 2.0
    nve_ps: float = 1.0
    relax_steps: int = 300
    volumes: int = 11
    frames: int = 80
    epochs: int = 30


FULL = Size()
QUICK = Size(nvt_ps=0.1, nve_ps=0.1, relax_steps=100, volumes=7, frames=12, epochs=2)


def run_demo(
    out: str | os.PathLike[str],
    potential: Any = "mlearn-facet",
    *,
    quick: bool = False,
    crystals: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the main job on what ships with the package.

    Args:
        out: folder for trajectories, plots and summary; made new, or emptied if the demo made it.
        potential: path or name of a potential, a potential, or any ASE calculator.
        quick: do a small part of everything.
        crystals: symbols of the crystals to use; default those the potential knows.
        console: where progress and tables go; default the standard output.

    Returns:
        The values of ``summary.json``; ``problems`` lists what did not go well.

    Raises:
        InputError: the folder holds something else, or the potential knows none of the crystals.
    """
    run = _Demo(Path(out), console or Console(soft_wrap=True), QUICK if quick else FULL)
    calculator = as_calculator(potential)
    chosen = _choose(calculator, crystals)
    _prepare_folder(run.out)
    run.values = {
        "version": __version__,
        "potential": getattr(calculator, "description", type(calculator).__name__),
        "quick": quick,
    }
    with run.progress:
        run.relax(chosen, calculator, quick)
        run.measure(chosen, as_calculator(potential, dtype="float64"))
        run.simulate(chosen, calculator)
        run.learn()
    return run.finish()


@dataclass
class _Demo:
    """A demo under way: where it writes, what it shows and what it has found so far."""

    out: Path
    console: Console
    size: Size
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[stages.Report]:
        """Show and time one stage; gives the function that reports its progress."""
        task = self.progress.add_task(title, total=None, note="")
        start = time.perf_counter()

        def report(done: int, total: int, note: str) -> None:
            self.progress.update(task, completed=done, total=total, note=note)

        yield report
        self.seconds[name] = time.perf_counter() - start
        self.progress.update(task, total=1, completed=1, note="")

    def plot(self, name: str, figure: Any) -> None:
        """Write a figure to the folder of plots."""
        plots.save(figure, self.out / "plots" / f"{name}.png")

    def relax(self, chosen: Mapping[str, known.Crystal], calculator: Any, quick: bool) -> None:
        """Relax one structure per crystal."""
        structures = known.structures_to_relax(dict(chosen), quick=quick)
        with self.stage("relax", "relax structures") as report:
            rows = stages.relax_structures(
                structures, calculator, self.out / "relax", report, steps=self.size.relax_steps
            )
        self.values["relaxations"] = rows
        self.problems += [
            f"relaxation of {row['name']}: {row['status']} {row['message']}".strip()
            for row in rows
            if row["status"] != "converged"
        ]

    def measure(self, chosen: Mapping[str, known.Crystal], calculator: Any) -> None:
        """Measure each crystal and plot energy over volume beside DFT."""
        with self.stage("crystals", "measure crystals") as report:
            rows, curves = stages.measure_crystals(
                dict(chosen),
                calculator,
                report,
                points=self.size.volumes,
                steps=self.size.relax_steps,
            )
        self.values["crystals"] = rows
        self.problems += [f"{s}: {row['error']}" for s, row in rows.items() if "error" in row]
        if curves:
            marks = {symbol: chosen[symbol].dft for symbol in curves}
            self.plot("energy-volume", plots.energy_volume(curves, marks, "Energy over volume"))

    def simulate(self, chosen: Mapping[str, known.Crystal], calculator: Any) -> None:
        """Run dynamics of copper, or else of the first crystal that could be measured."""
        measured = [s for s, row in self.values["crystals"].items() if "potential" in row]
        if not measured:
            self.values["dynamics"] = None
            return
        symbol = "Cu" if "Cu" in measured else measured[0]
        a = self.values["crystals"][symbol]["potential"]["a"]
        with self.stage("dynamics", "simulate") as report:
            values, segments, distributions = stages.simulate(
                chosen[symbol],
                a,
                calculator,
                self.out / "md",
                report,
                nvt_ps=self.size.nvt_ps,
                nve_ps=self.size.nve_ps,
            )
        self.values["dynamics"] = values
        title = f"Dynamics of {values['formula']}"
        self.plot("energy-temperature", plots.energy_and_temperature(segments, title))
        if distributions is not None:
            figure = plots.radial_distribution(*distributions, "Radial distribution of " + symbol)
            self.plot("radial-distribution", figure)
        for name in ("nvt", "nve"):
            run = values.get(name)
            if run is not None and run["status"] != "completed":
                self.problems.append(f"{name} dynamics of {symbol}: {run['message']}")

    def learn(self) -> None:
        """Train a small potential on data made here; plot how it learned, and what."""
        with self.stage("learn", "train on EMT data"):
            found = learning.learn(
                self.out / "training",
                self.progress.console,
                frames=self.size.frames,
                epochs=self.size.epochs,
            )
        self.values["learning"] = found.values
        epochs = [row["epoch"] for row in found.epochs]
        panels = {
            label: {
                name: [row[f"{part}_{column}"] for row in found.epochs]
                for name, part in (("training", "train"), ("validation (EMA)", "valid"))
            }
            for label, column in (
                ("energy MAE (meV/atom)", "energy_mae_meV_per_atom"),
                ("force MAE (meV/Å)", "forces_mae_meV_per_A"),
            )
        }
        title = "Facet learning EMT copper–gold"
        self.plot("learning-curve", plots.learning_curve(epochs, panels, title))
        errors = {name: table.summary() for name, table in found.evaluation.overall.items()}
        save_parity_plot(found.evaluation.points, errors, self.out / "plots" / "parity.png")

    def finish(self) -> dict[str, Any]:
        """Write and print the summary."""
        names = ["summary.json", "summary.md", *_files(self.out)]
        self.values |= {
            "problems": self.problems,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "files": sorted(set(names)),
        }
        with atomic_write(self.out / "summary.json", "w") as file:
            json.dump(self.values, file, indent=1, ensure_ascii=False)
        with atomic_write(self.out / "summary.md", "w") as file:
            file.write(summary.markdown(self.values))
        for table in summary.tables(self.values):
            self.console.print(table.rich(), soft_wrap=False)
        self.console.print(f"{sum(self.seconds.values()):.0f} s; everything is in {self.out}:")
        for name in self.values["files"]:
            self.console.print(f"  {name}", highlight=False)
        for problem in self.problems:
            self.console.print(f"problem: {problem}", style="red")
        return self.values


def _choose(calculator: Any, wanted: Sequence[str] | None) -> dict[str, known.Crystal]:
    """Pick the crystals that are wanted, or that the potential knows."""
    crystals = known.reference_crystals()
    elements = getattr(getattr(calculator, "potential", None), "elements", None)
    if wanted is None:
        wanted = [s for s in crystals if elements is None or atomic_numbers[s] in elements]
    unknown = sorted(set(wanted) - set(crystals))
    if unknown or not wanted:
        what = f"not {', '.join(unknown)}" if unknown else "and the potential knows none of them"
        raise InputError(f"the demo has crystals of {', '.join(crystals)}, {what}")
    return {symbol: crystals[symbol] for symbol in wanted}


def _prepare_folder(out: Path) -> None:
    """Make the folder, or empty it if an earlier demo made it."""
    if out.exists() and not (out / MARKER).is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and was not made by the demo: choose another --out")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("The demo of mlip made this folder and empties it next time.\n")


def _files(out: Path) -> list[str]:
    """List what the demo wrote that a person would open."""
    kept = {".extxyz", ".csv", ".png", ".safetensors", ".lmdb", ".json", ".yaml"}
    found = [path for path in out.rglob("*") if path.is_file() and path.suffix in kept]
    return [str(path.relative_to(out)) for path in found if "state" not in path.name]
