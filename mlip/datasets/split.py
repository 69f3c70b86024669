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


def assign_parts(
    groups: Array, fractions: Sequence[float], seed: int = 0, classes: Array | None = None
) -> Array:
    """Deal whole groups out to parts at random, so that each part gets its share of structures.

    Groups go one by one, the largest first, to the part that lacks most; with classes this
    happens class after class, so that each class is spread in proportion.

    Args:
        groups: [n] number of the group of each structure; negative ones (bad frames) go to part 0.
        fractions: share of each part, at least two; they add up to 1.
        seed: seed of the draw.
        classes: [n] number of the class of each structure, to be spread over all parts.

    Returns:
        [n] number of the part of each structure.

    Raises:
        InputError: fractions that make no split, or fewer groups than parts.
    """
    shares = np.array(fractions, dtype=np.float64)
    if len(shares) < 2 or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise InputError(
            f"the fractions are {', '.join(f'{f:g}' for f in fractions)}: expected two or more, "
            "all above 0, that add up to 1"
        )
    good = np.flatnonzero(groups >= 0)
    _, first, group_of, sizes = np.unique(
        groups[good], return_index=True, return_inverse=True, return_counts=True
    )
    if len(sizes) < len(shares):
        raise InputError(f"{len(sizes)} groups cannot be split into {len(shares)} parts")
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    if classes is not None:
        order = order[np.argsort(classes[good][first][order], kind="stable")]
    part_of = np.empty(len(sizes), dtype=np.int64)
    filled, dealt = np.zeros(len(shares)), 0
    for group in order:
        dealt += sizes[group]
        part_of[group] = np.argmax(shares * dealt - filled)
        filled[part_of[group]] += sizes[group]
    for empty in np.flatnonzero(filled == 0):
        crowded = np.bincount(part_of).argmax()
        smallest = next(group for group in order[::-1] if part_of[group] == crowded)
        part_of[smallest] = empty
    parts = np.zeros(len(groups), dtype=np.int64)
    parts[good] = part_of[group_of]
    return parts
