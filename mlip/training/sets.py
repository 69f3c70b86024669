"""Open the data sets of a run and divide them into training, validation and test set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mlip.datasets import LabelKeys, split_indices
from mlip.datasets.collection import open_files, warn_of
from mlip.datasets.dataset import ConcatenatedDataset, Dataset, SelectedDataset
from mlip.datasets.feed.mixture import Relabelled
from mlip.datasets.options import ReadOptions
from mlip.datasets.policy import BadEntries
from mlip.datasets.read import expand
from mlip.errors import DataError, InputError
from mlip.training.config import DataConfig, SetConfig
from mlip.training.data import GraphMemory, GraphSet, Part, survey_part


@dataclass(frozen=True)
class Splits:
    """Training set, validation and test sets (one for each data set that they come from).

    Attributes:
        train: all training sets, mixed.
        valid: validation sets.
        test: test sets, possibly none.
        conventions: energy convention of each data set, by split and name.
        bad: structures that were left out.
    """

    train: GraphSet
    valid: tuple[GraphSet, ...]
    test: tuple[GraphSet, ...]
    conventions: dict[tuple[str, str], str]
    bad: BadEntries = field(default_factory=BadEntries)

    def entries(self) -> int:
        """Count all entries of the files, also those that were left out."""
        return sum(len(graphs) for _, graphs in self.all()) + len(self.bad.entries)

    def all(self) -> Iterator[tuple[str, GraphSet]]:
        """Give every set with the split that it belongs to."""
        yield "train", self.train
        for split, sets in (("valid", self.valid), ("test", self.test)):
            for each in sets:
                yield split, each


def open_splits(
    config: DataConfig, cutoff: float, seed: int, bad: BadEntries | None = None
) -> Splits:
    """Read the data sets of a run and build their graphs.

    Args:
        config: which data sets.
        cutoff: neighbour cutoff of the graphs, Å.
        seed: of the division into training and validation set.
        bad: takes note of structures that cannot be used; None raises.

    Raises:
        DataError: a file that cannot be read, a set without labels, a bad structure (if `bad`
            says to raise).
        InputError: unknown label keys, an energy convention or IS2RE frame that nobody stated.
    """
    bad = bad or BadEntries()
    conventions: dict[tuple[str, str], str] = {}
    opened: dict[str, list[tuple[SetConfig, Dataset]]] = {}
    for split in ("train", "valid", "test"):
        opened[split] = []
        for each in config.sets(split):
            dataset = _open(each, config, bad)
            conventions[split, str(each.name)] = _convention(each, dataset)
            opened[split].append((each, dataset))
    if config.valid is None:
        opened["valid"] = []
        for place, (each, dataset) in enumerate(opened["train"]):
            chosen, held_out = _hold_out(each, dataset, config.valid_fraction, seed)
            opened["train"][place] = (each, chosen)
            opened["valid"].append((each, held_out))
            conventions["valid", str(each.name)] = conventions["train", str(each.name)]
    limit = config.memory_limit_GB * 1e9
    found = {
        split: _survey(
            sets, split, cutoff, limit, bad, config.max_edges if split == "train" else None
        )
        for split, sets in opened.items()
    }
    return Splits(
        GraphSet(found["train"], cutoff),
        tuple(GraphSet([part], cutoff) for part in found["valid"]),
        tuple(GraphSet([part], cutoff) for part in found["test"]),
        conventions,
        bad,
    )


def _open(each: SetConfig, config: DataConfig, bad: BadEntries) -> Dataset:
    keys = _label_keys(config.keys) or LabelKeys()
    options = ReadOptions(keys, each.energy_convention, each.is2re)
    dataset = open_files(expand(each.paths), options, bad)
    warn_of(dataset.facts.problems)
    if dataset.facts.relaxation_frame == "unstated":
        raise InputError(
            f"{each.paths[0]}: these IS2RE entries hold the first positions with the last energy, "
            "which is no energy of those positions: say which frame to train on, "
            "data.is2re=initial or data.is2re=relaxed"
        )
    return dataset if each.labels is None else Relabelled(dataset, each.labels)


def _convention(each: SetConfig, dataset: Dataset) -> str:
    """Give ``"total"`` or ``"adsorption"``, as the files or the settings say.

    Raises:
        InputError: neither says, or they contradict each other or themselves.
    """
    if each.labels is not None and "energy" not in each.labels:
        return "none"
    first = each.paths[0]
    found = {kind for kind in _stated(dataset) if kind is not None}
    if "unstated" in found:
        raise InputError(
            f"{first}: OC20 files do not say whether their energies are adsorption energies or "
            "total energies: set  data.energy_convention=adsorption  or  "
            "data.energy_convention=total  (or energy_convention of this set)"
        )
    stated = each.energy_convention
    if len(found) > 1 or (stated is not None and found - {stated}):
        said = f", data.energy_convention is {stated}" if stated else ""
        raise InputError(
            f"{first}: the files say that their energies are {' and '.join(sorted(found))}{said}: "
            "only one kind can be in one set"
        )
    return found.pop() if found else stated or "total"


def _stated(dataset: Dataset) -> Iterator[str | None]:
    if isinstance(dataset, ConcatenatedDataset):
        for part in dataset.parts:
            yield from _stated(part)
    elif isinstance(dataset, Relabelled | SelectedDataset):
        yield from _stated(dataset.base)
    else:
        yield dataset.facts.energy_convention


def _hold_out(
    each: SetConfig, dataset: Dataset, fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    if len(dataset) < 2:
        raise DataError(
            f"{each.paths[0]} holds {len(dataset)} structure: at least 2 are needed, one to "
            "validate on; or name a validation set  (data.valid)"
        )
    chosen, held_out = split_indices(len(dataset), fraction, seed)
    return SelectedDataset(dataset, chosen), SelectedDataset(dataset, held_out)


def _survey(
    sets: list[tuple[SetConfig, Dataset]],
    split: str,
    cutoff: float,
    limit: float,
    bad: BadEntries,
    max_edges: int | None,
) -> list[Part]:
    memory, parts, start = GraphMemory(limit), [], 0
    for each, dataset in sets:
        name = str(each.name)
        part = survey_part(
            name, dataset, cutoff, memory, bad, start=start if split == "train" else 0,
            weight=each.weight, max_edges=max_edges,
        )  # fmt: skip
        start += len(part.dataset)
        _check(part, f"data.{split}" + (f" ({name})" if len(sets) > 1 else ""))
        parts.append(part)
    return parts


def _check(part: Part, name: str) -> None:
    if len(part.dataset) == 0:
        raise DataError(f"{name} holds no structures that can be used")
    if not part.survey.labelled:
        raise DataError(
            f"{name}: none of {len(part.dataset)} structures has an energy, forces or stress; name "
            "the keys that hold them (data.keys), or look at them with  mlip convert"
        )


def _label_keys(keys: dict[str, str] | None) -> LabelKeys | None:
    if keys is None:
        return None
    known = tuple(LabelKeys.__dataclass_fields__)
    unknown = [name for name in keys if name not in known]
    if unknown:
        raise InputError(f"data.keys: unknown label {unknown[0]!r}, known: {', '.join(known)}")
    return LabelKeys(**keys)
