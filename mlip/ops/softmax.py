"""Softmax over groups of rows, weighted by a cutoff envelope."""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.ops.segment import segment_sum


def envelope_softmax(
    logits: Tensor, envelope: Tensor, index: Tensor, n_segments: int, epsilon: float
) -> Tensor:
    """Normalise env·exp(logit) over the rows that share an index.

    a = env·exp(z − z_max) / (Σ env·exp(z − z_max) + ε) with z_max the largest logit of the group,
    a constant for derivatives (EquiformerV3, arXiv 2604.09130, eq. 4): rows that reach the cutoff
    leave the sum smoothly.

    Args:
        logits: z, [E, H].
        envelope: [E], 0 at the cutoff.
        index: [E] group of each row, int64.
        n_segments: number of groups, empty ones included.
        epsilon: keeps groups finite whose envelopes all vanish.

    Returns:
        [E, H].
    """
    rows = index[:, None].expand_as(logits)
    largest = logits.new_zeros(n_segments, logits.shape[1])
    largest = largest.scatter_reduce(0, rows, logits.detach(), "amax", include_self=False)
    weights = envelope[:, None] * torch.exp(logits - largest[index])
    return weights / (segment_sum(weights, index, n_segments)[index] + epsilon)
