"""Compare data sets, read through ``open_dataset``, with numbers that other code computed.

One sample is a file or folder with a record of expectations (``expected.json``); every key of the
record is checked or counts as a failure.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip.datasets.check import describe
from mlip.datasets.collection import open_dataset
from mlip.datasets.dataset import ConcatenatedDataset, Dataset
from mlip.datasets.structure import Array, Structure
from mlip.errors import DataError, DataWarning

# Sums of float64 numbers may be taken in another order.
SUM_TOLERANCE = 1e-12
# Another file of the same structures may have been written with other unit constants and decimals.
OTHER_FILE_TOLERANCE = 1e-6
COMPRESSED = (".xz", ".gz", ".bz2")


class Row(NamedTuple):
    """One checked field."""

    field: str
    expected: Any
    found: Any
    ok: bool
    note: str = ""


class Representation(NamedTuple):
    """One set of files that holds the structures of a sample."""

    label: str
    paths: list[Path]
    primary: bool


@dataclass
class Content:
    """What the structures of a data set add up to."""

    dataset: Dataset
    paths: list[Path]
    structures: list[Structure] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def raw(self, index: int) -> Mapping[str, Any]:
        """Give the fields of an entry as the file has them."""
        return raw_entry(self.dataset, self.indices[index])

    def present(self, name: str) -> list[Any]:
        """Give one field of every structure that has it."""
        values = (getattr(s, name) for s in self.structures)
        return [value for value in values if value is not None]

    def info(self, name: str) -> list[Any]:
        """Give one extra of every structure that has it."""
        return [s.info[name] for s in self.structures if s.info.get(name) is not None]


def check_sample(root: Path, name: str, expected: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Compare every representation of a sample with its record.

    Args:
        root: folder that holds the sample.
        name: path of the sample below ``root``.
        expected: record of the sample.

    Returns:
        The rows of each representation, under its label.
    """
    result: dict[str, list[Row]] = {}
    primary: Content | None = None
    for place in representations(root, name, expected):
        try:
            content = read_content(place.paths)
            if place.primary:
                primary = content
                rows = _rows(content, expected, root)
            else:
                rows = _rows_of_other_file(content, primary, expected)
        except DataError as error:
            rows = [Row("read", "no error", str(error), False)]
        except Exception as error:  # a fault of the reader is a finding too
            rows = [Row("read", "no error", f"{type(error).__name__}: {error}", False)]
        result[place.label] = rows
    return result


def representations(root: Path, name: str, expected: Mapping[str, Any]) -> Iterator[Representation]:
    """Give the files of a sample: those of its record first, then others of the same structures."""
    path = root / name
    if not path.is_dir():
        yield Representation(name, [path], True)
        for suffix in COMPRESSED:
            other = path.with_name(path.name + suffix)
            if other.exists():
                yield Representation(name + suffix, [other], True)
        return
    folders = sorted({(root / file).parent for file in expected.get("files", {})}) or [path]
    yield Representation(name, folders, True)
    if path not in folders:
        for other in sorted(set(path.iterdir()) - set(folders)):
            yield Representation(str(other.relative_to(root)), [other], False)


