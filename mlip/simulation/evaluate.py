"""Compare a potential with labelled structures: errors, the worst frames, parity plots.

Energies are per atom, forces per component, stress per component in GPa.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.data import chemical_symbols

from mlip.datasets import Structure, structure_to_graph
from mlip.datasets.read import expand, find_reader, iterate_file
from mlip.errors import DataError, InputError
from mlip.files import atomic_write
from mlip.graph import AtomicGraph
from mlip.potential import Potential, load_potential
from mlip.simulation.output import extxyz_text, with_results
from mlip.simulation.parity import ParityPoints, save_parity_plot
from mlip.simulation.predict import MAX_EDGES, StructurePrediction, predict_stream

WORST = 20
NO_CONFIGURATION = "(none)"


class Errors:
    """Mean absolute and root-mean-square error of values added piece by piece."""

    def __init__(self) -> None:
        self.count = 0
        self._absolute = self._square = self._largest = 0.0

    def add(self, differences: np.ndarray) -> None:
        """Count differences (prediction minus label); NaN, a missing label, is left out."""
        known = differences[np.isfinite(differences)]
        if known.size:
            self.count += known.size
            self._absolute += float(np.abs(known).sum())
            self._square += float(np.square(known).sum())
            self._largest = max(self._largest, float(np.abs(known).max()))

    @property
    def mae(self) -> float:
        """Mean absolute error; NaN without values."""
        return self._absolute / self.count if self.count else math.nan

    @property
    def rmse(self) -> float:
        """Root of the mean squared error; NaN without values."""
        return math.sqrt(self._square / self.count) if self.count else math.nan

    def summary(self) -> dict[str, float | int | None]:
        """Give count, MAE, RMSE and largest error, JSON-able (None where nothing was counted)."""
        if not self.count:
            return {"count": 0, "mae": None, "rmse": None, "max": None}
        return {"count": self.count, "mae": self.mae, "rmse": self.rmse, "max": self._largest}


def _error_table() -> dict[str, Errors]:
    return {"energy": Errors(), "forces": Errors(), "stress": Errors()}


@dataclass(frozen=True)
class FrameError:
    """How wrong one frame is: energy error, eV/atom, and force RMSE, eV/Å; NaN without label."""

    index: int
    name: str
    energy: float
    forces: float

    @property
    def badness(self) -> float:
        """What frames are ranked by: force RMSE, or the energy error where forces have no label."""
        return self.forces if math.isfinite(self.forces) else abs(self.energy)


@dataclass
class EvaluationReport:
    """Errors of a potential on a data set.

    Attributes:
        potential: hash of its weights.
        structures: frames read; ``failed``: name and reason of those that gave no prediction.
        unlabelled: frames without any label.
        overall: ``energy`` (eV/atom), ``forces`` (eV/Å, components), ``stress`` (GPa, components).
        elements: force errors by symbol.
        configurations: errors as in ``overall`` by configuration type.
        worst: frames with the largest force RMSE, worst first.
        points: a sample of labels and predictions for plots.
    """

    potential: str
    structures: int = 0
    unlabelled: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    overall: dict[str, Errors] = field(default_factory=_error_table)
    elements: dict[str, Errors] = field(default_factory=lambda: defaultdict(Errors))
    configurations: dict[str, dict[str, Errors]] = field(
        default_factory=lambda: defaultdict(_error_table)
    )
    worst: list[FrameError] = field(default_factory=list)
    points: dict[str, ParityPoints] = field(
        default_factory=lambda: {name: ParityPoints() for name in ("energy", "forces", "stress")}
    )

    @property
    def ok(self) -> bool:
        """Tell whether every frame was predicted."""
        return not self.failed

    def to_dict(self) -> dict[str, Any]:
        """Give everything but the points, JSON-able; errors as count, mae, rmse, max."""
        return {
            "potential": self.potential,
            "structures": self.structures,
            "unlabelled": self.unlabelled,
            "failed": [{"name": name, "error": error} for name, error in self.failed],
            "units": {"energy": "eV/atom", "forces": "eV/Å", "stress": "GPa"},
            "overall": {name: errors.summary() for name, errors in self.overall.items()},
            "elements": {name: errors.summary() for name, errors in sorted(self.elements.items())},
            "configurations": {
                kind: {name: errors.summary() for name, errors in table.items()}
                for kind, table in sorted(self.configurations.items())
            },
            "worst": [asdict(frame) for frame in self.worst],
        }


@dataclass(frozen=True)
class _Frame:
    index: int
    name: str
    structure: Structure | DataError


def evaluate(
    data: Any,
    potential: Potential | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    max_edges: int = MAX_EDGES,
    plots: bool = True,
    config_key: str = "config_type",
    on_progress: Callable[[int], None] | None = None,
) -> EvaluationReport:
    """Compare predictions with the labels of a data set.

    Args:
        data: file, pattern, list of them, native store, or a sequence of
            :class:`~mlip.datasets.Structure`.
        potential: potential, path of one, or name of a shipped one.
        out: folder for ``report.json``, ``worst.extxyz`` (20 frames) and ``parity.png``.
        max_edges: edges of one batch.
        plots: draw ``parity.png`` (needs the extra ``train``).
        config_key: key of the configuration type in ``info``.
        on_progress: called after each batch with the frames done.

    Raises:
        DataError: an input file is missing, empty or of no known format.
        InputError: no frame has a label.
    """
    model = potential if isinstance(potential, Potential) else load_potential(potential)
    report = EvaluationReport(model.model_hash())
    worst = _Worst()
    frames = _frames(data)

    def to_graph(frame: _Frame) -> AtomicGraph:
        if isinstance(frame.structure, DataError):
            raise frame.structure
        return structure_to_graph(frame.structure, model.cutoff, frame.index)

    for batch in predict_stream(frames, to_graph, model, max_edges):
        for frame, prediction in batch:
            _compare(report, worst, frame, prediction, config_key)
        if on_progress is not None:
            on_progress(report.structures)
    if not any(errors.count for errors in report.overall.values()) and report.ok:
        raise InputError(
            "no structure has energy, forces or stress to compare with; check the keys of the "
            "labels, or use  mlip predict  for structures without labels"
        )
    report.worst = worst.frames()
    if out is not None:
        _write(report, worst, Path(out), plots)
    return report


def _frames(data: Any) -> Iterator[_Frame]:
    """Iterate over a data set; files are checked to exist before anything is read."""
    paths = [data] if isinstance(data, str | os.PathLike) else data
    if isinstance(paths, Sequence) and paths and isinstance(paths[0], str | os.PathLike):
        files = expand(paths)
        for path in files:
            find_reader(path)
        return _numbered(itertools.chain.from_iterable(map(_file_frames, files)))
    return _numbered((f"structure {k}", structure) for k, structure in enumerate(paths))


def _file_frames(path: Path) -> Iterator[tuple[str, Structure | DataError]]:
    try:
        for entry in iterate_file(path):
            problem = DataError(entry.problem) if entry.problem else None
            yield entry.name, problem or entry.structure or DataError(f"{entry.name}: unreadable")
    except DataError as error:
        yield str(path), error


def _numbered(items: Iterable[tuple[str, Structure | DataError]]) -> Iterator[_Frame]:
    for index, (name, structure) in enumerate(items):
        yield _Frame(index, name, structure)


def _compare(
    report: EvaluationReport,
    worst: _Worst,
    frame: _Frame,
    prediction: StructurePrediction,
    config_key: str,
) -> None:
    report.structures += 1
    if prediction.error is not None or isinstance(frame.structure, DataError):
        report.failed.append((frame.name, str(prediction.error)))
        return
    structure = frame.structure
    report.unlabelled += not structure.labelled
    labels, values = _pairs(structure, prediction)
    kind = str(structure.info.get(config_key, NO_CONFIGURATION))
    for name in labels:
        difference = values[name] - labels[name]
        report.overall[name].add(difference)
        report.configurations[kind][name].add(difference)
        report.points[name].add(labels[name], values[name])
    if "forces" in labels:
        for number in np.unique(structure.numbers):
            chosen = (values["forces"] - labels["forces"])[structure.numbers == number]
            report.elements[chemical_symbols[number]].add(chosen)
    error = FrameError(
        frame.index, frame.name, *(_error_of(name, labels, values) for name in ("energy", "forces"))
    )
    worst.add(error, structure, prediction)


def _pairs(
    structure: Structure, prediction: StructurePrediction
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return labels that exist, and predictions, in the units of the report."""
    n = len(structure)
    labels: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    if structure.energy is not None:
        labels["energy"] = np.array([structure.energy / n])
        values["energy"] = np.array([prediction.energy / n])
    if structure.forces is not None and prediction.forces is not None:
        labels["forces"], values["forces"] = np.asarray(structure.forces), prediction.forces
    if structure.stress is not None and prediction.stress is not None:
        labels["stress"] = np.asarray(structure.stress) / units.GPa
        values["stress"] = prediction.stress / units.GPa
    return labels, values


