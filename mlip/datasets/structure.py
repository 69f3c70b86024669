"""One structure with its labels: a validated, immutable record, and its way to and from ASE.

Finding labels among the many keys that files use is in labels.py; storage is in store.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlip.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

    from mlip.graph import AtomicGraph

Array = npt.NDArray[Any]

MAX_ATOMIC_NUMBER = 118
LABELS = ("energy", "forces", "stress")
# A cell counts as flat when its volume is below this fraction of the product of its edge lengths.
FLAT_CELL = 1e-8
# Stress matrices may be unsymmetric by rounding in a text file, not by more.
STRESS_ASYMMETRY = 1e-2
STRESS_ROUNDING = 1e-5  # eV/Å³
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])  # xx yy zz yz xz xy


@dataclass(frozen=True, eq=False)
class Structure:
    """Hold one structure; every instance is valid and its arrays are read-only.

    Args:
        numbers: [N] atomic numbers, 1 to 118.
        positions: [N, 3] Å.
        cell: [3, 3] Å, rows are lattice vectors, zeros for none.
        pbc: [3] periodic directions.
        energy: total energy, eV; None if there is no such label.
        forces: [N, 3] eV/Å, raw (not zeroed on fixed atoms).
        stress: [3, 3] eV/Å³, ASE sign (tension positive); Voigt-6 or 9 numbers are accepted.
        tags: [N] integers (OC20: 0 sub-surface, 1 surface, 2 adsorbate).
        fixed: [N] True for atoms held in place.
        charge: total charge, e.
        spin: spin as the source states it (OMol25: multiplicity 2S+1).
        info: anything else that JSON can hold.

    Raises:
        DataError: a shape, number or cell that no structure can have; the text names the field.
    """

    numbers: Array
    positions: Array
    cell: Array = field(default_factory=lambda: np.zeros((3, 3)))
    pbc: Array = field(default_factory=lambda: np.zeros(3, dtype=bool))
    energy: float | None = None
    forces: Array | None = None
    stress: Array | None = None
    tags: Array | None = None
    fixed: Array | None = None
    charge: float | None = None
    spin: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = _numbers(self.numbers)
        n = len(numbers)
        cleaned: dict[str, Any] = {
            "numbers": numbers,
            "positions": real_array("positions", self.positions, (n, 3)),
            "cell": real_array("cell", self.cell, (3, 3)),
            "pbc": _flags("pbc", self.pbc, (3,)),
        }
        for name in ("energy", "charge", "spin"):
            if getattr(self, name) is not None:
                cleaned[name] = real_scalar(name, getattr(self, name))
        if self.forces is not None:
            cleaned["forces"] = real_array("forces", self.forces, (n, 3))
        if self.stress is not None:
            cleaned["stress"] = stress_matrix(self.stress)
        if self.tags is not None:
            cleaned["tags"] = _integers("tags", self.tags, (n,))
        if self.fixed is not None:
            cleaned["fixed"] = _flags("fixed", self.fixed, (n,))
        cleaned["info"], lost = json_info(self.info)
        if lost:
            raise DataError(f"info holds what JSON cannot keep under {', '.join(lost)}: remove it")
        _check_cell(cleaned["cell"], cleaned["pbc"])
        _fill(self, cleaned)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def labelled(self) -> bool:
        """Tell whether there is an energy, forces or stress."""
        return not (self.energy is None and self.forces is None and self.stress is None)

    @classmethod
    def trusted(cls, **fields: Any) -> Structure:
        """Build from fields that were validated before (a store entry), without checking again."""
        structure = object.__new__(cls)
        defaults = dict.fromkeys(cls.__dataclass_fields__)
        _fill(structure, {**defaults, "info": {}, **fields})
        return structure

    @classmethod
    def from_atoms(cls, atoms: Atoms, keys: Any = None, where: str = "structure") -> Structure:
        """Read a structure and its labels from ASE atoms (or a pymatgen structure).

        Labels are looked for in the calculator's results, then in ``info`` and ``arrays``
        (see :func:`mlip.datasets.labels.extract`). A live calculator is not run.

        Args:
            atoms: structure.
            keys: :class:`~mlip.datasets.labels.LabelKeys` if the usual names do not fit.
            where: how errors call this structure, for instance ``"train.traj frame 7"``.

        Raises:
            DataError: bad content, conflicting labels, or results of an earlier geometry.
        """
        from mlip.datasets.labels import check_results_are_current, extract
        from mlip.graph import as_atoms

        atoms = as_atoms(atoms)
        check_results_are_current(atoms, where)
        return extract(atoms, keys, where).structure

    def to_atoms(self) -> Atoms:
        """Give ASE atoms: labels in a SinglePointCalculator, fixed atoms as FixAtoms."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        atoms = Atoms(
            numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc,
            tags=self.tags,
        )  # fmt: skip
        atoms.info = json.loads(json.dumps(self.info))
        for name in ("charge", "spin"):
            if getattr(self, name) is not None:
                atoms.info[name] = getattr(self, name)
        if self.fixed is not None and self.fixed.any():
            atoms.set_constraint(FixAtoms(mask=self.fixed.copy()))
        if self.labelled:
            results: dict[str, Any] = {}
            if self.energy is not None:
                results["energy"] = self.energy
            if self.forces is not None:
                results["forces"] = self.forces.copy()
            if self.stress is not None:
                s = self.stress
                voigt = [s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]]
                results["stress"] = np.array(voigt)
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms


