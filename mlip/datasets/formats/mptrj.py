"""Read the MPtrj document ``{mp_id: {frame_id: {...}}}``, of any size, one frame at a time.

One pass over the bytes notes where every frame lies (16 bytes a frame); frames are then read from
their place. Energies are ``uncorrected_total_energy``; stress is turned from VASP's kilobar
(compression positive) into eV/Å³ (tension positive).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from mlip.datasets.dataset import DatasetFacts, IndexedDataset
from mlip.datasets.labels import Extracted
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import Array, Structure, real_array, real_scalar, stress_matrix
from mlip.errors import DataError

FORMAT = "MPtrj document (.json)"
ENERGY = "uncorrected_total_energy"
_HEAD = 2**20
_CHUNK = 8 * 2**20
_NESTED = re.compile(rb'\s*\{\s*"[^"]*"\s*:\s*\{\s*"[^"]*"\s*:\s*\{')
_FRAME_DEPTH = 3  # document, material, frame
_LABELS = frozenset({"force", "stress", "structure", ENERGY})
_FINGERPRINT_FRAMES = 16
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


def is_mptrj(path: Path) -> bool:
    """Recognise the document by what its first frame holds, whatever its name."""
    with path.open("rb") as file:
        head = file.read(4096)
        if _NESTED.match(head) is None:
            return False
        head += file.read(_HEAD)
    return b'"uncorrected_total_energy"' in head and b'"structure"' in head


def open_mptrj(path: Path, options: ReadOptions) -> MptrjDataset:
    """Open a document for random access."""
    return MptrjDataset(path, options)


class MptrjDataset(IndexedDataset):
    """Frames of one document; read and checked when asked for. Safe to fork and to pickle.

    A document that ends early has one more entry, which cannot be read and says so.

    Args:
        path: file.
        options: keys of labels, where others than the usual ones are wanted.

    Raises:
        DataError: the document has no whole frame.
    """

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._options = options
        self._state = _state(path)
        self._places, cut = _find_frames(path)
        self._n_atoms: Array | None = None
        if len(self._places) == 0:
            raise DataError(f"{path}: there is no whole frame in this document")
        self._cut = ""
        super().__init__(path, DatasetFacts(FORMAT))
        if cut:
            last = self.name(len(self._places) - 1)
            self._cut = f"the document ends early, the last whole frame is {last}: fetch it again"
            self.facts = DatasetFacts(FORMAT, problems=(f"{path}: {self._cut}",))

    def __len__(self) -> int:
        return len(self._places) + bool(self._cut)

    def extract(self, index: int) -> Extracted:
        """Read a frame with the keys its labels had, and what is not kept of it."""
        name = f"{self.path} frame {index}"
        try:
            frame_id, frame = self._frame(index)
            name = f"{self.path} frame {frame_id}"
            return extract_frame(frame_id, frame, self._options)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    def n_atoms(self) -> Array:
        """Give the number of atoms of every frame, [len] int64; reads all frames the first time."""
        if self._n_atoms is None:
            counts = np.empty(len(self), dtype=np.int64)
            for i in range(len(self)):
                try:
                    counts[i] = len(_sites(self._frame(i)[1]))
                except DataError as error:
                    raise DataError(f"{self.path} frame {i}: {error}") from None
            self._n_atoms = counts
        return self._n_atoms

    def name(self, index: int) -> str:
        """Name the file and the frame by its id."""
        index = range(len(self))[index]
        if index == len(self._places):
            return f"{self.path} frame {index}"
        try:
            return f"{self.path} frame {self._frame(index)[0]}"
        except DataError:
            return f"{self.path} frame {index}"

    def fingerprint(self) -> str:
        """Identify the content: the places of all frames and a sample of them."""
        digest = hashlib.blake2b(self._places.tobytes(), digest_size=8)
        n = len(self._places)
        for i in np.unique(np.linspace(0, n - 1, min(n, _FINGERPRINT_FRAMES)).astype(int)):
            digest.update(self._bytes(int(i)))
        return f"{len(self)}-{digest.hexdigest()}"

    def _bytes(self, index: int) -> bytes:
        if _state(self.path) != self._state:
            raise DataError("the file was changed while in use: open it again")
        start, length = self._places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def _frame(self, index: int) -> tuple[str, dict[str, Any]]:
        """Give id and content of a frame; its bytes begin with its key."""
        if index == len(self._places):
            raise DataError(self._cut)
        try:
            item = orjson.loads(b"{" + self._bytes(index) + b"}")
        except orjson.JSONDecodeError as error:
            raise DataError(f"the frame is no JSON ({error}): fetch the file again") from None
        frame_id, frame = next(iter(item.items()))
        return frame_id, frame


def _state(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _find_frames(path: Path) -> tuple[Array, bool]:
    """Find where frames lie, [frames, 2] start of the key and length, and whether one is cut.

    Braces outside of strings are counted; a frame is what the third level of braces encloses.
    """
    starts: list[Array] = []
    ends: list[Array] = []
    quotes = np.empty(0, dtype=np.int64)  # the last two before the chunk
    depth, in_string = 0, 0
    for offset, chunk in _chunks(path):
        data = np.frombuffer(chunk, dtype=np.uint8)
        is_quote = data == ord('"')
        if b"\\" in chunk:
            # Every second of a pair is escaped; such pairs lie inside of strings only.
            is_quote[[match.start() + 1 for match in _ESCAPED.finditer(chunk)]] = False
        inside = (np.cumsum(is_quote, dtype=np.uint8) + np.uint8(in_string)) & 1
        braces = np.flatnonzero(((data == ord("{")) | (data == ord("}"))) & (inside == 0))
        opens = data[braces] == ord("{")
        depths = depth + np.cumsum(np.where(opens, 1, -1))
        quotes = np.concatenate([quotes, np.flatnonzero(is_quote) + offset])
        begun = braces[opens & (depths == _FRAME_DEPTH)] + offset
        starts.append(quotes[np.maximum(np.searchsorted(quotes, begun) - 2, 0)])
        ends.append(braces[~opens & (depths == _FRAME_DEPTH - 1)] + offset + 1)
        quotes = quotes[-2:]
        depth = int(depths[-1]) if len(depths) else depth
        in_string = int(inside[-1])
    first, last = np.concatenate(starts), np.concatenate(ends)
    whole = min(len(first), len(last))
    places = np.stack([first[:whole], last[:whole] - first[:whole]], axis=1)
    return places, bool(depth or in_string)


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read a file in pieces that never end with a backslash (unless the file does)."""
    offset = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            while chunk.endswith(b"\\") and (more := file.read(1)):
                chunk += more
            yield offset, chunk
            offset += len(chunk)


