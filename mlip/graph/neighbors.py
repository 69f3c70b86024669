"""Neighbour lists: every periodic image within the cutoff, found by vesin, in one fixed order.

Nothing is truncated here unless `max_neighbors` is asked for, and no model is known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase.neighborlist import primitive_neighbor_list
from numpy.typing import ArrayLike, NDArray
from vesin import NeighborList

from mlip.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_COINCIDENT = 1e-6  # Å; closer than this two atoms have no direction between them
_MAX_NEIGHBORS_PER_ATOM = 100_000  # real matter has about 1000 at a cutoff of 12 Å
_TIE = 1e-6  # Å; distances equal within this are one shell for `nearest_neighbors`
_VESIN_BINS = 50_000  # half the number of bins above which vesin coarsens its grid


class Lattice(NamedTuple):
    """Hold a cell that is complete and invertible, and which of its directions repeat."""

    cell: FloatArray  # [3, 3] Å, rows; orthogonal unit vectors along directions that do not repeat
    pbc: NDArray[np.bool_]  # [3]


def neighbor_list(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float
) -> tuple[IntArray, IntArray]:
    """List all directed pairs within the cutoff, periodic images included.

    An edge from source j to target i with shift s stands for the vector
    ``positions[j] + s @ cell - positions[i]`` of the positions as given (they need not lie inside
    the cell). Edges are sorted by target, inside a target by source, then by shift.

    Args:
        positions: [N, 3] Å.
        cell: [3, 3] Å, rows are lattice vectors; those along directions that do not repeat are
            ignored and may be zero.
        pbc: [3], which directions repeat.
        cutoff: Å.

    Returns:
        edge_index [2, E] (row 0 source, row 1 target) and edge_shift [E, 3].

    Raises:
        InputError: positions or cell are not finite or of the wrong shape, repeating lattice
            vectors span no volume, two atoms coincide, or the density is absurd.
    """
    points, lattice = check_structure(positions, cell, pbc, cutoff)
    if len(points) == 0:
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3), dtype=np.int64)
    compact, box, images = _pack(points, lattice, cutoff)
    target, source, shift, _ = _search(compact, box, cutoff)
    # one array a component: far faster than work along the short axis of [E, 3]
    shifts = [shift[:, k] + (images[target, k] - images[source, k]) for k in range(3)]
    order = _canonical_order(source, target, shifts, len(points))
    edge_shift = np.empty((len(order), 3), dtype=np.int64)
    for k in range(3):
        edge_shift[:, k] = shifts[k][order]
    return np.stack([source[order], target[order]]), edge_shift


def pair_distances(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float
) -> tuple[IntArray, FloatArray]:
    """List the atoms and the distance of all directed pairs within the cutoff, in any order.

    Half the cost of :func:`neighbor_list`, whose arguments and errors it has.

    Returns:
        pairs [2, E] and distances [E] Å.
    """
    points, lattice = check_structure(positions, cell, pbc, cutoff)
    if len(points) == 0:
        return np.zeros((2, 0), dtype=np.int64), np.zeros(0)
    compact, box, _ = _pack(points, lattice, cutoff)
    target, source, _, distance = _search(compact, box, cutoff)
    return np.stack([source, target]), distance


def check_structure(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float
) -> tuple[FloatArray, Lattice]:
    """Check what a neighbour list needs and complete the cell along directions that do not repeat.

    Raises:
        InputError: names what is wrong, what was expected and the remedy.
    """
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise InputError(f"cutoff must be a positive length in Å, got {cutoff}")
    points = np.ascontiguousarray(positions, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"positions must have shape [N, 3], got {list(points.shape)}")
    if not np.isfinite(points).all():
        atom = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise InputError(f"position of atom {atom} is not finite: {points[atom].tolist()}")
    repeats = np.asarray(pbc, dtype=np.bool_)
    vectors = np.asarray(cell, dtype=np.float64)
    if vectors.shape != (3, 3) or repeats.shape != (3,):
        raise InputError(
            "cell must have shape [3, 3] and pbc [3], "
            f"got {list(vectors.shape)} and {list(repeats.shape)}"
        )
    if not np.isfinite(vectors).all():
        raise InputError(f"cell is not finite: {vectors.tolist()}")
    lattice = Lattice(_complete_cell(vectors, repeats), repeats)
    _check_density(len(points), vectors[repeats], cutoff)
    return points, lattice


def nearest_neighbors(
    edge_index: IntArray, edge_vector: FloatArray, number_of_atoms: int, max_neighbors: int
) -> NDArray[np.bool_]:
    """Mark the `max_neighbors` nearest images of every target, for parity with published models.

    A cut by number makes the energy discontinuous when neighbours change places, so a potential
    that uses it does not conserve energy. Of equal distances (within 1e-6 Å) the edges that come
    first in the list are kept: the choice is deterministic, and not invariant under rotation.

    Args:
        edge_index: [2, E], sorted by target.
        edge_vector: [E, 3] Å.
        number_of_atoms: N.
        max_neighbors: largest number of edges kept per target.

    Returns:
        [E], True for the edges that are kept.
    """
    if max_neighbors < 1:
        raise InputError(f"max_neighbors must be at least 1, got {max_neighbors}")
    target = edge_index[1]
    shell = np.rint(np.linalg.norm(edge_vector, axis=1) / _TIE)
    order = np.lexsort((shell, target))  # stable: ties stay in the order of the list
    first = np.searchsorted(target, np.arange(number_of_atoms))
    keep = np.zeros(len(target), dtype=np.bool_)
    keep[order] = np.arange(len(target)) - first[target] < max_neighbors
    return keep


def _complete_cell(cell: FloatArray, pbc: NDArray[np.bool_]) -> FloatArray:
    """Replace the vectors that do not repeat by unit vectors orthogonal to all others."""
    periodic = cell[pbc]
    lengths = np.linalg.norm(periodic, axis=1)
    volume = _measure(periodic)
    if len(periodic) and volume <= 1e-8 * np.prod(lengths):
        raise InputError(
            f"periodic in directions {np.flatnonzero(pbc).tolist()}, but the lattice vectors "
            f"{periodic.tolist()} span no volume: give the cell, or set pbc to False"
        )
    if pbc.all():
        return np.ascontiguousarray(cell)
    completed = cell.copy()
    # The rows of `rest` are an orthonormal basis of what the periodic vectors leave free.
    rest = np.linalg.svd(periodic)[2][len(periodic) :] if len(periodic) else np.eye(3)
    completed[~pbc] = rest
    return completed


def _measure(vectors: FloatArray) -> float:
    """Compute the length, area or volume spanned by one, two or three vectors."""
    return float(np.sqrt(max(np.linalg.det(vectors @ vectors.T), 0.0))) if len(vectors) else 1.0


def _check_density(number_of_atoms: int, periodic: FloatArray, cutoff: float) -> None:
    """Refuse cells so small that the images alone would fill the memory (wrong units, mostly)."""
    dimensions = len(periodic)
    if dimensions == 0 or number_of_atoms == 0:
        return
    ball = (2 * cutoff, np.pi * cutoff**2, 4 / 3 * np.pi * cutoff**3)[dimensions - 1]
    neighbors = ball / _measure(periodic) * (number_of_atoms if dimensions == 3 else 1)
    if neighbors > _MAX_NEIGHBORS_PER_ATOM:
        raise InputError(
            f"about {neighbors:.0e} neighbours per atom within {cutoff} Å: the cell "
            f"{periodic.tolist()} is too small for {number_of_atoms} atoms (lengths are in Å)"
        )


def _pack(
    points: FloatArray, lattice: Lattice, cutoff: float
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Put the atoms into one box that repeats in all directions and has the same pairs.

    Atoms are moved into the cell along directions that repeat. Along the others the box is as long
    as the structure and a layer of vacuum wider than the cutoff, after gaps wider than the cutoff
    are closed: these directions are orthogonal, so that makes and breaks no pair, and the time
    of the search does not grow with empty space.

    Returns:
        Points [N, 3] in the box, the box [3, 3], and the image [N, 3] in which each was given.
    """
    fractional = np.linalg.solve(lattice.cell.T, points.T).T  # in Å where vectors are unit vectors
    images = np.where(lattice.pbc, np.floor(fractional), 0.0)
    moved, box, gap = images.copy(), lattice.cell.copy(), 1.25 * cutoff
    for k in np.flatnonzero(~lattice.pbc):
        order = np.argsort(fractional[:, k])
        along = fractional[order, k]
        closed = np.cumsum(np.maximum(np.diff(along, prepend=along[0]) - gap, 0.0))
        moved[order, k] = closed + along[0] - 0.1 * cutoff
        box[k] *= along[-1] - closed[-1] - along[0] + gap
    return points - moved @ lattice.cell, box, images.astype(np.int64)


