"""Fresh memory for the results of kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 22  # bytes; from here on NumPy asks for huge pages
LINE = 64  # bytes of a cache line


def empty_for(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a tensor with any content, in the precision of another; large ones in huge pages.

    Large blocks come fresh from the system each time, and a system that hands them out in pages of
    4 kB takes longer for that than a kernel for filling them. NumPy asks for pages of 2 MB, where
    there are such; PyTorch does not.
    """
    n_bytes = math.prod(shape) * like.element_size()
    if n_bytes < LARGE:
        return like.new_empty(tuple(shape))
    block = np.empty(n_bytes + LINE, dtype=np.uint8)
    skip = -block.ctypes.data % LINE
    return torch.from_numpy(block[skip : skip + n_bytes]).view(like.dtype).view(tuple(shape))
