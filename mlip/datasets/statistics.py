"""Collect what a data set contains, one structure at a time, in a few numbers a structure."""

from __future__ import annotations

import base64
import hashlib
from array import array
from collections import Counter
from typing import Any

import numpy as np

from mlip.datasets.structure import LABELS, Array, Structure
from mlip.graph import pair_distances

# Energies per atom of one composition further from their median than this many robust standard
# deviations (1.4826 MAD, at least ENERGY_FLOOR), in groups of at least MIN_GROUP, are outliers.
ENERGY_DEVIATIONS = 20.0
ENERGY_FLOOR = 0.01  # eV/atom
MIN_GROUP = 10
LARGE_FORCE = 50.0  # eV/Å
SHORT_DISTANCE = 0.5  # of the sum of two covalent radii
FIRST_RADIUS, WIDER_RADII = 2.0, (4.0, 8.0)  # Å
NEXT_RADIUS = 1.1  # times the nearest distance of the structure before
VOLUME_SPREAD = 0.005  # relative; less volume change than this says nothing about a stress
NO_VALUE = float("nan")

QUANTITIES = {
    "atoms": "",
    "energy per atom": "eV",
    "largest force": "eV/Å",
    "net force": "eV/Å",
    "largest stress": "eV/Å³",
    "volume per atom": "Å³",
    "nearest distance": "Å",
}
_ARRAYS = ("_closest", "_traces", "_hashes", "_groups", "_files")
_COUNTERS = ("element_atoms", "element_frames", "config_types", "labelled")


class Statistics:
    """Numbers of every structure added so far, in order: 56 bytes a structure."""

    def __init__(self) -> None:
        exact = {"energy per atom"}
        self._columns = {name: array("d" if name in exact else "f") for name in QUANTITIES}
        self._closest = array("f")  # nearest distance over the sum of covalent radii
        self._traces = array("f")  # of the stress, eV/Å³
        self._hashes = array("Q")
        self._groups = array("I")
        self._files = array("I")
        self._radius = FIRST_RADIUS
        self._compositions: dict[bytes, int] = {}
        self.element_atoms: Counter[int] = Counter()
        self.element_frames: Counter[int] = Counter()
        self.config_types: Counter[str] = Counter()
        self.labelled: Counter[str] = Counter()
        self.zero_forces_on_fixed = 0

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, structure: Structure, file: int = 0) -> None:
        """Add a structure that comes from the input number ``file``.

        Raises:
            InputError: two atoms coincide.
        """
        s, n = structure, len(structure)
        distance, ratio = nearest_distance(s, self._radius)
        self._radius = min(WIDER_RADII[0], NEXT_RADIUS * distance)  # the first if that is NaN
        volume = abs(float(np.linalg.det(s.cell))) / n if s.pbc.all() else NO_VALUE
        values = {
            "atoms": n,
            "energy per atom": NO_VALUE if s.energy is None else s.energy / n,
            "largest force": NO_VALUE if s.forces is None else _largest_norm(s.forces),
            "net force": NO_VALUE if s.forces is None else _largest_norm(s.forces.sum(0)[None]),
            "largest stress": NO_VALUE if s.stress is None else float(np.abs(s.stress).max()),
            "volume per atom": volume,
            "nearest distance": distance,
        }
        for name, value in values.items():
            self._columns[name].append(value)
        self._closest.append(ratio)
        self._traces.append(NO_VALUE if s.stress is None else float(np.trace(s.stress)))
        self._hashes.append(geometry_hash(s))
        self._files.append(file)
        self._count(s)

    def to_record(self) -> dict[str, Any]:
        """Give everything as plain JSON values; numbers keep every bit (see ``extend``)."""
        arrays = {**self._columns, **{name: getattr(self, name) for name in _ARRAYS}}
        return {
            "arrays": {name: _packed(values) for name, values in arrays.items()},
            "compositions": [key.hex() for key in self._compositions],
            "counters": {name: list(getattr(self, name).items()) for name in _COUNTERS},
            "zero_forces_on_fixed": self.zero_forces_on_fixed,
        }

    def extend(self, record: dict[str, Any], file: int | None = None) -> None:
        """Add all structures of a record behind those here, as if added one by one.

        Args:
            record: what ``to_record`` of another instance gave.
            file: number of the input that all of them come from, if the record has another.
        """
        new = {name: _unpacked(data) for name, data in record["arrays"].items()}
        for name, values in self._columns.items():
            values.extend(new[name])
        groups = [
            self._compositions.setdefault(bytes.fromhex(key), len(self._compositions))
            for key in record["compositions"]
        ]
        new["_groups"] = array("I", [groups[i] for i in new["_groups"]])
        if file is not None:
            new["_files"] = array("I", [file]) * len(new["_files"])
        for name in _ARRAYS:
            getattr(self, name).extend(new[name])
        for name in _COUNTERS:
            getattr(self, name).update(dict(record["counters"][name]))
        self.zero_forces_on_fixed += record["zero_forces_on_fixed"]

    def column(self, name: str) -> Array:
        """Give one quantity of every structure; NaN where it has none."""
        return np.array(self._columns[name])

    def files(self) -> Array:
        """Give the input number of every structure."""
        return np.array(self._files, dtype=np.int64)

    def hashes(self) -> Array:
        """Give the geometry hash of every structure."""
        return np.array(self._hashes, dtype=np.uint64)

    def outliers(self) -> dict[int, str]:
        """Find suspicious structures; gives a reason for each index."""
        found: dict[int, str] = {}
        energy, group = self.column("energy per atom"), np.array(self._groups, dtype=np.int64)
        for members in _members(np.where(np.isnan(energy), -1, group)):
            if len(members) < MIN_GROUP:
                continue
            off = energy[members] - np.median(energy[members])
            width = max(ENERGY_FLOOR, 1.4826 * float(np.median(np.abs(off))))
            for i, x in zip(members, off, strict=True):
                if abs(x) > ENERGY_DEVIATIONS * width:
                    found[int(i)] = f"energy {x:+.3g} eV/atom from the median of its composition"
        force = self.column("largest force")
        for i in np.flatnonzero(force > LARGE_FORCE):
            found[int(i)] = f"force of {force[i]:.4g} eV/Å"
        distance = self.column("nearest distance")
        for i in np.flatnonzero(np.array(self._closest) < SHORT_DISTANCE):
            found[int(i)] = f"two atoms {distance[i]:.3g} Å apart"
        return dict(sorted(found.items()))

    def same_geometry(self) -> list[Array]:
        """Give the indices of each exact geometry that occurs more than once."""
        groups = _members(np.unique(self.hashes(), return_inverse=True)[1].reshape(-1))
        return [members for members in groups if len(members) > 1]

    def duplicates(self) -> tuple[int, int]:
        """Count structures whose exact geometry came before, and those with another energy."""
        same = self.same_geometry()
        energy = self.column("energy per atom")
        labels = [e[~np.isnan(e)] for e in (energy[m] for m in same)]
        differ = sum(len(e) > 1 and np.ptp(e) > 1e-6 for e in labels)
        return sum(len(m) - 1 for m in same), differ

    def stress_follows_volume(self) -> float | None:
        """Correlate the trace of the stress with the volume, inside each composition.

        Matter resists: stretched it pulls (a positive trace in the sign of ASE), compressed it
        pushes. A clearly negative value means the opposite sign.

        Returns:
            The median of the correlations; None where no composition has enough structures of
            different volumes.
        """
        volume, trace = self.column("volume per atom"), np.array(self._traces)
        usable = ~(np.isnan(volume) | np.isnan(trace))
        found: list[float] = []
        for members in _members(np.where(usable, np.array(self._groups, dtype=np.int64), -1)):
            v, t = volume[members], trace[members]
            if len(members) >= MIN_GROUP and v.std() > VOLUME_SPREAD * v.mean() and t.std() > 0:
                found.append(float(np.corrcoef(v, t)[0, 1]))
        return float(np.median(found)) if found else None

    def overlap(self, a: int, b: int) -> int:
        """Count geometries of input ``b`` that are also in input ``a``."""
        hashes, files = self.hashes(), self.files()
        return int(np.isin(hashes[files == b], hashes[files == a]).sum())

    def ranges(self) -> dict[str, dict[str, Any]]:
        """Give minimum, median and maximum of each quantity that occurs."""
        result: dict[str, dict[str, Any]] = {}
        for name, unit in QUANTITIES.items():
            values = self.column(name)
            values = values[~np.isnan(values)]
            if values.size:
                low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
                result[name] = {"min": low, "median": middle, "max": high, "unit": unit}
        return result

    def _count(self, s: Structure) -> None:
        counts = np.bincount(s.numbers)
        present = np.flatnonzero(counts)
        for z in present.tolist():
            self.element_atoms[z] += int(counts[z])
            self.element_frames[z] += 1
        group = self._compositions.setdefault(reduced_composition(s), len(self._compositions))
        self._groups.append(group)
        if "config_type" in s.info:
            self.config_types[str(s.info["config_type"])] += 1
        for label in LABELS:
            self.labelled[label] += getattr(s, label) is not None
        if s.fixed is not None and s.fixed.any() and s.forces is not None:
            self.zero_forces_on_fixed += not s.forces[s.fixed].any()


