"""What is known of the inputs of a conversion before their frames are read, and what must be said.

Energies of OC20-style files are adsorption or total energies, and IS2RE entries hold two frames:
the files do not tell which, so that the user has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlip.datasets.dataset import ConcatenatedDataset, Dataset, DatasetFacts
from mlip.datasets.folders import folder_files
from mlip.datasets.formats.npz import SIZES_FILE, verified_sizes
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import find_reader
from mlip.errors import DataError

STORE = "mlip store"
EVIDENCE = 50  # entries that are looked at
CARRIED = ("level_of_theory", "licence")  # facts of stores that the output states again


@dataclass(frozen=True)
class Sources:
    """Facts of all inputs.

    Attributes:
        lengths: frames of each input, None where only reading to the end would tell.
        energy_convention: of all of them; None if nothing is known.
        problems: what is wrong with files but leaves their frames readable.
        carried: level of theory and licence, where inputs state them.
    """

    lengths: tuple[int | None, ...]
    energy_convention: str | None
    problems: tuple[str, ...]
    carried: dict[str, Any]


def inspect_sources(files: Sequence[Path], options: ReadOptions) -> Sources:
    """Open each input once; one that cannot be opened counts as unknown.

    Raises:
        DataError: a file does not exist, what its energies or frames are is not said, or inputs
            state different conventions, levels of theory or licences.
    """
    opened: list[Dataset | None] = []
    problems: list[str] = []
    carried: dict[str, tuple[Path, Any]] = {}
    conventions: dict[str | None, Path] = {}
    for path in files:
        if not path.exists():
            raise DataError(f"{path}: there is no such file")
        dataset, facts = _inspect(path, options)
        opened.append(dataset)
        for name, value in _facts_to_carry(dataset).items():
            first = carried.setdefault(name, (path, value))
            if first[1] != value:
                raise DataError(
                    f"{first[0]} states the {name} {first[1]!r} and {path} {value!r}: they cannot "
                    "be put into one data set"
                )
        problems += facts.problems
        conventions.setdefault(facts.energy_convention, path)
    return Sources(
        tuple(None if dataset is None else len(dataset) for dataset in opened),
        _common(conventions, options),
        (*problems, *_size_tables(files, opened)),
        {name: value for name, (_, value) in carried.items()},
    )


def _inspect(path: Path, options: ReadOptions) -> tuple[Dataset | None, DatasetFacts]:
    """Open a file, if its format allows that, and give what is known of it."""
    try:
        reader = find_reader(path)
        if reader.open is None:
            facts = reader.facts(options) if reader.facts else DatasetFacts(reader.name)
            return None, facts
        dataset = reader.open(path, options)
    except DataError:
        return None, DatasetFacts("unreadable")  # reading it will say what is wrong
    if dataset.facts.energy_convention == "unstated":
        raise DataError(_ask_for_convention(path, dataset))
    if dataset.facts.relaxation_frame == "unstated":
        raise DataError(
            f"{path} holds relaxations (IS2RE): say which frame is meant: --is2re initial "
            "(first positions, forces and energy) or --is2re relaxed (last positions and energy, "
            "no forces)"
        )
    return dataset, dataset.facts


def _facts_to_carry(dataset: Dataset | None) -> dict[str, Any]:
    stated = {} if dataset is None else stated_metadata(dataset)
    return {name: stated[name] for name in CARRIED if stated.get(name)}


def _size_tables(files: Sequence[Path], opened: Sequence[Dataset | None]) -> list[str]:
    """Compare the tables of sizes beside whole folders of data with these data."""
    problems: list[str] = []
    for folder in dict.fromkeys(file.parent for file in files):
        members = [i for i, file in enumerate(files) if file.parent == folder]
        parts = [dataset for dataset in (opened[i] for i in members) if dataset is not None]
        table = folder / SIZES_FILE
        if not table.is_file() or len(parts) < len(members):
            continue
        try:
            whole = folder_files(folder) == [files[i] for i in members]
        except DataError:
            continue  # of several kinds of data one was chosen
        if whole:
            problems += verified_sizes(table, ConcatenatedDataset(parts))[1]
    return problems


def stated_metadata(dataset: Dataset) -> dict[str, Any]:
    """Give what the file of a data set states about its content; empty for most formats."""
    metadata: dict[str, Any] = getattr(dataset, "metadata", {})
    return metadata.get("user", {}) if dataset.facts.format == STORE else metadata


def _ask_for_convention(path: Path, dataset: Dataset) -> str:
    energies: list[float] = []
    for i in np.unique(np.linspace(0, len(dataset) - 1, EVIDENCE).astype(int)).tolist():
        try:
            structure = dataset[i]
        except DataError:
            continue
        if structure.energy is not None:
            energies.append(abs(structure.energy) / len(structure))
    found = "none of the entries looked at has an energy"
    if energies:
        found = (
            f"the median of |energy| is {np.median(energies):.3g} eV per atom in the "
            f"{len(energies)} entries looked at (total DFT energies have several eV per atom, "
            "adsorption energies a small fraction of one)"
        )
    return (
        f"{path} does not say whether its energies are adsorption energies (clean slab and gas "
        f"references subtracted) or total energies, and {found}: say it with "
        "--energy-convention adsorption or --energy-convention total"
    )


def _common(conventions: dict[str | None, Path], options: ReadOptions) -> str | None:
    """Give the one convention of all inputs; what is not known counts as said by the user."""
    unknown = conventions.pop(None, None)
    stated = options.energy_convention
    for convention, path in conventions.items():
        if stated is not None and convention != stated:
            raise DataError(
                f"{path} holds {convention} energies, not {stated} ones as --energy-convention says"
            )
    if len(conventions) > 1:
        (first, one), (second, other) = conventions.items()
        raise DataError(
            f"{one} holds {first} energies and {other} {second} ones: they cannot be mixed"
        )
    only = next(iter(conventions), None)
    if only == "adsorption" and unknown is not None and stated is None:
        raise DataError(
            f"{next(iter(conventions.values()))} holds adsorption energies and {unknown} others: "
            "they cannot be mixed (if all are adsorption energies: --energy-convention adsorption)"
        )
    return stated or only
