"""Keep a neighbour list while atoms move less than its skin; the graphs never depend on it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms

from mlip.errors import InputError
from mlip.graph import AtomicGraph, BareGraph, atoms_to_graph, neighbor_list
from mlip.ops.backend import default_backend, numba_missing
from mlip.ops.cpu import cache

Array = npt.NDArray[np.float64]
# Distances within this of the limit count as beyond it, so that rounding cannot lose a pair.
ROUNDING = 1e-9  # Å


class _Edges(NamedTuple):
    edge_index: npt.NDArray[np.int64]
    edge_shift: npt.NDArray[np.int64]
    edge_vector: Array | None


class _Reference(NamedTuple):
    positions: Array
    cell: Array
    pbc: npt.NDArray[np.bool_]
    edge_index: npt.NDArray[np.int64]
    edge_shift: npt.NDArray[np.int64]


class VerletList:
    """Build graphs of one moving structure, searching neighbours as rarely as is exact.

    Pairs are kept up to ``cutoff + skin``; each graph holds those within ``cutoff`` now, in the
    order of a fresh search. A pair beyond the list was longer than cutoff + skin; with the cell
    deformed by F and atoms moved by u beside that, it is longer than σ_min(F)·(cutoff + skin) −
    2·max|u| now. The list is rebuilt when this falls below the cutoff. It is made for atoms that
    moved by less than half the skin since the last call, so that structures which come once or
    have nothing to do with each other do not pay for it.

    Args:
        cutoff: Å.
        skin: Å; 0 searches each time.

    Raises:
        InputError: the skin is negative or not finite.
    """

    def __init__(self, cutoff: float, skin: float = 0.0) -> None:
        if not (np.isfinite(skin) and skin >= 0):
            raise InputError(f"skin is {skin} Å; give 0 or a positive distance")
        self.cutoff = cutoff
        self.skin = float(skin)
        self.searches = 0
        self._reference: _Reference | None = None
        self._last: Array | None = None  # positions of the last call

    def graph(self, atoms: Atoms) -> AtomicGraph | BareGraph:
        """Return the graph of ``atoms`` with all neighbours within the cutoff."""
        if self.skin == 0 or len(atoms) == 0:
            self.searches += 1
            return atoms_to_graph(atoms, self.cutoff)
        positions = atoms.positions.copy()
        edges = None if self._reference is None else self._kept(self._reference, atoms)
        if edges is None:
            follows = self._follows(positions)
            self._reference, self._last = None, positions
            self.searches += 1
            if not follows:
                return atoms_to_graph(atoms, self.cutoff)
            self._reference = self._search(atoms)
            edges = self._near(self._reference, atoms, positions, np.inf)
            assert edges is not None
        self._last = positions
        return BareGraph(
            positions=torch.from_numpy(positions.copy()),
            atomic_numbers=torch.from_numpy(atoms.numbers.astype(np.int64)),
            cell=torch.from_numpy(atoms.cell.array[None].copy()),
            pbc=torch.from_numpy(atoms.pbc[None].copy()),
            edge_index=torch.from_numpy(edges.edge_index),
            edge_shift=torch.from_numpy(edges.edge_shift),
            cutoff=torch.from_numpy(np.array([self.cutoff])),
            edge_vector=None if edges.edge_vector is None else torch.from_numpy(edges.edge_vector),
        )

    def _follows(self, positions: Array) -> bool:
        """Say whether the atoms are those of the last call, a little later."""
        last = self._last
        if last is None or last.shape != positions.shape:
            return False
        return float(np.abs(positions - last).max()) < self.skin / 2

    def _search(self, atoms: Atoms) -> _Reference:
        positions, cell = atoms.get_positions(), atoms.cell.array.copy()
        index, shift = neighbor_list(positions, cell, atoms.pbc, self.cutoff + self.skin)
        return _Reference(positions, cell, atoms.pbc.copy(), index, shift)

    def _kept(self, reference: _Reference, atoms: Atoms) -> _Edges | None:
        """Choose from the list of the reference, or return None if it may lack an edge."""
        if len(atoms) != len(reference.positions) or (atoms.pbc != reference.pbc).any():
            return None
        cell, shortest, moved = atoms.cell.array, 1.0, reference.positions
        if (cell != reference.cell).any():
            if np.linalg.matrix_rank(reference.cell) < 3:
                return None
            deformation = np.linalg.solve(reference.cell, cell)
            shortest = float(np.linalg.svd(deformation, compute_uv=False)[-1])
            moved = reference.positions @ deformation
        room = (shortest * (self.cutoff + self.skin) - self.cutoff - ROUNDING) / 2
        return self._near(reference, atoms, moved, room)

    def _near(
        self, reference: _Reference, atoms: Atoms, origin: Array, room: float
    ) -> _Edges | None:
        """Choose the edges of the list that are within the cutoff now.

        Returns:
            None if an atom is not closer to its origin than ``room``.
        """
        positions, cell = atoms.positions, atoms.cell.array
        index, shift = reference.edge_index, reference.edge_shift
        if default_backend() != "torch" and numba_missing() is None:
            found, shifts, vectors = (
                np.empty_like(index),
                np.empty_like(shift),
                np.empty(shift.shape),
            )
            count = cache.loops().near_edges(
                positions, cell, origin, room, index, shift, self.cutoff, found, shifts, vectors
            )
            if count < 0:
                return None
            return _Edges(np.ascontiguousarray(found[:, :count]), shifts[:count], vectors[:count])
        u = positions - origin
        if not np.einsum("ij,ij->i", u, u).max() < max(room, 0.0) ** 2:
            return None
        vectors = shift @ cell + (positions[index[0]] - positions[index[1]])
        near = np.einsum("ij,ij->i", vectors, vectors) <= self.cutoff**2
        return _Edges(index[:, near], shift[near], None)
