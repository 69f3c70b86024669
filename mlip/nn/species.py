"""Rows of the elements that a model knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of_elements(elements: Sequence[int]) -> Tensor:
    """Row of each atomic number in tables of elements, [119] int64; -1 for those not known."""
    table = torch.full((119,), -1, dtype=torch.int64)
    table[list(elements)] = torch.arange(len(elements))
    return table
