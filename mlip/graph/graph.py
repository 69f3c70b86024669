"""AtomicGraph: one structure as tensors, its atoms as nodes and its neighbour pairs as edges.

Knows structures and neighbour lists; knows no model and no disk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import ase
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch_geometric.data import Data

from mlip.errors import InputError
from mlip.graph.neighbors import nearest_neighbors, neighbor_list


class AtomicGraph(Data):
    """Hold one structure; a batch of them is a torch_geometric ``Batch`` with the same fields.

    N atoms, E directed edges, B structures (1 here, more in a batch). Floats are float64.

    Fields that are always there:
        positions: [N, 3] Å, as given (not wrapped into the cell).
        atomic_numbers: [N] int64.
        cell: [B, 3, 3] Å, rows are lattice vectors; zeros for none.
        pbc: [B, 3] bool, the directions that repeat.
        edge_index: [2, E] int64; row 0 source (neighbour), row 1 target (centre that receives).
            Sorted by target, inside a target by source, then by shift.
        edge_shift: [E, 3] int64, image of the source: the edge vector is
            ``r_source + shift @ cell - r_target`` (see `edge_vectors`).
        cutoff: [B] Å.
        truncated: [B] bool, True if `max_neighbors` dropped edges: energy is then not smooth.

    Labels and properties, there too, NaN (False, 0, -1) where not given, so that graphs of labelled
    and unlabelled structures batch:
        energy: [B] eV. forces: [N, 3] eV/Å. stress: [B, 3, 3] eV/Å³, tension positive.
        charge: [B] e. spin: [B]. tags: [N] int64. fixed: [N] bool.
        index: [B] int64, place in the data set, used to name offenders.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if "positions" in fields:
            self.num_nodes = len(fields["positions"])

    def __inc__(self, key: str, value: Any, *_: Any, **__: Any) -> Any:
        """Say by how much a field grows from one graph of a batch to the next."""
        return self.num_nodes if key == "edge_index" else 0

    def __cat_dim__(self, key: str, value: Any, *_: Any, **__: Any) -> int:
        """Say along which dimension a field is concatenated."""
        return 1 if key == "edge_index" else 0


