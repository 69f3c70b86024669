"""Split a data set into training and validation parts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from mlip.datasets.structure import Array
from mlip.errors import InputError


def split_indices(
    n: int, fraction: float, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> tuple[Array, Array]:
    """Split ``range(n)`` at random into a large and a small part, the same for the same seed.

    With groups no group is in both parts: whole groups join the small part, in random order, as
    long as they fit into it.

    Args:
        n: number of structures, at least 2.
        fraction: share of the small part, between 0 and 1; each part gets at least one.
        seed: seed of the draw.
        groups: [n] group of each structure (composition, trajectory, ...).

    Returns:
        Sorted indices of the large and of the small part.

    Raises:
        InputError: there is nothing to split, or only one group.
    """
    if n < 2 or not 0 < fraction < 1:
        raise InputError(f"cannot split {n} structures with fraction {fraction}: need 2 and 0..1")
    wanted = min(max(1, round(fraction * n)), n - 1)
    random = np.random.default_rng(seed)
    if groups is None:
        order = random.permutation(n)
        return np.sort(order[wanted:]), np.sort(order[:wanted])
    if len(groups) != n:
        raise InputError(f"{len(groups)} groups for {n} structures: expected one for each")
    numbered = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(numbered) < 2:
        raise InputError("cannot split by group: all structures are in one group")
    group_of = np.array([numbered[group] for group in groups])
    sizes = np.bincount(group_of)
    small = np.zeros(len(numbered), dtype=bool)
    for group in random.permutation(len(numbered)):
        if sizes[small].sum() + sizes[group] <= wanted:
            small[group] = True
    if not small.any():
        small[np.argmin(sizes)] = True
    chosen = small[group_of]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
