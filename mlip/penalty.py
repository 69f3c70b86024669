"""What a residual costs: shared by the losses of training and by their comparison with others."""

from __future__ import annotations

import torch
from torch import Tensor


def penalty(values: Tensor, kind: str, delta: float) -> Tensor:
    """Return the penalty of each row of residuals [n, ...], [n].

    It acts on the length x of the row (a force vector, a stress tensor), so that the loss does not
    depend on the orientation of the structure.

    Args:
        values: residuals.
        kind: ``huber`` is x − δ/2 beyond δ and x²/(2δ) within it; ``l1`` is x, ``mse`` is x².
        delta: δ of ``huber``, in the unit of the residuals.
    """
    square = values.reshape(values.shape[0], -1).square().sum(-1)
    if kind == "mse":
        return square
    small = square <= (delta * delta if kind == "huber" else 0.0)
    length = torch.where(small, 1.0, square).sqrt()  # no 0/0 in the gradient
    if kind == "l1":
        return torch.where(small, 0.0, length)
    return torch.where(small, square / (2 * delta), length - delta / 2)
