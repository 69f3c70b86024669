"""Several data sets in one training set: which labels count, one zero of energy, how often each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mlip.datasets.dataset import Dataset, DatasetFacts, StructureSequence
from mlip.datasets.structure import LABELS, Array, Structure
from mlip.errors import InputError


class Relabelled(StructureSequence):
    """A data set some of whose labels are left out, and whose energies have another zero.

    Args:
        base: the data set.
        labels: labels that are kept, of energy, forces and stress; None keeps all.
        energy_shift: eV added to the energy for each atom of an element, by atomic number.

    Raises:
        InputError: an unknown label.
    """

    def __init__(
        self,
        base: Dataset,
        labels: Collection[str] | None = None,
        energy_shift: Mapping[int, float] | None = None,
    ) -> None:
        self.base = base
        unknown = sorted(set(labels or ()) - set(LABELS))
        if unknown:
            raise InputError(f"{unknown[0]!r} is no label, expected some of {', '.join(LABELS)}")
        self.dropped = () if labels is None else tuple(x for x in LABELS if x not in labels)
        self.energy_shift = dict(energy_shift or {})

    @property
    def facts(self) -> DatasetFacts:
        """Tell what the data set below says."""
        return self.base.facts

    def __len__(self) -> int:
        return len(self.base)

    def read(self, index: int) -> Structure:
        """Read the entry at a place from 0 to the length, with the labels and zero of this set."""
        found = self.base[index]
        changes: dict[str, object] = dict.fromkeys(self.dropped)
        if found.energy is not None and "energy" not in self.dropped:
            changes["energy"] = found.energy + shift_of(found.numbers, self.energy_shift)
        return Structure.trusted(**{**vars(found), **changes})

    def n_atoms(self) -> Array:
        """Give the number of atoms of every structure, [len] int64."""
        return self.base.n_atoms()

    def name(self, index: int) -> str:
        """Name the file and the place in it that a structure comes from."""
        return self.base.name(index)

    def fingerprint(self) -> str:
        """Identify content and changes."""
        changes = "".join(f"-{x}" for x in self.dropped)
        shift = ",".join(f"{z}:{e!r}" for z, e in sorted(self.energy_shift.items()))
        return f"{self.base.fingerprint()}{changes}{f'+{shift}' if shift else ''}"


def shift_of(numbers: Array, shift: Mapping[int, float]) -> float:
    """Add up the shift (eV per atom of each element) of a structure with atomic numbers [N].

    Raises:
        InputError: an element without a shift, unless there is none at all.
    """
    if not shift:
        return 0.0
    counts = np.bincount(numbers)
    try:
        return float(sum(int(counts[z]) * shift[z] for z in np.flatnonzero(counts).tolist()))
    except KeyError as error:
        raise InputError(f"the energy shift has no value for atomic number {error}") from None


def appearance_weights(lengths: Sequence[int], weights: Sequence[float]) -> Array | None:
    """Give every structure of several sets the weight of its set, [sum] float32.

    Returns:
        None if all weights are 1.
    """
    if all(weight == 1 for weight in weights):
        return None
    return np.repeat(np.array(weights, dtype=np.float32), lengths)
