"""What happens to entries of a data set that cannot be used: raise, skip, or skip and list."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple, get_args

import numpy as np

from mlip.datasets.dataset import Dataset, SelectedDataset
from mlip.errors import DataError, InputError
from mlip.files import atomic_write

Policy = Literal["raise", "skip", "quarantine"]
_NAMED = 3  # bad entries that a summary quotes


class BadEntry(NamedTuple):
    """Where an entry is and why it cannot be used."""

    file: str
    entry: str
    reason: str


class BadEntries:
    """Collect bad entries, or raise on the first.

    Args:
        policy: ``"raise"``, ``"skip"``, or ``"quarantine"`` (skip and list them in a file).
        path: file of the list (tab-separated: file, entry, reason); for ``"quarantine"`` only.

    Raises:
        InputError: an unknown policy, or a list file that is missing or has no use.
    """

    def __init__(self, policy: Policy = "raise", path: str | os.PathLike[str] | None = None):
        if policy not in get_args(Policy):
            raise InputError(f"policy is {policy!r}, expected {', '.join(get_args(Policy))}")
        if (policy == "quarantine") != (path is not None):
            raise InputError("name a file for the list with the policy 'quarantine', and only then")
        self.policy = policy
        self.path = path
        self.entries: list[BadEntry] = []

    def add(self, name: str, error: Exception | str) -> None:
        """Take note of a bad entry.

        Args:
            name: its name as ``Dataset.name`` gives it.
            error: what is wrong with it, with or without the name in front.

        Raises:
            DataError: the policy is ``"raise"``.
        """
        reason = str(error).removeprefix(name).lstrip(": ")
        if self.policy == "raise":
            raise DataError(f"{name}: {reason}")
        file, *place = name.rsplit(" ", 2)
        self.entries.append(BadEntry(file.rstrip(":"), " ".join(place), reason))

    def save(self) -> None:
        """Write the list file of ``"quarantine"``, also when nothing was bad."""
        if self.path is None:
            return
        with atomic_write(self.path, "w") as file:
            file.write("file\tentry\treason\n")
            for entry in self.entries:
                file.write("\t".join(" ".join(part.split()) for part in entry) + "\n")

    def summary(self, total: int) -> list[str]:
        """Say in one line how many of ``total`` entries were dropped, and name the first few."""
        if not self.entries:
            return []
        first = "; ".join(f"{e.file} {e.entry}: {e.reason}" for e in self.entries[:_NAMED])
        more = ", ..." if len(self.entries) > _NAMED else ""
        listed = f" (all are listed in {self.path})" if self.path is not None else ""
        return [f"{len(self.entries)} of {total} entries were dropped{listed}: {first}{more}"]


def drop_bad(dataset: Dataset, bad: BadEntries, already_dropped: int = 0) -> Dataset:
    """Read every entry once and leave out those that cannot be used.

    Args:
        dataset: what was opened.
        bad: takes note of what is left out.
        already_dropped: bad entries that were dropped when files were read whole.

    Raises:
        DataError: nothing is left.
    """
    good: list[int] = []
    sizes: list[int] = []
    for i in range(len(dataset)):
        try:
            sizes.append(len(dataset[i]))
        except DataError as error:
            bad.add(dataset.name(i), error)
        else:
            good.append(i)
    bad.save()
    if not bad.entries:
        return dataset
    problems = bad.summary(len(dataset) + already_dropped)
    if not good:
        raise DataError(f"nothing is left of the data: {problems[0]}")
    return SelectedDataset(
        dataset, np.array(good), n_atoms=np.array(sizes, dtype=np.int64), problems=problems
    )
