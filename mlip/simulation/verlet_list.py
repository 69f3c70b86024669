"""Keep a neighbour list while atoms move less than its skin; the graphs never depend on it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms

from mlip.errors import InputError
from mlip.graph import AtomicGraph, atoms_to_graph, neighbor_list
from mlip.ops.backend import default_backend, numba_missing

Array = npt.NDArray[np.float64]
Edges = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
# Distances within this of the limit count as beyond it, so that rounding cannot lose a pair.
ROUNDING = 1e-9  # Å


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

    def graph(self, atoms: Atoms) -> AtomicGraph:
        """Return the graph of ``atoms`` with all neighbours within the cutoff."""
        if self.skin == 0 or len(atoms) == 0:
            self.searches += 1
            return atoms_to_graph(atoms, self.cutoff)
        positions, cell = atoms.positions, np.asarray(atoms.cell)
        follows = self._follows(positions)
        self._last = positions.copy()
        reference = self._reference
        if reference is None or not self._holds(reference, atoms):
            if not follows:
                self._reference = None
                self.searches += 1
                return atoms_to_graph(atoms, self.cutoff)
            reference = self._search(atoms)
        index, shift = _near(reference, positions, cell, self.cutoff)
        return AtomicGraph(
            positions=torch.from_numpy(positions.copy()),
            atomic_numbers=torch.from_numpy(atoms.numbers.astype(np.int64)),
            cell=torch.from_numpy(cell.copy())[None],
            pbc=torch.from_numpy(atoms.pbc.copy())[None],
            edge_index=torch.from_numpy(index),
            edge_shift=torch.from_numpy(shift),
            cutoff=torch.tensor([self.cutoff], dtype=torch.float64),
        )

    def _follows(self, positions: Array) -> bool:
        """Say whether the atoms are those of the last call, a little later."""
        last = self._last
        if last is None or last.shape != positions.shape:
            return False
        return float(np.abs(positions - last).max()) < self.skin / 2

    def _search(self, atoms: Atoms) -> _Reference:
        positions, cell = atoms.get_positions(), np.array(atoms.cell)
        index, shift = neighbor_list(positions, cell, atoms.pbc, self.cutoff + self.skin)
        self._reference = _Reference(positions, cell, atoms.pbc.copy(), index, shift)
        self.searches += 1
        return self._reference

    def _holds(self, reference: _Reference, atoms: Atoms) -> bool:
        cell = np.asarray(atoms.cell)
        if len(atoms) != len(reference.positions) or not np.array_equal(atoms.pbc, reference.pbc):
            return False
        shortest, moved = 1.0, reference.positions
        if not np.array_equal(cell, reference.cell):
            if np.linalg.matrix_rank(reference.cell) < 3:
                return False
            deformation = np.linalg.solve(reference.cell, cell)
            shortest = float(np.linalg.svd(deformation, compute_uv=False)[-1])
            moved = reference.positions @ deformation
        u = atoms.positions - moved
        farthest = float(np.sqrt(np.einsum("ij,ij->i", u, u).max()))
        return shortest * (self.cutoff + self.skin) - 2 * farthest > self.cutoff + ROUNDING


def _near(reference: _Reference, positions: Array, cell: Array, cutoff: float) -> Edges:
    """Choose the edges of the list that are within the cutoff now."""
    index, shift = reference.edge_index, reference.edge_shift
    if default_backend() != "torch" and numba_missing() is None:
        from mlip.ops.cpu import cache

        found, shifts = np.empty_like(index), np.empty_like(shift)
        count = cache.loops().near_edges(positions, cell, index, shift, cutoff, found, shifts)
        return np.ascontiguousarray(found[:, :count]), shifts[:count]
    vectors = shift @ cell + (positions[index[0]] - positions[index[1]])
    near = np.einsum("ij,ij->i", vectors, vectors) <= cutoff**2
    return index[:, near], shift[near]
