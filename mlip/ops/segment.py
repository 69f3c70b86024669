"""Sums over groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Sum rows that share an index.

    Args:
        values: [E, ...].
        index: [E] segment of each row, int64.
        n_segments: number of segments, empty ones included.

    Returns:
        [n_segments, ...] in the dtype of ``values``.
    """
    out = values.new_zeros((n_segments, *values.shape[1:]))
    return torch.index_add(out, 0, index, values)
