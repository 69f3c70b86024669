"""Open data sets as sequences of structures, whatever files they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlip.datasets.dataset import ConcatenatedDataset, Dataset, DatasetFacts, LoadedDataset
from mlip.datasets.labels import LabelKeys
from mlip.datasets.options import EnergyConvention, ReadOptions, RelaxationFrame
from mlip.datasets.read import PathLike, expand, find_reader, iterate_file
from mlip.datasets.structure import Structure
from mlip.errors import DataError


def open_dataset(
    paths: PathLike | Sequence[PathLike],
    *,
    keys: LabelKeys | None = None,
    energy_convention: EnergyConvention | None = None,
    is2re: RelaxationFrame | None = None,
) -> Dataset:
    """Open files as one sequence of structures.

    Formats with random access are read entry by entry; other files are read whole, each frame
    checked.

    Args:
        paths: a file, a pattern (``"data/*.extxyz"``) or a list of them.
        keys: keys of the labels, where the usual names do not fit.
        energy_convention: see :class:`~mlip.datasets.options.ReadOptions`.
        is2re: see :class:`~mlip.datasets.options.ReadOptions`.

    Raises:
        DataError: a file is missing, unknown or damaged, or a frame in it is bad; converting with
            ``mlip convert`` drops bad frames and reports them instead.
    """
    options = ReadOptions(keys or LabelKeys(), energy_convention, is2re)
    parts = [_open(path, options) for path in expand(paths)]
    return parts[0] if len(parts) == 1 else ConcatenatedDataset(parts)


def _open(path: Path, options: ReadOptions) -> Dataset:
    reader = find_reader(path)
    if reader.open is not None:
        return reader.open(path, options)
    structures: list[Structure] = []
    names: list[str] = []
    for entry in iterate_file(path, options):
        if entry.structure is None:
            raise DataError(f"{entry.problem} (mlip convert drops bad frames and reports them)")
        structures.append(entry.structure)
        names.append(entry.name)
    return LoadedDataset(structures, names, DatasetFacts(reader.name))
