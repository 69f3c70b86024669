"""Evaluate a potential on any number of structures, in batches; one bad structure harms no other.

Comparison with labels is in evaluate.py.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from mlip.errors import InputError, MlipError
from mlip.graph import AtomicGraph, as_atoms, atoms_to_graph, batch_graphs
from mlip.potential import Potential, load_potential
from mlip.simulation.inputs import NamedStructure, iter_structures
from mlip.simulation.output import ResumableFiles, check_not_input, extxyz_text, with_results
from mlip.simulation.relax_summary import csv_line

Item = TypeVar("Item")

# Edges of one batch: enough to fill a few cores, a few hundred MB of memory.
MAX_EDGES = 20_000


class StructurePrediction(NamedTuple):
    """What a potential says of one structure, or why it says nothing.

    energy: eV. energies: [N] eV. forces: [N, 3] eV/Å. stress: [3, 3] eV/Å³, tension positive, None
    unless periodic in three directions, or if the potential has none. error: None if all went
    well, else the reason.
    """

    energy: float = math.nan
    energies: np.ndarray | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    error: str | None = None

    def results(self) -> dict[str, Any]:
        """Name the values as ASE calculators do (stress in Voigt order)."""
        results = {"energy": self.energy, "free_energy": self.energy, "energies": self.energies}
        results["forces"] = self.forces
        if self.stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(self.stress)
        return results


@dataclass(frozen=True)
class PredictSummary:
    """Counts of a finished prediction; ``failed`` structures are in ``errors_file``."""

    structures: int
    failed: int
    errors_file: Path


def predict_batch(
    structures: Sequence[Any], potential: Potential, *, max_edges: int = MAX_EDGES
) -> list[StructurePrediction]:
    """Predict energy, forces and stress of structures in memory.

    Args:
        structures: ASE atoms or pymatgen structures.
        potential: evaluated on its own device, in its own precision.
        max_edges: edges of one batch; a larger structure is a batch of its own.
    """
    batches = predict_stream(
        structures, lambda item: atoms_to_graph(item, potential.cutoff), potential, max_edges
    )
    return [prediction for batch in batches for _, prediction in batch]


def predict(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    potential: Potential | str | os.PathLike[str],
    *,
    max_edges: int = MAX_EDGES,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictSummary:
    """Predict every structure of the files, however many, and write them with the results.

    Args:
        inputs: files that ASE reads, native stores, or patterns.
        output: extxyz file; structures keep their order, and get their number in ``index``. Beside
            it, ``.errors.csv`` names the structures that failed, and why, and ``.json`` is the
            record of the run.
        potential: potential, path of one, or name of a shipped one.
        max_edges: edges of one batch.
        resume: go on where a killed run with the same inputs and potential stopped.
        on_progress: called after each batch with the structures done and failed so far.

    Raises:
        DataError: an input file is missing, empty or of no known format.
        InputError: the output would replace an input, or the run to be resumed differs.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    path = Path(output)
    check_not_input(path, paths)
    model = potential if isinstance(potential, Potential) else load_potential(potential)
    structures = iter_structures(paths)
    errors = path.with_suffix(".errors.csv")
    record = {
        "inputs": [str(item) for item in paths],
        "potential": model.model_hash(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    files = ResumableFiles([path, errors], path.with_suffix(".json"), record, resume)
    with files:
        counts = files.counts or {"failed": 0}
        remaining = enumerate(itertools.islice(structures, files.done, None), files.done)
        if not files.finished:
            for batch in predict_stream(remaining, _graph_maker(model.cutoff), model, max_edges):
                for (index, (name, item)), prediction in batch:
                    counts["failed"] += prediction.error is not None
                    files.append(*_texts(index, name, item, prediction))
                files.commit(files.done + len(batch), counts)
                if on_progress is not None:
                    on_progress(files.done, counts["failed"])
            files.finish()
    return PredictSummary(files.done, counts["failed"], errors)


def predict_stream(
    items: Iterable[Item],
    to_graph: Callable[[Item], AtomicGraph],
    potential: Potential,
    max_edges: int = MAX_EDGES,
) -> Iterator[list[tuple[Item, StructurePrediction]]]:
    """Yield items with their predictions in order, a batch at a time.

    Args:
        items: anything ``to_graph`` takes.
        to_graph: makes the graph of an item; an error that it raises becomes the item's.
        potential: evaluated on its own device.
        max_edges: edges of one batch.

    Raises:
        InputError: ``max_edges`` is not positive.
    """
    if max_edges < 1:
        raise InputError(f"max_edges is {max_edges}; give 1 or more")
    batch: list[tuple[Item, AtomicGraph | str]] = []
    edges = 0
    for item in items:
        graph = _graph_or_error(item, to_graph, potential)
        size = 0 if isinstance(graph, str) else graph.edge_index.shape[1] + len(graph.positions)
        if batch and edges + size > max_edges:
            yield _evaluate_batch(batch, potential)
            batch, edges = [], 0
        batch.append((item, graph))
        edges += size
    if batch:
        yield _evaluate_batch(batch, potential)


def _graph_or_error(
    item: Item, to_graph: Callable[[Item], AtomicGraph], potential: Potential
) -> AtomicGraph | str:
    try:
        graph = to_graph(item)
        potential.check_elements(graph.atomic_numbers)
    except MlipError as error:
        return " ".join(str(error).split())
    return graph


def _evaluate_batch(
    batch: Sequence[tuple[Item, AtomicGraph | str]], potential: Potential
) -> list[tuple[Item, StructurePrediction]]:
    graphs = [graph for _, graph in batch if not isinstance(graph, str)]
    predictions = iter(_evaluate_graphs(graphs, potential))
    return [
        (item, StructurePrediction(error=graph) if isinstance(graph, str) else next(predictions))
        for item, graph in batch
    ]


def _evaluate_graphs(
    graphs: Sequence[AtomicGraph], potential: Potential
) -> list[StructurePrediction]:
    """Evaluate graphs together; if that fails (memory), halves, down to the one to blame."""
    if not graphs:
        return []
    try:
        prediction = potential(batch_graphs(graphs).to(potential.device))
        return _split(prediction, graphs, potential.has_stress)
    except (RuntimeError, MemoryError, MlipError) as error:
        if len(graphs) == 1:
            reason = f"{type(error).__name__}: {error}"
            return [StructurePrediction(error=" ".join(reason.split()))]
    half = len(graphs) // 2
    return _evaluate_graphs(graphs[:half], potential) + _evaluate_graphs(graphs[half:], potential)


def _split(
    prediction: Any, graphs: Sequence[AtomicGraph], has_stress: bool
) -> list[StructurePrediction]:
    sizes = [len(graph.positions) for graph in graphs]
    energies = [part.numpy() for part in torch.split(prediction.energies.cpu(), sizes)]
    forces = [part.numpy() for part in torch.split(prediction.forces.cpu(), sizes)]
    energy, stress = prediction.energy.cpu().numpy(), prediction.stress.cpu().numpy()
    found = []
    for k, graph in enumerate(graphs):
        periodic = has_stress and bool(graph.pbc.all())
        one = StructurePrediction(
            float(energy[k]), energies[k], forces[k], stress[k] if periodic else None
        )
        finite = math.isfinite(one.energy) and np.isfinite(forces[k]).all()
        if not finite or (periodic and not np.isfinite(stress[k]).all()):
            one = StructurePrediction(error="the potential gave numbers that are not finite")
        found.append(one)
    return found


def _graph_maker(cutoff: float) -> Callable[[tuple[int, NamedStructure]], AtomicGraph]:
    def make(item: tuple[int, NamedStructure]) -> AtomicGraph:
        content = item[1][1]
        if isinstance(content, Exception):
            raise content
        return atoms_to_graph(content, cutoff)

    return make


def _texts(
    index: int, name: str, item: Atoms | Exception, prediction: StructurePrediction
) -> tuple[str, str]:
    """Format one structure: a frame and no error, or no frame and a line of the errors file."""
    if prediction.error is not None:
        return "", csv_line([index, name, prediction.error])
    frame = with_results(as_atoms(item), prediction.results(), index=index)
    return extxyz_text(frame), ""
