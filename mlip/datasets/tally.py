"""Count what the entries of a data set hold, one entry at a time, for the report of a check."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from typing import Any

import numpy as np

from mlip.datasets.read import Entry
from mlip.datasets.statistics import Statistics
from mlip.datasets.structure import LABELS, Array, Structure
from mlip.errors import InputError
from mlip.graph import pair_distances

NAMED = 1000  # bad entries and missing labels that are named; all are counted
KINDS = 10_000  # different values (charges, tags, extras) that are counted apart
OPTIONAL = ("tags", "fixed", "charge", "spin")
PBC_NAMES = np.array(["F", "T"])


class Tally:
    """Counters over the entries taken so far: some 70 bytes a structure.

    Args:
        cutoff: count neighbours within this distance, Å; None leaves them out.
    """

    def __init__(self, cutoff: float | None = None) -> None:
        self.cutoff = cutoff
        self.statistics = Statistics()
        self.done = 0
        self.bad = 0
        self.problems: list[str] = []
        self.label_keys: dict[str, Counter[str]] = {label: Counter() for label in LABELS}
        self.missing: dict[str, list[tuple[int, int]]] = {label: [] for label in LABELS}
        self.not_kept: Counter[str] = Counter()
        self.hints: list[str] = []
        self.pbc: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.values: dict[str, Counter[str]] = {name: Counter() for name in OPTIONAL}
        self.extras: Counter[str] = Counter()
        self.isolated = 0
        self._frames = array("Q")
        self._names = array("Q")
        self._neighbors = array("f")

    def take(self, entry: Entry, file: int) -> bool:
        """Count one entry of the input number ``file``; tell whether it is good."""
        self.done += 1
        problem = entry.problem
        if entry.structure is not None:
            try:
                around = self._around(entry.structure)
                self.statistics.add(entry.structure, file)
            except InputError as error:
                problem = f"{entry.name}: {error}"
            else:
                self._count(entry, entry.structure, file)
                if around is not None:
                    self._neighbors.append(around[0])
                    self.isolated += around[1]
                return True
        self.bad += 1
        if len(self.problems) < NAMED:
            self.problems.append(problem or entry.name)
        return False

    def frames(self) -> Array:
        """Give the place of every good structure in its file."""
        return np.array(self._frames, dtype=np.int64)

    def neighbors(self) -> Array:
        """Give the mean number of neighbours of the atoms of every structure."""
        return np.array(self._neighbors)

    def named_twice(self) -> tuple[int, int, list[int]]:
        """Count named structures, those whose name came before, and list the latter.

        A name is sid and fid together, sid alone, or id.
        """
        names = np.array(self._names, dtype=np.uint64)
        named = np.flatnonzero(names)
        _, first = np.unique(names[named], return_index=True)
        repeated = np.delete(named, first)
        return len(named), len(repeated), repeated.tolist()

    def _count(self, entry: Entry, s: Structure, file: int) -> None:
        self._frames.append(entry.frame)
        self._names.append(_name_hash(s.info))
        for label in LABELS:
            if getattr(s, label) is None:
                if len(self.missing[label]) < NAMED:
                    self.missing[label].append((file, entry.frame))
            else:
                self.label_keys[label][entry.used.get(label, label)] += 1
        self.not_kept.update(entry.not_kept)
        self.hints += [h for h in entry.hints if h not in self.hints][: 20 - len(self.hints)]
        self.pbc["".join(PBC_NAMES[s.pbc.astype(int)])] += 1
        self._count_optional(s)
        for name in s.info:
            if name in self.extras or len(self.extras) < KINDS:
                self.extras[name] += 1

    def _around(self, s: Structure) -> tuple[float, int] | None:
        """Give the mean number of neighbours and the number of atoms that have none."""
        if self.cutoff is None:
            return None
        (_, target), _ = pair_distances(s.positions, s.cell, s.pbc, self.cutoff)
        return len(target) / len(s), len(s) - len(np.unique(target))

    def _count_optional(self, s: Structure) -> None:
        for name in OPTIONAL:
            value: Any = getattr(s, name)
            if value is None:
                continue
            self.present[name] += 1
            counts = self.values[name]
            if isinstance(value, float):
                if f"{value:g}" in counts or len(counts) < KINDS:
                    counts[f"{value:g}"] += 1
            else:
                for kind, number in zip(*np.unique(value, return_counts=True), strict=True):
                    if str(kind) in counts or len(counts) < KINDS:
                        counts[str(kind)] += int(number)


def _name_hash(info: dict[str, Any]) -> int:
    """Hash what names a structure in its data set; 0 for none."""
    sid = info.get("sid", info.get("id"))
    if sid is None:
        return 0
    digest = hashlib.blake2b(repr((sid, info.get("fid"))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