def _search(
    points: FloatArray, box: FloatArray, cutoff: float
) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """Find all pairs: centre, neighbour, shift of the neighbour, distance.

    vesin divides by zero (0.6.2, a crash of the process) for thin boxes of enormous area, when it
    has to coarsen its grid of cutoff-sized bins; those few go to ASE's slower search.
    """
    bins = np.maximum(1.0 / np.linalg.norm(np.linalg.inv(box), axis=0) / cutoff, 1.0)
    if bins.min() * (_VESIN_BINS / bins.prod()) ** (1 / 3) < 2.0 and bins.prod() > _VESIN_BINS:
        centre, neighbor, shift, distance = primitive_neighbor_list(
            "ijSd", (True, True, True), box, points, cutoff, self_interaction=False
        )
    else:
        search = NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
        centre, neighbor, shift, distance = search.compute(points, box, True, "ijSd")
    if distance.size and distance.min() < _COINCIDENT:
        k = int(distance.argmin())
        raise InputError(
            f"atoms {min(neighbor[k], centre[k])} and {max(neighbor[k], centre[k])} coincide "
            f"({distance[k]:.1e} Å apart): remove one or move it"
        )
    integers = (array.astype(np.int64) for array in (centre, neighbor, shift))
    return (*integers, distance)


def _canonical_order(
    source: IntArray, target: IntArray, shifts: list[IntArray], number_of_atoms: int
) -> IntArray:
    """Sort edges by target, source, shift: the order must not depend on the search algorithm."""
    if not len(source):
        return np.zeros(0, dtype=np.int64)
    low = [int(shift.min()) for shift in shifts]
    span = [int(shift.max()) - least + 1 for shift, least in zip(shifts, low, strict=True)]
    if number_of_atoms**2 * span[0] * span[1] * span[2] >= 2**63:
        return np.lexsort((*reversed(shifts), source, target))
    key = target * number_of_atoms + source
    for k in range(3):
        key *= span[k]
        key += shifts[k] - low[k]
    return np.argsort(key, kind="stable")  # merges what the search left sorted: six times faster