def _error_of(name: str, labels: dict[str, Any], values: dict[str, Any]) -> float:
    """Return the signed energy error, or the RMSE over the force components of a frame."""
    if name not in labels:
        return math.nan
    difference = values[name] - labels[name]
    if name == "energy":
        return float(difference[0])
    known = difference[np.isfinite(difference)]
    return float(np.sqrt(np.mean(known**2))) if known.size else math.nan


class _Worst:
    """The frames with the largest errors, with all that is needed to write them."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, FrameError, Structure, StructurePrediction]] = []

    def add(self, error: FrameError, structure: Structure, prediction: StructurePrediction) -> None:
        if not math.isfinite(error.badness):
            return
        entry = (error.badness, -error.index, error, structure, prediction)
        if len(self._heap) < WORST:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def frames(self) -> list[FrameError]:
        return [entry[2] for entry in sorted(self._heap, reverse=True)]

    def text(self) -> str:
        """Format the frames: predictions as results, labels as ``reference_…``."""
        ordered = sorted(self._heap, key=lambda entry: entry[:2], reverse=True)
        return "".join(extxyz_text(_annotated(*entry[2:])) for entry in ordered)


def _annotated(error: FrameError, structure: Structure, prediction: StructurePrediction) -> Atoms:
    atoms = with_results(
        structure.to_atoms(), prediction.results(), index=error.index, source=error.name
    )
    atoms.info["force_rmse"] = error.forces
    atoms.info["energy_error_per_atom"] = error.energy
    if structure.energy is not None:
        atoms.info["reference_energy"] = structure.energy
    if structure.forces is not None:
        atoms.arrays["reference_forces"] = np.array(structure.forces)
    if structure.stress is not None:
        atoms.info["reference_stress"] = np.array(structure.stress)
    return atoms


def _write(report: EvaluationReport, worst: _Worst, folder: Path, plots: bool) -> None:
    with atomic_write(folder / "report.json", "w") as file:
        json.dump(report.to_dict(), file, indent=1, ensure_ascii=False)
    with atomic_write(folder / "worst.extxyz", "w") as file:
        file.write(worst.text())
    if plots:
        errors = {name: table.summary() for name, table in report.overall.items()}
        save_parity_plot(report.points, errors, folder / "parity.png")