@dataclass(slots=True)
class BareGraph:
    """What a potential reads of one structure without labels: far quicker to make and to read.

    Fields are those of `AtomicGraph`, whose other attributes are found here, too; and
    ``edge_vector``, [E, 3] Å float64, what `edge_vectors` gives, where it is known.
    """

    positions: Tensor
    atomic_numbers: Tensor
    cell: Tensor
    pbc: Tensor
    edge_index: Tensor
    edge_shift: Tensor
    cutoff: Tensor
    edge_vector: Tensor | None = None

    def to(self, device: torch.device) -> BareGraph:
        """Copy to a device."""
        values = {name: value.to(device) for name, value in self._given().items()}
        return BareGraph(**values)

    def __getattr__(self, name: str) -> Any:
        """Find what else an AtomicGraph of these fields has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(AtomicGraph(**self._given() | {"edge_vector": None}), name)

    def _given(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def atoms_to_graph(atoms: Any, cutoff: float, *, max_neighbors: int | None = None) -> AtomicGraph:
    """Make the graph of a structure, without labels.

    Args:
        atoms: ase.Atoms, or a pymatgen Structure or Molecule.
        cutoff: Å; all pairs up to it become edges, in both directions.
        max_neighbors: keep only this many nearest images per atom. For parity with published
            models alone: the energy is then not smooth (see `nearest_neighbors`).

    Raises:
        InputError: the structure is empty, not finite, or its cell does not fit its pbc.
    """
    structure = as_atoms(atoms)
    return make_graph(
        structure.numbers,
        structure.positions,
        structure.cell.array,
        structure.pbc,
        cutoff,
        max_neighbors=max_neighbors,
        tags=structure.arrays.get("tags"),
    )


def make_graph(
    atomic_numbers: ArrayLike,
    positions: ArrayLike,
    cell: ArrayLike,
    pbc: ArrayLike,
    cutoff: float,
    *,
    max_neighbors: int | None = None,
    energy: float | None = None,
    forces: ArrayLike | None = None,
    stress: ArrayLike | None = None,
    charge: float | None = None,
    spin: float | None = None,
    tags: ArrayLike | None = None,
    fixed: ArrayLike | None = None,
    index: int | None = None,
) -> AtomicGraph:
    """Make a graph from arrays; the fields are those of `AtomicGraph`.

    Raises:
        InputError: the structure is empty, not finite, or its cell does not fit its pbc; an array
            has another shape than the structure asks for.
    """
    numbers = np.asarray(atomic_numbers)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise InputError(
            "the structure has no atoms: a graph needs at least one"
            if numbers.size == 0
            else f"atomic_numbers must have shape [N], got {list(numbers.shape)}"
        )
    count = len(numbers)
    points = _array("positions", positions, (count, 3), np.nan)
    edge_index, edge_shift = neighbor_list(points, cell, pbc, cutoff)
    truncated = False
    if max_neighbors is not None:
        shift_vector = edge_shift @ np.asarray(cell, dtype=np.float64)
        vectors = shift_vector + (points[edge_index[0]] - points[edge_index[1]])
        keep = nearest_neighbors(edge_index, vectors, count, max_neighbors)
        truncated = not bool(keep.all())
        edge_index, edge_shift = edge_index[:, keep], edge_shift[keep]
    return AtomicGraph(
        positions=torch.from_numpy(points),
        atomic_numbers=torch.from_numpy(numbers.astype(np.int64)),
        cell=torch.from_numpy(_array("cell", cell, (3, 3), 0.0)[None]),
        pbc=torch.from_numpy(np.array(pbc, dtype=np.bool_)[None]),
        edge_index=torch.from_numpy(edge_index),
        edge_shift=torch.from_numpy(edge_shift),
        cutoff=_scalar(cutoff, torch.float64),
        truncated=_scalar(truncated, torch.bool),
        energy=_scalar(np.nan if energy is None else energy, torch.float64),
        forces=torch.from_numpy(_array("forces", forces, (count, 3), np.nan)),
        stress=torch.from_numpy(_array("stress", stress, (3, 3), np.nan)[None]),
        charge=_scalar(np.nan if charge is None else charge, torch.float64),
        spin=_scalar(np.nan if spin is None else spin, torch.float64),
        tags=torch.from_numpy(_array("tags", tags, (count,), 0).astype(np.int64)),
        fixed=torch.from_numpy(_array("fixed", fixed, (count,), 0).astype(np.bool_)),
        index=_scalar(-1 if index is None else index, torch.int64),
    )


def as_atoms(structure: Any) -> ase.Atoms:
    """Give a structure as ase.Atoms: Atoms pass unchanged, pymatgen objects are converted.

    Raises:
        InputError: neither of them, or a pymatgen structure with partly occupied sites.
    """
    if isinstance(structure, ase.Atoms):
        return structure
    if getattr(structure, "is_ordered", True) is False:
        raise InputError(
            f"{structure.composition.formula}: sites are partly occupied; order the structure first"
        )
    if hasattr(structure, "to_ase_atoms"):
        return structure.to_ase_atoms(msonable=False)
    raise InputError(
        "expected ase.Atoms or a pymatgen Structure or Molecule, "
        f"got {type(structure).__module__}.{type(structure).__qualname__}"
    )


def _scalar(value: float | int | bool, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], dtype=dtype)


def _array(
    name: str, value: ArrayLike | None, shape: tuple[int, ...], missing: float
) -> np.ndarray:
    """Copy an optional array as float64, filled where it is missing."""
    if value is None:
        return np.full(shape, missing)
    array = np.array(value, dtype=np.float64)
    if array.shape != shape:
        raise InputError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
    return array
