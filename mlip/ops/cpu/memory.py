"""Memory for the results of kernels: large blocks lie in huge pages, and are used again."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 22  # bytes; from here on NumPy asks for huge pages
LINE = 64  # bytes of a cache line
KEPT = 1 << 29  # bytes of blocks that lie free for later results, at most
SPARE = 16  # a block is a sixteenth larger than its first result: later graphs have more edges
WASTE = 1.25  # a block that is larger than this many times a result is not used for it

_free: deque[np.ndarray] = deque()  # its single operations are atomic, so it needs no lock


def empty_for(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a tensor with any content, in the precision of another; a large one in huge pages.

    Large blocks come fresh from the system each time, filled with zeros, which takes as long as
    many a kernel needs to fill them, and longer in pages of 4 kB. NumPy asks for pages of 2 MB,
    where there are such; PyTorch does not. What a tensor leaves behind, with all views of it gone,
    waits here for the next one of about its size.
    """
    n_bytes = math.prod(shape) * like.element_size()
    if n_bytes < LARGE:
        return like.new_empty(tuple(shape))
    block = _block(n_bytes + LINE)
    skip = -block.ctypes.data % LINE
    used = block[skip : skip + n_bytes]
    weakref.finalize(used, _keep, block).atexit = False  # the tensor holds `used` while it lives
    return torch.from_numpy(used).view(like.dtype).view(tuple(shape))


def _block(n_bytes: int) -> np.ndarray:
    """Give at least so many bytes, free ones if they fit."""
    for _ in range(len(_free)):
        try:
            block = _free.popleft()
        except IndexError:  # another thread took the last one
            break
        if n_bytes <= block.nbytes <= WASTE * n_bytes:
            return block
        _free.append(block)
    return np.empty(n_bytes + n_bytes // SPARE, dtype=np.uint8)


def _keep(block: np.ndarray) -> None:
    """Let a block lie free, unless it is too large; give the oldest back where that is too much."""
    if block.nbytes > KEPT:
        return
    _free.append(block)
    while sum(other.nbytes for other in list(_free)) > KEPT:
        with contextlib.suppress(IndexError):
            _free.popleft()