def reduced_composition(structure: Structure) -> bytes:
    """Give a key that is equal for structures of one reduced formula."""
    counts = np.bincount(structure.numbers)
    return (counts // np.gcd.reduce(counts[counts > 0])).tobytes()


def geometry_hash(structure: Structure) -> int:
    """Hash elements, positions, cell and pbc exactly (64 bits); labels do not count."""
    s = structure
    digest = hashlib.blake2b(digest_size=8)
    for part in (s.numbers, s.positions + 0.0, s.cell + 0.0, s.pbc):  # + 0.0: no negative zeros
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest(), "little")


def nearest_distance(
    structure: Structure, first_radius: float = FIRST_RADIUS
) -> tuple[float, float]:
    """Give the shortest distance, Å, and the shortest over the sum of covalent radii.

    Images count; both are NaN when no two atoms come closer than 8 Å. The ratio is exact where it
    is below 1/2; above, longer pairs may have a smaller one.

    Args:
        structure: structure.
        first_radius: where the search begins, Å; it is fastest just above the shortest distance.

    Raises:
        InputError: two atoms coincide.
    """
    from ase.data import covalent_radii

    s = structure
    radii = covalent_radii[s.numbers]
    for radius in (max(first_radius, float(radii.max())), *WIDER_RADII):
        (source, target), lengths = pair_distances(s.positions, s.cell, s.pbc, radius)
        if source.size:
            return float(lengths.min()), float((lengths / (radii[source] + radii[target])).min())
    return NO_VALUE, NO_VALUE


def _packed(values: array[Any]) -> list[str]:
    return [values.typecode, base64.b64encode(values.tobytes()).decode()]


def _unpacked(data: list[str]) -> array[Any]:
    values = array(data[0])
    values.frombytes(base64.b64decode(data[1]))
    return values


def _largest_norm(forces: Array) -> float:
    return float(np.linalg.norm(forces, axis=1).max())


def _members(group: Array) -> list[Array]:
    """Give the indices of each group; a negative group is none."""
    order = np.argsort(group, kind="stable")
    order = order[group[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if order.size else []