def structure_to_graph(
    structure: Structure, cutoff: float, index: int | None = None
) -> AtomicGraph:
    """Turn a structure into a graph with its labels; a missing label is NaN.

    Stress of a structure that is not periodic in all three directions is left out (NaN).

    Args:
        structure: structure with any of its labels.
        cutoff: neighbour cutoff, Å.
        index: position in the data set, used to name offenders (-1 if not given).
    """
    from mlip.graph import make_graph

    s = structure
    return make_graph(
        s.numbers,
        s.positions,
        s.cell,
        s.pbc,
        cutoff,
        energy=s.energy,
        forces=s.forces,
        stress=s.stress if s.pbc.all() else None,
        charge=s.charge,
        spin=s.spin,
        tags=s.tags,
        fixed=s.fixed,
        index=index,
    )


def real_array(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Copy ``value`` as float64 of ``shape``, or raise a DataError that names the field."""
    array = _shaped(name, value, shape, np.float64)
    flat = array.reshape(-1)
    with np.errstate(over="ignore"):
        quick = math.isfinite(flat.dot(flat))  # a finite sum of squares is a proof
    if not quick and not np.isfinite(array).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataError(f"{name}{list(bad)} is {array[bad]}, expected a finite number")
    return array


def real_scalar(name: str, value: Any) -> float:
    """Read one finite number, also from an array that holds a single one."""
    if type(value) is float and math.isfinite(value):
        return value
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} is {value!r}, expected a number") from None
    if array.size != 1:
        raise DataError(f"{name} has shape {array.shape}, expected one number")
    number = float(array.reshape(()))
    if not np.isfinite(number):
        raise DataError(f"{name} is {number}, expected a finite number")
    return number


def stress_matrix(value: Any, name: str = "stress") -> Array:
    """Read a stress as a symmetric [3, 3] matrix from Voigt-6 (xx yy zz yz xz xy), 9 or 3x3."""
    shape = _shape(name, value)
    if shape == (6,):
        return real_array(name, value, (6,))[_VOIGT]
    if shape not in {(9,), (3, 3)}:
        raise DataError(f"{name} has shape {shape}, expected (6,) Voigt, (9,) or (3, 3)")
    matrix = real_array(name, np.reshape(value, (3, 3)), (3, 3))
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > STRESS_ROUNDING + STRESS_ASYMMETRY * np.abs(matrix).max():
        raise DataError(
            f"{name} is not symmetric (by {asymmetry:.3g}): the order of its numbers is wrong, "
            "expected a symmetric 3x3 matrix"
        )
    return (matrix + matrix.T) / 2


def json_info(info: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Reduce ``info`` to plain JSON values (arrays become lists); also name what cannot be kept."""
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for key, value in info.items():
        if type(key) is str and (
            type(value) in _PLAIN or (type(value) is float and math.isfinite(value))
        ):
            kept[key] = value
            continue
        try:
            kept[str(key)] = json.loads(json.dumps(value, default=_plain))
        except (TypeError, ValueError, RecursionError):
            lost.append(str(key))
    return kept, lost


_PLAIN = frozenset({str, int, bool, type(None)})


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _fill(structure: Structure, fields: dict[str, Any]) -> None:
    for value in fields.values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    vars(structure).update(fields)


def _shaped(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    try:
        array = np.array(value, dtype=dtype, order="C")
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{name} does not hold numbers of one regular shape") from None
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}, expected {shape}")
    return array


def _shape(name: str, value: Any) -> tuple[int, ...]:
    try:
        return np.shape(value)
    except ValueError:
        raise DataError(f"{name} does not hold numbers of one regular shape") from None


def _integers(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    if isinstance(value, np.ndarray) and value.dtype.kind in "iub" and value.dtype != np.uint64:
        return _shaped(name, value, shape, np.int64)
    exact = _shaped(name, value, shape, np.float64)
    if not (np.abs(exact) < 2**63).all() or (exact != np.rint(exact)).any():
        raise DataError(f"{name} holds something else than whole numbers")
    return _shaped(name, exact, shape, np.int64)


def _flags(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        return _shaped(name, value, shape, np.bool_)
    integers = _integers(name, value, shape)
    if ((integers != 0) & (integers != 1)).any():
        raise DataError(f"{name} holds something else than true and false")
    return integers.astype(bool)


def _numbers(value: Any) -> Array:
    shape = _shape("numbers", value)
    if len(shape) != 1:
        raise DataError(f"numbers has shape {shape}, expected (N,)")
    if shape[0] == 0:
        raise DataError("there are no atoms, expected at least one")
    numbers = _integers("numbers", value, shape)
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        wrong = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]
        raise DataError(f"atomic number {wrong[0]} is no element, expected 1 to 118")
    return numbers


def _check_cell(cell: Array, pbc: Array) -> None:
    """Refuse periodic directions without independent lattice vectors (zero volume or area)."""
    vectors = [v for v, periodic in zip(cell.tolist(), pbc.tolist(), strict=True) if periodic]
    lengths = [math.hypot(*v) for v in vectors]
    if all(length > 0 for length in lengths):
        unit = [[x / length for x in v] for v, length in zip(vectors, lengths, strict=True)]
        if _spanned(unit) > FLAT_CELL:
            return
    directions = ", ".join("abc"[i] for i in np.flatnonzero(pbc))
    raise DataError(
        f"the cell has no volume but is periodic along {directions}: "
        "give lattice vectors or switch pbc off"
    )


def _spanned(unit: list[list[float]]) -> float:
    """Give the volume, area or length that up to three unit vectors span (1 for none)."""
    if len(unit) < 2:
        return 1.0
    a, b = unit[:2]
    normal = (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )
    if len(unit) == 2:
        return math.hypot(*normal)
    return abs(sum(x * y for x, y in zip(normal, unit[2], strict=True)))
