"""Find energy, forces and stress of ASE atoms wherever files keep them, and refuse contradictions.

``energy`` is always the label called energy; ASE's ``free_energy`` (which includes the electronic
entropy of a smeared DFT calculation) is used only if it is named: ``LabelKeys("free_energy")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlip.datasets.structure import (
    Array,
    Structure,
    json_info,
    real_array,
    real_scalar,
    stress_matrix,
)
from mlip.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

PREFIXES = ("", "REF_", "ref_", "DFT_", "dft_")
NAMES = {
    "energy": ("energy",),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "virial": ("virial", "virials"),
}
# Two labels that agree to these (absolute, relative) are the same number printed differently.
SAME = {"energy": (1e-4, 1e-7), "forces": (1e-4, 1e-6), "stress": (1e-5, 1e-5)}
STRUCTURAL = {"numbers", "positions", "tags"}


@dataclass(frozen=True)
class LabelKeys:
    """Name the keys that hold the labels; None looks under the usual names.

    Args:
        energy: total energy, eV.
        forces: [N, 3] eV/Å.
        stress: eV/Å³, ASE sign (tension positive).
        virial: eV, -volume times stress; used only when no ``stress`` is named.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None

    def named(self) -> dict[str, str]:
        """Give the labels that have a key of their own."""
        return {label: key for label, key in vars(self).items() if key is not None}


class Extracted(NamedTuple):
    """A structure, the key each label came from, and what the record does not keep."""

    structure: Structure
    used: dict[str, str]
    not_kept: tuple[str, ...]


class _Candidate(NamedTuple):
    name: str
    place: str  # "calculator", "info" or "arrays"
    value: Any

    def __str__(self) -> str:
        return f"{self.name} ({self.place})"


def extract(atoms: Atoms, keys: LabelKeys | None = None, where: str = "structure") -> Extracted:
    """Read a structure with all its labels.

    Each label is looked for in the calculator's results, in ``info`` and in ``arrays``, under its
    name alone and after REF_, ref_, DFT_ and dft_. A virial gives stress = -virial / volume.
    A key named by the caller is the only one used for that label.

    Raises:
        DataError: bad content, or two different values for one label.
    """
    keys = keys or LabelKeys()
    try:
        labels, used, seen = _labels(atoms, keys)
        taken = _label_names(keys)
        info, lost = json_info({k: v for k, v in atoms.info.items() if k not in taken})
        scalars = {name: info.pop(name) for name in ("charge", "spin") if _is_number(info, name)}
        fixed, other_constraints = _fixed(atoms)
        tags = atoms.arrays.get("tags")
        structure = Structure(
            numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array,
            pbc=atoms.pbc, tags=tags, fixed=fixed, info=info, **labels, **scalars,
        )  # fmt: skip
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    sources = {label: str(candidate) for label, candidate in used.items()}
    not_kept = [*(f"info {k}" for k in lost), *other_constraints, *_left_over(atoms, seen, taken)]
    return Extracted(structure, sources, tuple(not_kept))


def check_results_are_current(atoms: Atoms, where: str) -> None:
    """Refuse calculator results that belong to an earlier geometry of these atoms."""
    calculator = atoms.calc
    if not getattr(calculator, "results", None) or not hasattr(calculator, "check_state"):
        return
    changes = calculator.check_state(atoms)
    if changes:
        raise DataError(
            f"{where}: {', '.join(changes)} changed after the calculator ran, so its results "
            "belong to another structure: compute them again or remove the calculator"
        )


def label_hints(atoms: Atoms) -> list[str]:
    """List what might be a label under another name, for the error that there are none."""
    results = getattr(atoms.calc, "results", None) or {}
    found = [f"{k} (calculator)" for k in results]
    found += [f"{k} (info)" for k, v in atoms.info.items() if _numeric(v)]
    arrays = {k: v for k, v in atoms.arrays.items() if k not in STRUCTURAL}
    return found + [f"{k} (arrays)" for k, v in arrays.items() if _numeric(v)]


