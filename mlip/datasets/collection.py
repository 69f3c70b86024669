"""Open data sets as sequences of structures, whatever files they come from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from mlip.datasets.dataset import ConcatenatedDataset, Dataset, DatasetFacts, LoadedDataset
from mlip.datasets.folders import folder_files
from mlip.datasets.formats.npz import SIZES_FILE, verified_sizes
from mlip.datasets.labels import LabelKeys
from mlip.datasets.options import EnergyConvention, ReadOptions, RelaxationFrame
from mlip.datasets.policy import BadEntries, Policy, drop_bad
from mlip.datasets.read import PathLike, expand, find_reader, iterate_file
from mlip.datasets.structure import Structure
from mlip.errors import DataError, DataWarning

_PROBLEMS_SHOWN = 10


def open_dataset(
    paths: PathLike | Sequence[PathLike],
    *,
    keys: LabelKeys | None = None,
    energy_convention: EnergyConvention | None = None,
    is2re: RelaxationFrame | None = None,
    policy: Policy = "raise",
    quarantine: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Open files as one sequence of structures.

    Formats with random access are read entry by entry; other files are read whole. Anything wrong
    with the files that leaves entries readable is in ``facts.problems`` and in one warning.

    Args:
        paths: a file, a folder (its data files in the order of their names), a pattern
            (``"data/*.extxyz"``) or a list of these.
        keys: keys of the labels, where the usual names do not fit.
        energy_convention: see :class:`~mlip.datasets.options.ReadOptions`.
        is2re: see :class:`~mlip.datasets.options.ReadOptions`.
        policy: what happens to bad entries. ``"raise"``: an error, when the entry is read (at once
            in files that are read whole). ``"skip"``: all entries are read once now and bad ones
            left out. ``"quarantine"``: the same, and they are listed in a file.
        quarantine: the file for that list (tab-separated: file, entry, reason).

    Raises:
        DataError: a file is missing, unknown or damaged, or a frame in it is bad.
        InputError: an unknown choice.
    """
    options = ReadOptions(keys or LabelKeys(), energy_convention, is2re)
    bad = BadEntries(policy, quarantine)
    dataset = open_files(expand(paths), options, bad)
    dropped = len(bad.entries)
    if policy != "raise":
        dataset = drop_bad(dataset, bad, dropped)
    warn_of(dataset.facts.problems)
    return dataset


def open_files(files: list[Path], options: ReadOptions, bad: BadEntries) -> Dataset:
    """Open files as one data set; only files that are read whole have their entries checked.

    Raises:
        DataError: a file is missing, unknown or damaged, or a frame in it is bad.
    """
    return _join(files, [_open(path, options, bad) for path in files])


def _open(path: Path, options: ReadOptions, bad: BadEntries) -> Dataset:
    reader = find_reader(path)
    if reader.open is not None:
        return reader.open(path, options)
    structures: list[Structure] = []
    names: list[str] = []
    for entry in iterate_file(path, options):
        if entry.structure is None:
            hint = " (policy='skip' and mlip convert leave bad frames out)"
            bad.add(entry.name, f"{entry.problem}{hint if bad.policy == 'raise' else ''}")
            continue
        structures.append(entry.structure)
        names.append(entry.name)
    facts = DatasetFacts(reader.name) if reader.facts is None else reader.facts(options)
    return LoadedDataset(structures, names, facts)


def _join(files: list[Path], parts: list[Dataset]) -> Dataset:
    """Put the files together; whole folders take their sizes from a size file that fits them."""
    groups: dict[Path, list[int]] = {}
    for i, file in enumerate(files):
        groups.setdefault(file.parent, []).append(i)
    joined: list[Dataset] = []
    for folder, members in groups.items():
        contiguous = members == list(range(members[0], members[-1] + 1))
        own = [parts[i] for i in members]
        table = folder / SIZES_FILE
        if contiguous and table.is_file() and _is_whole(folder, [files[i] for i in members]):
            whole = own[0] if len(own) == 1 else ConcatenatedDataset(own)
            sizes, problems = verified_sizes(table, whole)
            joined.append(ConcatenatedDataset(own, n_atoms=sizes, problems=problems))
        elif contiguous:
            joined += own
        else:
            return ConcatenatedDataset(parts)  # files of several folders in turn
    return joined[0] if len(joined) == 1 else ConcatenatedDataset(joined)


def _is_whole(folder: Path, files: list[Path]) -> bool:
    try:
        return folder_files(folder) == files
    except DataError:
        return False


def warn_of(problems: Sequence[str]) -> None:
    """Warn once of what is wrong with files that can be read all the same."""
    if not problems:
        return
    more = len(problems) - _PROBLEMS_SHOWN
    lines = [*problems[:_PROBLEMS_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    warnings.warn("\n".join(lines), DataWarning, stacklevel=3)
