"""What a model with heads for forces and stress returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DirectPrediction(NamedTuple):
    """Outputs of a model with direct heads, in units the surrounding potential scales by.

    energies: [N]. forces: [N, 3]; of corrupted atoms in denoising, their noise instead, divided by
    its standard deviation. stress: [B, 3, 3], tension positive, or None without such a head.
    """

    energies: Tensor
    forces: Tensor
    stress: Tensor | None