def _labels(
    atoms: Atoms, keys: LabelKeys
) -> tuple[dict[str, Any], dict[str, _Candidate], set[tuple[str, str]]]:
    """Give the labels, where each came from, and every (place, key) that agrees with them."""
    n = len(atoms)
    read: dict[str, Callable[[_Candidate], Any]] = {
        "energy": lambda c: real_scalar(str(c), c.value),
        "forces": lambda c: real_array(str(c), c.value, (n, 3)),
        "stress": lambda c: stress_matrix(c.value, str(c)),
        "virial": lambda c: -stress_matrix(c.value, str(c)) / _volume(atoms, c),
    }
    found = {label: _candidates(atoms, label, getattr(keys, label)) for label in NAMES}
    if keys.stress and not keys.virial:
        found["virial"] = []
    if keys.virial and not keys.stress:
        found["stress"] = []
    values: dict[str, Any] = {}
    used: dict[str, _Candidate] = {}
    for label, candidates in found.items():
        target = "stress" if label == "virial" else label
        for candidate in candidates:
            value = read[label](candidate)
            if target not in values:
                values[target], used[target] = value, candidate
            elif not _same(target, values[target], value):
                raise _conflict(target, used[target], values[target], candidate, value)
    seen = {(c.place, c.name) for candidates in found.values() for c in candidates}
    return values, used, seen


def _label_names(keys: LabelKeys) -> set[str]:
    """Collect every key that means a label; none of them stays in ``info``."""
    return {n for label in NAMES for n in _usual_names(label)} | set(keys.named().values())


def _usual_names(label: str) -> list[str]:
    return [prefix + name for prefix in PREFIXES for name in NAMES[label]]


def _candidates(atoms: Atoms, label: str, key: str | None) -> list[_Candidate]:
    names = [key] if key is not None else _usual_names(label)
    results = getattr(atoms.calc, "results", None) or {}
    per_atom = label == "forces"
    places: list[tuple[str, Any]] = [("calculator", results), ("info", atoms.info)]
    if per_atom:
        places.append(("arrays", atoms.arrays))
    return [
        _Candidate(name, place, content[name])
        for place, content in places
        for name in names
        if content.get(name) is not None
    ]


def _same(label: str, a: Any, b: Any) -> bool:
    absolute, relative = SAME[label]
    return bool(np.allclose(a, b, rtol=relative, atol=absolute))


def _conflict(label: str, first: _Candidate, a: Any, second: _Candidate, b: Any) -> DataError:
    unit = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³"}[label]
    difference = np.abs(np.asarray(a) - np.asarray(b)).max()
    option = "stress or --virial" if label == "stress" else label
    return DataError(
        f"conflicting {label}: {first} and {second} differ by {difference:.4g} {unit}; "
        f"say which one holds the label (--{option}-key, or LabelKeys)"
    )


def _volume(atoms: Atoms, candidate: _Candidate) -> float:
    volume = abs(float(np.linalg.det(atoms.cell.array)))
    if not volume > 0:
        raise DataError(f"{candidate} cannot become a stress: the cell has no volume")
    return volume


def _fixed(atoms: Atoms) -> tuple[Array | None, list[str]]:
    from ase.constraints import FixAtoms

    fixed: Array | None = None
    others: list[str] = []
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed = np.zeros(len(atoms), dtype=bool) if fixed is None else fixed
            fixed[constraint.index] = True
        else:
            others.append(f"constraint {type(constraint).__name__}")
    return fixed, sorted(set(others))


def _left_over(atoms: Atoms, seen: set[tuple[str, str]], taken: set[str]) -> list[str]:
    """Name results, arrays and unused label keys that the record has no place for."""
    kept = seen | {("arrays", name) for name in STRUCTURAL}
    places: dict[str, Any] = {
        "calculator": getattr(atoms.calc, "results", None) or {},
        "info": taken.intersection(atoms.info),
        "arrays": atoms.arrays,
    }
    return [
        f"{name} ({place})"
        for place, names in places.items()
        for name in names
        if (place, name) not in kept
    ]


def _is_number(info: dict[str, Any], name: str) -> bool:
    value = info.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numeric(value: Any) -> bool:
    try:
        return np.asarray(value).dtype.kind in "fi"
    except ValueError:
        return False