def extract_frame(frame_id: str, frame: Any, options: ReadOptions) -> Extracted:
    """Turn a frame into a structure.

    Raises:
        DataError: bad content; the text names the field.
    """
    keys = options.keys
    numbers, positions, cell, pbc = _geometry(frame)
    from ase.units import GPa

    wanted = {"energy": (ENERGY, keys.energy), "forces": ("force", keys.forces)}
    wanted["stress"] = ("stress", keys.stress)
    labels: dict[str, Any] = {}
    used: dict[str, str] = {}
    for label, (usual, named) in wanted.items():
        key = named or usual
        if key not in frame:
            if named:
                raise DataError(f"{key} is missing, which was named as the key of the {label}")
            continue
        labels[label] = _label(label, key, frame[key], len(numbers), -0.1 * GPa)
        used[label] = f"{key} (frame)"
    taken = _LABELS.union(used_key.rpartition(" ")[0] for used_key in used.values())
    info = {key: value for key, value in frame.items() if key not in taken}
    charge = frame["structure"].get("charge") or None
    structure = Structure(
        numbers=np.array(numbers), positions=positions, cell=cell, pbc=pbc, charge=charge,
        info={**info, "sid": frame_id}, **labels,
    )  # fmt: skip
    lost = ("structure properties",) if frame["structure"].get("properties") else ()
    return Extracted(structure, used, lost)


def _label(label: str, key: str, value: Any, n: int, stress_unit: float) -> Any:
    if value is None:
        raise DataError(f"{key} is null, expected numbers")
    if label == "energy":
        return real_scalar(key, value)
    if label == "forces":
        return real_array(key, value, (n, 3))
    return stress_matrix(value, key) * stress_unit


def _geometry(frame: Any) -> tuple[list[int], Any, Any, Any]:
    sites = _sites(frame)
    numbers = [_atomic_number(i, site) for i, site in enumerate(sites)]
    lattice = frame["structure"].get("lattice")
    if not isinstance(lattice, dict) or "matrix" not in lattice:
        raise DataError("structure has no lattice matrix")
    cell = real_array("lattice matrix", lattice["matrix"], (3, 3))
    if all("xyz" in site for site in sites):
        positions = real_array("xyz", [site["xyz"] for site in sites], (len(sites), 3))
    elif all("abc" in site for site in sites):
        fractions = real_array("abc", [site["abc"] for site in sites], (len(sites), 3))
        with np.errstate(over="ignore", invalid="ignore"):  # checked later
            positions = fractions @ cell
    else:
        raise DataError("a site has neither xyz nor abc")
    return numbers, positions, cell, lattice.get("pbc", [True] * 3)


def _sites(frame: Any) -> list[dict[str, Any]]:
    structure = frame.get("structure") if isinstance(frame, dict) else None
    sites = structure.get("sites") if isinstance(structure, dict) else None
    if not isinstance(sites, list) or not all(isinstance(site, dict) for site in sites):
        raise DataError("there is no structure with a list of sites")
    return sites


def _atomic_number(index: int, site: dict[str, Any]) -> int:
    from ase.data import atomic_numbers

    species = site.get("species")
    if not isinstance(species, list) or not all(isinstance(s, dict) for s in species):
        raise DataError(f"site {index} has no list of species")
    if len(species) != 1 or species[0].get("occu") != 1:
        parts = ", ".join(f"{s.get('element')} {s.get('occu')}" for s in species) or "nothing"
        raise DataError(f"site {index} is disordered ({parts}), expected one whole atom")
    element = species[0].get("element")
    number = atomic_numbers.get(element, 0) if isinstance(element, str) else 0
    if number < 1:
        raise DataError(f"site {index} is {element!r}, which is no element")
    return number
