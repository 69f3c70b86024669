"""Sums and softmax over the edges of atoms on CUDA: launches of ``kernels/segments.cu``.

Kernels of the operators ``mlip::segment_sum``, ``mlip::segment_rows`` and ``mlip::segment_shares``,
which are declared and differentiated in ``mlip.ops.cpu.segments``.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from mlip.ops.cpu.segments import csr_segment_sum, segment_rows, segment_shares
from mlip.ops.cuda.program import Program

THREADS = 128  # as in the source
LONG = 1024  # rows of a segment that are more than one thread should go through
PROGRAM = Program("segments.cu", {})


@csr_segment_sum.register_kernel("cuda")
def cuda_segment_sum(values: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:  # noqa: ARG001
    """Kernel of ``mlip::segment_sum``: long segments in equal pieces, whose sums are added up."""
    n_segments = len(rowptr) - 1
    if len(values) <= LONG * n_segments:
        return _sums(values, rowptr)
    pieces = isqrt(len(values) // n_segments)
    step = torch.arange(pieces, device=rowptr.device)
    first = rowptr[:-1, None] + rowptr.diff()[:, None] * step // pieces
    parts = _sums(values, torch.cat([first.flatten(), rowptr[-1:]]))
    return _sums(parts, pieces * torch.arange(n_segments + 1, device=rowptr.device))


def _sums(values: Tensor, rowptr: Tensor) -> Tensor:
    n_segments, columns = len(rowptr) - 1, values[:1].numel()
    out = values.new_empty((n_segments, *values.shape[1:]))
    if not columns:
        return out.zero_()
    PROGRAM.launch(
        "segment_sum", values.dtype, (-(-n_segments * columns // THREADS),), THREADS, 0,
        (values.contiguous(), rowptr.contiguous(), out, n_segments, columns),
    )  # fmt: skip
    return out


@segment_rows.register_kernel("cuda")
def cuda_segment_rows(values: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:  # noqa: ARG001
    """Kernel of ``mlip::segment_rows``."""
    return values.index_select(0, index)


@segment_shares.register_kernel("cuda")
def cuda_segment_shares(
    logits: Tensor,
    weights: Tensor,
    index: Tensor,  # noqa: ARG001
    rowptr: Tensor,
    epsilon: float,
) -> Tensor:
    """Kernel of ``mlip::segment_shares``."""
    n_segments, columns = len(rowptr) - 1, logits.shape[1]
    out = logits.new_empty(logits.shape)
    PROGRAM.launch(
        "segment_shares", logits.dtype, (-(-n_segments * columns // THREADS),), THREADS, 0,
        (
            logits.contiguous(), weights.contiguous(), rowptr.contiguous(),
            logits.new_full((1,), epsilon), out, n_segments, columns,
        ),
    )  # fmt: skip
    return out
