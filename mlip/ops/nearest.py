"""Selection of the nearest neighbours of each atom, for models with a fixed number of them."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_edges(target: Tensor, distance: Tensor, n_nodes: int, count: int) -> Tensor | None:
    """Find the ``count`` shortest edges of each target.

    Args:
        target: [E] centre of each edge.
        distance: [E] Å.
        n_nodes: number of atoms.
        count: edges to keep for each target.

    Returns:
        Indices of the edges to keep, in their order, or None if no target has more than ``count``.
        Of equally long edges the first are kept.
    """
    degree = torch.bincount(target, minlength=n_nodes)
    if not len(target) or int(degree.max()) <= count:
        return None
    order = torch.argsort(distance.detach(), stable=True)
    order = order[torch.argsort(target[order], stable=True)]  # by target, then by length
    first = torch.cumsum(degree, 0) - degree
    rank = torch.arange(len(order), device=order.device) - first[target[order]]
    return order[rank < count].sort().values
