"""Make data sets from data sets: merge, split without leaks, take a subset, filter.

All of them are conversions with some frames left out: checked, reported, never half-written.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlip.datasets.convert import convert
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import Entry, PathLike, expand, find_reader, iterate_file
from mlip.datasets.report import ConversionReport
from mlip.datasets.sources import stated_metadata
from mlip.datasets.split import assign_parts
from mlip.datasets.statistics import geometry_hash, nearest_distance, reduced_composition
from mlip.datasets.structure import LABELS, Array, Structure
from mlip.errors import DataError, InputError

PART_NAMES = {2: ("train", "valid"), 3: ("train", "valid", "test")}


def merge(
    inputs: PathLike | Sequence[PathLike], output: PathLike, **settings: Any
) -> ConversionReport:
    """Write several data sets one after the other into one.

    Args:
        inputs: files, folders or patterns, at least two files in all.
        output: see :func:`mlip.datasets.convert.convert`.
        settings: further settings of ``convert``.

    Raises:
        InputError: a single input.
        DataError: see ``convert``; also if adsorption and total energies would be mixed.
    """
    if len(expand(inputs)) < 2:
        raise InputError("merging needs at least two files; one alone goes through mlip convert")
    return convert(inputs, output, **settings)


def split(
    inputs: PathLike | Sequence[PathLike],
    folder: PathLike,
    fractions: Sequence[float],
    *,
    by: str = "geometry",
    stratify: str | None = None,
    seed: int = 0,
    suffix: str = ".lmdb",
    options: ReadOptions | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, ConversionReport]:
    """Split data sets at random into parts that share no group.

    Args:
        inputs: files, folders or patterns.
        folder: gets ``train.lmdb``, ``valid.lmdb`` (and ``test.lmdb``); ``part0.lmdb`` and so on
            for more than three parts.
        fractions: share of each part; they add up to 1.
        by: what must stay together: ``"geometry"`` (equal structures), ``"composition"``
            (structures of one reduced formula) or the name of an entry of ``info`` (sid, mp_id).
        stratify: ``"composition"`` or the name of an entry of ``info``: each of its values is
            spread over the parts in proportion, as far as the groups allow.
        seed: seed of the draw; the same for the same result.
        suffix: kind of the outputs.
        options: see :class:`~mlip.datasets.options.ReadOptions`.
        resume: continue an interrupted split of the same inputs.
        settings: further settings of ``convert``.

    Returns:
        The report of each part; parts that an interrupted split had finished have none. Bad frames
        are counted in that of the first one.

    Raises:
        InputError: fractions that make no split, or fewer groups than parts.
        DataError: a structure without the entry that was named; see also ``convert``.
    """
    options = options or ReadOptions()
    names = PART_NAMES.get(len(fractions)) or tuple(f"part{i}" for i in range(len(fractions)))
    files, targets = expand(inputs), [Path(folder) / f"{name}{suffix}" for name in names]
    _keep_apart(files, targets)
    groups, classes, lengths = _grouped(files, by, stratify, options)
    part = assign_parts(groups, fractions, seed, classes)
    reports: dict[str, ConversionReport] = {}
    for number, (name, target) in enumerate(zip(names, targets, strict=True)):
        wanted = part == number
        digest = hashlib.blake2b(np.packbits(wanted).tobytes(), digest_size=8).hexdigest()
        mark = {"part": name, "by": by, "fractions": list(fractions), "seed": seed, "of": digest}
        if resume and target.exists() and _states(target, mark):
            continue
        reports[name] = convert(
            inputs, target, options=options, resume=resume, metadata={"split": mark},
            selected=np.split(wanted, np.cumsum(lengths)[:-1]), **settings,
        )  # fmt: skip
    return reports


def _states(path: Path, mark: dict[str, Any]) -> bool:
    """Tell whether a data set is a finished part of this very split."""
    reader = find_reader(path)
    if reader.open is None:
        return False
    return stated_metadata(reader.open(path, ReadOptions())).get("split") == mark


def subset(
    inputs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    number: int | None = None,
    fraction: float | None = None,
    indices: Sequence[int] | Array | None = None,
    seed: int = 0,
    options: ReadOptions | None = None,
    **settings: Any,
) -> ConversionReport:
    """Take some frames, at random or by number; they keep their order.

    Args:
        inputs: files, folders or patterns.
        output: see :func:`mlip.datasets.convert.convert`.
        number: how many frames to draw, or
        fraction: which share of them, or
        indices: which ones, counted from 0 over all inputs.
        seed: seed of the draw.
        options: see :class:`~mlip.datasets.options.ReadOptions`.
        settings: further settings of ``convert``.

    Raises:
        InputError: not exactly one choice, or one that the data cannot fulfil.
        DataError: see ``convert``.
    """
    options = options or ReadOptions()
    lengths = [_length(path, options) for path in expand(inputs)]
    total = sum(lengths)
    mask = np.zeros(total, dtype=bool)
    mask[_choose(total, number, fraction, indices, seed)] = True
    selected = np.split(mask, np.cumsum(lengths)[:-1])
    return convert(inputs, output, options=options, selected=selected, **settings)


@dataclass(frozen=True)
class Criteria:
    """Say which structures are wanted; a criterion that is None or empty admits all.

    Args:
        elements: symbols; a structure with any other element is left out.
        max_atoms: largest number of atoms.
        max_forces: largest length of a force, eV/Å; without forces a structure passes.
        min_distance: smallest distance of two atoms, Å, images included.
        has: labels that must be there: energy, forces, stress.
        where: entries of ``info`` and the text of their value.

    Raises:
        InputError: an unknown element or label.
    """

    elements: tuple[str, ...] = ()
    max_atoms: int | None = None
    max_forces: float | None = None
    min_distance: float | None = None
    has: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        from ase.data import atomic_numbers

        for symbol in self.elements:
            if symbol not in atomic_numbers:
                raise InputError(f"{symbol!r} is not an element symbol")
        for label in self.has:
            if label not in LABELS:
                raise InputError(f"{label!r} is no label, known: {', '.join(LABELS)}")

    def __call__(self, structure: Structure) -> str | None:
        """Say why a structure is left out, None if it is wanted."""
        from ase.data import atomic_numbers

        s = structure
        wanted = [atomic_numbers[symbol] for symbol in self.elements]
        if wanted and not np.isin(s.numbers, wanted).all():
            return "other elements"
        if self.max_atoms is not None and len(s) > self.max_atoms:
            return f"more than {self.max_atoms} atoms"
        if missing := [label for label in self.has if getattr(s, label) is None]:
            return f"no {missing[0]}"
        largest = 0.0 if s.forces is None else float(np.linalg.norm(s.forces, axis=1).max())
        if self.max_forces is not None and largest > self.max_forces:
            return f"forces above {self.max_forces:g} eV/Å"
        for key, value in self.where:
            if str(s.info.get(key)) != value:
                return f"{key} is not {value}"
        if self.min_distance is not None and nearest_distance(s)[0] < self.min_distance:
            return f"atoms closer than {self.min_distance:g} Å"
        return None


def filter_structures(
    inputs: PathLike | Sequence[PathLike], output: PathLike, criteria: Criteria, **settings: Any
) -> ConversionReport:
    """Write the structures that meet all criteria; the report counts why others were left out.

    Args:
        inputs: files, folders or patterns.
        output: see :func:`mlip.datasets.convert.convert`.
        criteria: what is wanted.
        settings: further settings of ``convert``.

    Raises:
        DataError: see ``convert``; also if nothing is left.
    """
    return convert(inputs, output, accept=criteria, **settings)


def _grouped(
    files: Sequence[Path], by: str, stratify: str | None, options: ReadOptions
) -> tuple[Array, Array | None, list[int]]:
    """Number group and class of every frame, -1 for a bad one; also the frames of each file."""
    group_key, class_key = _key(by), _key(stratify) if stratify else None
    groups, classes, lengths = array("q"), array("q"), []
    for path in files:
        before = len(groups)
        for entry in iterate_file(path, options):
            groups.append(_hashed(group_key, entry))
            if class_key is not None:
                classes.append(_hashed(class_key, entry))
        lengths.append(len(groups) - before)
    return np.array(groups), np.array(classes) if stratify else None, lengths


def _hashed(key: Callable[[Entry], bytes], entry: Entry) -> int:
    if entry.structure is None:
        return -1
    return int.from_bytes(hashlib.blake2b(key(entry), digest_size=8).digest(), "little") >> 1


def _key(name: str) -> Callable[[Entry], bytes]:
    if name == "geometry":
        return lambda entry: geometry_hash(_structure(entry)).to_bytes(8, "little")
    if name == "composition":
        return lambda entry: reduced_composition(_structure(entry))

    def of_info(entry: Entry) -> bytes:
        value = _structure(entry).info.get(name)
        if value is None:
            known = ", ".join(sorted(_structure(entry).info)) or "nothing"
            raise DataError(f"{entry.name}: info has no {name!r}; it has {known}")
        return str(value).encode()

    return of_info


def _structure(entry: Entry) -> Structure:
    assert entry.structure is not None
    return entry.structure


def _keep_apart(files: Sequence[Path], outputs: Sequence[Path]) -> None:
    same = {path.resolve() for path in files} & {path.resolve() for path in outputs}
    if same:
        raise DataError(f"{same.pop()} is both input and output: choose another folder")


def _length(path: Path, options: ReadOptions) -> int:
    reader = find_reader(path)
    if reader.open is not None:
        return len(reader.open(path, options))
    return sum(1 for _ in reader.read(path, 0, options))


def _choose(
    total: int,
    number: int | None,
    fraction: float | None,
    indices: Sequence[int] | Array | None,
    seed: int,
) -> Array:
    given = [choice is not None for choice in (number, fraction, indices)]
    if sum(given) != 1:
        raise InputError("give one of number, fraction and indices")
    if indices is not None:
        wanted = np.asarray(indices)
        if wanted.dtype.kind not in "iu" or wanted.ndim != 1 or len(wanted) == 0:
            raise InputError("indices must be a list of whole numbers")
        if wanted.min() < 0 or wanted.max() >= total:
            wrong = wanted.min() if wanted.min() < 0 else wanted.max()
            raise InputError(f"there is no frame {wrong}: the data have {total}, counted from 0")
        return wanted
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"the fraction is {fraction:g}, expected more than 0, at most 1")
        number = max(1, round(fraction * total))
    assert number is not None
    if not 1 <= number <= total:
        raise InputError(f"{number} frames are wanted, the data have {total}")
    return np.random.default_rng(seed).choice(total, number, replace=False)
