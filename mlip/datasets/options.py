"""What a user says about files whose content can be read in more than one way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from mlip.datasets.labels import LabelKeys
from mlip.errors import InputError

EnergyConvention = Literal["total", "adsorption"]
RelaxationFrame = Literal["initial", "relaxed"]


@dataclass(frozen=True)
class ReadOptions:
    """Settle what files leave open; the defaults never guess.

    Args:
        keys: keys of the labels, where the usual names do not fit (files that ASE reads).
        energy_convention: what the energies of OC20-style files are: ``"adsorption"`` (clean slab
            and gas references subtracted) or ``"total"``. The files do not say; None leaves it
            unstated. For raw OC20 text, which has both, it picks the one.
        is2re: which frame of an IS2RE entry is meant: ``"initial"`` (positions, forces and energy
            of the first frame) or ``"relaxed"`` (positions and energy of the last). None gives
            the task as published: first positions and forces, last energy; not for training a
            potential, because the energy is not that of the positions.

    Raises:
        InputError: an unknown choice.
    """

    keys: LabelKeys = field(default_factory=LabelKeys)
    energy_convention: EnergyConvention | None = None
    is2re: RelaxationFrame | None = None

    def __post_init__(self) -> None:
        for name, kind in (("energy_convention", EnergyConvention), ("is2re", RelaxationFrame)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise InputError(f"{name} is {value!r}, expected {' or '.join(get_args(kind))}")