def read_content(paths: list[Path]) -> Content:
    """Open files through the public function and read every structure.

    Raises:
        DataError: a file or an entry is bad.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the problems have rows of their own
        dataset = open_dataset(paths)
    structures = [dataset[i] for i in range(len(dataset))]
    return Content(dataset, paths, structures, list(range(len(structures))))


def raw_entry(dataset: Any, index: int) -> Mapping[str, Any]:
    """Give the fields of an entry as the file has them (formats that offer it)."""
    if isinstance(dataset, ConcatenatedDataset):
        part, place = dataset.locate(index)
        return raw_entry(dataset.parts[part], place)
    entry: Mapping[str, Any] = dataset.raw(index)
    return entry


def _rows(content: Content, expected: Mapping[str, Any], root: Path) -> list[Row]:
    rows: list[Row] = []
    for key, value in expected.items():
        if key == "files":
            rows += [_file_row(root, name, digest) for name, digest in value.items()]
        elif key.endswith(".npz"):
            rows += _table_rows(content.paths[0] / key, value)
        elif key == "fields":
            rows += _field_rows(content.raw(0), value)
        elif key in EXACT:
            rows.append(_exact(key, value, EXACT[key](content)))
        elif key in SUMS:
            rows.append(_sum(key, value, SUMS[key](content), SUM_TOLERANCE))
        elif key in STRESS:
            rows.append(_stress_row(key, value, content, expected, 0.0))
        else:
            rows.append(Row(key, value, None, False, "UNKNOWN KEY: NOT CHECKED"))
    index = content.dataset.n_atoms()
    rows.append(_exact("index of sizes", [len(s) for s in content.structures], index.tolist()))
    for problem in content.dataset.facts.problems:
        rows.append(Row("problem reported", "", problem, True))
    return rows


def _rows_of_other_file(
    content: Content, primary: Content | None, expected: Mapping[str, Any]
) -> list[Row]:
    """Compare another file of the same structures, matched by sid; it may have more of them."""
    if primary is None:
        return [Row("read", "no error", "the files of the record could not be read", False)]
    places = {s.info.get("sid"): i for i, s in enumerate(content.structures)}
    wanted = [s.info.get("sid") for s in primary.structures]
    absent = [sid for sid in wanted if sid not in places]
    rows = [Row("structures matched by sid", len(wanted), len(wanted) - len(absent), not absent)]
    if absent:
        return rows
    order = [places[sid] for sid in wanted]
    matched = Content(content.dataset, content.paths, [content.structures[i] for i in order], order)
    further = sorted(str(sid) for sid in set(places) - set(wanted))
    rows.append(Row("further structures", "any", len(further), True, ", ".join(further[:5])))
    for key, value in expected.items():
        if key in EXACT and not key.startswith("txt"):
            rows.append(_exact(key, value, EXACT[key](matched)))
        elif key in SUMS:
            rows.append(_sum(key, value, SUMS[key](matched), OTHER_FILE_TOLERANCE))
        elif key in STRESS:
            rows.append(_stress_row(key, value, matched, expected, OTHER_FILE_TOLERANCE))
    return rows


def _exact(key: str, expected: Any, found: Any) -> Row:
    expected, found = _plain(expected), _plain(found)
    return Row(key, expected, found, expected == found)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _sum(key: str, expected: float, terms: list[float] | None, tolerance: float) -> Row:
    if terms is None:
        return Row(key, expected, None, False, "not in the data")
    found, scale = math.fsum(terms), math.fsum(map(abs, terms))
    return _close(key, expected, found, abs(expected - found) / (scale or 1.0), tolerance)


def _close(key: str, expected: Any, found: Any, deviation: float, tolerance: float) -> Row:
    note = f"deviation {deviation:.1e}, at most {tolerance:.0e}"
    return Row(key, expected, found, deviation <= tolerance, note)


def _stress_row(
    key: str, value: Any, content: Content, expected: Mapping[str, Any], tolerance: float
) -> Row:
    """Compare stresses in the form of the record: six Voigt numbers or nine."""
    nine = np.size(expected.get("stress_first", ())) == 9
    stresses = [s.ravel() if nine else _voigt(s) for s in content.present("stress")]
    if key == "stress_sumsq":
        return _sum(key, value, _squares(stresses), max(tolerance, SUM_TOLERANCE))
    found = stresses[0] if stresses else np.zeros(0)
    wanted = np.ravel(value)
    if found.shape != wanted.shape:
        return Row(key, value, found.tolist(), False)
    deviation = float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))
    return _close(key, value, found.tolist(), deviation, tolerance)


def _voigt(s: Array) -> Array:
    return np.array([s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]])


def _squares(arrays: list[Array]) -> list[float]:
    return [float(np.sum(np.square(array))) for array in arrays]


def _file_row(root: Path, name: str, digest: str) -> Row:
    path = root / name
    if not path.is_file():
        return Row(f"file {name}", digest, "no such file", False)
    found = hashlib.sha256(path.read_bytes()).hexdigest()[: len(digest)]
    return _exact(f"file {name}", digest, found)


def _table_rows(path: Path, expected: Mapping[str, Any]) -> list[Row]:
    """Compare the arrays of an npz file: dtype, length, and the sum or the first values."""
    if not path.is_file():
        return [Row(path.name, expected, "no such file", False)]
    rows: list[Row] = []
    with np.load(path, allow_pickle=False) as arrays:
        rows.append(_exact(f"{path.name}: arrays", sorted(expected), sorted(arrays.files)))
        for name in sorted(set(expected) & set(arrays.files)):
            value, wanted = arrays[name], expected[name]
            last = wanted[2] if len(wanted) > 2 else None
            content = value[: len(last)] if isinstance(last, list) else value.sum()
            kind = value.dtype.str if value.dtype.kind == "U" else value.dtype.name
            found = [kind, len(value), _plain(content)]
            rows.append(_exact(f"{path.name}: {name}", wanted, found[: len(wanted)]))
    return rows


def _field_rows(raw: Mapping[str, Any], expected: Mapping[str, str]) -> list[Row]:
    found = {key: describe(value) for key, value in raw.items() if value is not None}
    names = [*expected, *(key for key in found if key not in expected)]
    return [
        _exact(f"field {name}", expected.get(name, "absent"), found.get(name, "absent"))
        for name in names
    ]


def _sidecar(content: Content) -> list[str]:
    """Read the lines of the text file beside raw OC20 structures."""
    path = content.paths[0]
    packed = path.suffix == ".xz"
    text = path.with_suffix("").with_suffix(".txt.xz") if packed else path.with_suffix(".txt")
    with lzma.open(text, "rt") if packed else text.open() as file:
        return file.read().splitlines()


def _first(values: list[Any]) -> Any:
    return values[0] if values else None


def _edges(content: Content) -> list[float]:
    return [content.raw(i)["edge_index"].shape[1] for i in range(len(content.structures))]


def _info_sum(name: str) -> Callable[[Content], list[float] | None]:
    def terms(content: Content) -> list[float] | None:
        values = content.info(name)
        if len(values) != len(content.structures):
            return None
        return [float(x) for value in values for x in np.ravel(value)]

    return terms


EXACT: dict[str, Callable[[Content], Any]] = {
    "structures": lambda c: len(c.structures),
    "natoms_total": lambda c: sum(map(len, c.structures)),
    "natoms_first": lambda c: len(c.structures[0]),
    "numbers_sum": lambda c: int(sum(s.numbers.sum() for s in c.structures)),
    "first_energy": lambda c: c.structures[0].energy,
    "energies": lambda c: len(c.present("energy")),
    "first_force": lambda c: _first([f[0] for f in c.present("forces")]),
    "forced": lambda c: len(c.present("forces")),
    "stressed": lambda c: len(c.present("stress")),
    "tags_sum": lambda c: int(sum(t.sum() for t in c.present("tags"))),
    "fixed_sum": lambda c: int(sum(f.sum() for f in c.present("fixed"))),
    "first_sid": lambda c: c.structures[0].info.get("sid"),
    "first_fid": lambda c: c.structures[0].info.get("fid"),
    "edges_total": lambda c: sum(_edges(c)),
    "charge": lambda c: [s.charge for s in c.structures],
    "spin": lambda c: [s.spin for s in c.structures],
    "txt_first": lambda c: _first(_sidecar(c)),
    "txt_lines": lambda c: len(_sidecar(c)),
}
SUMS: dict[str, Callable[[Content], list[float] | None]] = {
    "energy_sum": lambda c: c.present("energy"),
    "force_sumsq": lambda c: _squares(c.present("forces")),
    "y_init_sum": _info_sum("y_init"),
    "y_relaxed_sum": _info_sum("y_relaxed"),
    "pos_relaxed_sum": _info_sum("pos_relaxed"),
}
STRESS = ("stress_first", "stress_sumsq")
