"""What meets at each atom, in order: sums over unsorted edges without atomics."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

MOST = 8  # orders that are kept, with the indices that they belong to

Slots = tuple[Tensor, Tensor]
_lock = threading.Lock()
_known: OrderedDict[tuple[object, ...], tuple[Tensor, Slots]] = OrderedDict()


def slots(index: Tensor, n_segments: int) -> Slots:
    """Order the places of an index by what they point to; equal ones stay in sequence.

    Layers ask for the same edges again and again: the last answers are kept, for the stream that
    made them. They hold their index, so that no other one can lie at its address.

    Args:
        index: [...] 0 … n_segments − 1, int64.
        n_segments: number of segments, empty ones included.

    Returns:
        order: places in the flattened index, segment after segment; first: [n_segments + 1] where
        each segment begins in ``order``, and its length.
    """
    key = _key(index, n_segments)
    with _lock:
        if key is not None and key in _known:
            _known.move_to_end(key)
            return _known[key][1]
    found = _sorted(index, n_segments)
    if key is not None:
        with _lock:
            _known[key] = index.detach(), found
            while len(_known) > MOST:
                _known.popitem(last=False)
    return found


def _sorted(index: Tensor, n_segments: int) -> Slots:
    values, order = torch.sort(index.reshape(-1), stable=True)
    first = torch.searchsorted(values, torch.arange(n_segments + 1, device=index.device))
    return order, first


def _key(index: Tensor, n_segments: int) -> tuple[object, ...] | None:
    """What tells indices apart while they live; None: do not keep the answer.

    A CUDA graph must not depend on memory that it does not own.
    """
    if index.is_inference():
        return None
    stream = None
    if index.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(index.device).cuda_stream
    place = (index.data_ptr(), index._version, tuple(index.shape), index.stride())
    return (*place, index.device, stream, n_segments)
