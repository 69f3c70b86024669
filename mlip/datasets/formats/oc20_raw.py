"""Read raw OC20 text: extended XYZ with system, frame and reference energy in a text beside it.

S2EF shards ``N.extxyz.xz`` come with ``N.txt.xz``, whose line i belongs to frame i:
``random<sid>,frame<fid>,<reference energy in eV>``. Trajectories ``random<sid>.extxyz.xz`` share
one ``system.txt`` with ``random<sid>,<reference energy>``. Energies in the frames are total ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mlip.datasets.dataset import DatasetFacts
from mlip.datasets.formats.extxyz import (
    COMPRESSED,
    STREAM_ERRORS,
    count_frames,
    is_extxyz,
    open_text,
    read_extxyz,
    stem,
)
from mlip.datasets.formats.reader import Frames
from mlip.datasets.labels import Extracted, extract
from mlip.datasets.options import ReadOptions
from mlip.errors import DataError

FORMAT = "raw OC20 text (.extxyz with .txt, also .xz)"
_NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
_FRAME_LINE = re.compile(rf"([^,\s]+),frame(-?\d+),({_NUMBER})")
_SYSTEM_LINE = re.compile(rf"([^,\s]+),({_NUMBER})")
_RANDOM = re.compile(r"random(\d+)")


class Reference(NamedTuple):
    """What the text file says of a frame."""

    sid: int | str
    fid: int
    energy: float


def sidecar(path: Path) -> Path | None:
    """Give the text file that belongs to the frames of a file, None for plain extended XYZ.

    A ``.txt`` of the same name counts if the name is a number, as in published shards, or if it
    begins like one; ``system.txt`` counts for files named ``random<sid>``.
    """
    name = stem(path)
    own = path.suffix if path.suffix in COMPRESSED else ""
    for ending in dict.fromkeys((own, "", *sorted(COMPRESSED))):
        beside = path.with_name(f"{name}.txt{ending}")
        if beside.is_file():
            return beside if name.isdecimal() or _begins_like_one(beside) else None
        systems = path.with_name(f"system.txt{ending}")
        if _RANDOM.fullmatch(name) and systems.is_file():
            return systems
    return None


def is_oc20_raw(path: Path) -> bool:
    """Recognise extended XYZ with its text file."""
    return is_extxyz(path) and sidecar(path) is not None


def facts(options: ReadOptions) -> DatasetFacts:
    """Tell which energies are given: total ones unless adsorption energies were asked for."""
    return DatasetFacts(FORMAT, options.energy_convention or "total")


def read_oc20_raw(path: Path, start: int, options: ReadOptions) -> Frames:
    """Give the frames from ``start`` on with sid, fid and reference energy in their info.

    The energy is the total one, or with ``options.energy_convention == "adsorption"`` the total
    one minus the reference.

    Raises:
        DataError: the text file does not have one well-formed line for each frame.
    """
    references = _references(path)
    for i, frame in read_extxyz(path, start, options):
        if isinstance(frame, DataError):
            yield i, frame
            continue
        reference = references(i)
        try:
            yield (
                i,
                _completed(extract(frame, options.keys, f"{path} frame {i}"), reference, options),
            )
        except DataError as error:
            yield i, error


def _completed(found: Extracted, reference: Reference, options: ReadOptions) -> Extracted:
    structure = found.structure
    energy = structure.energy
    if energy is not None and options.energy_convention == "adsorption":
        energy -= reference.energy
    info = {
        **structure.info,
        "sid": reference.sid,
        "fid": reference.fid,
        "reference_energy": reference.energy,
    }
    return found._replace(structure=replace(structure, energy=energy, info=info))


def _references(path: Path) -> Callable[[int], Reference]:
    """Give what the text file says of each frame, after making sure that they belong together."""
    beside = sidecar(path)
    assert beside is not None
    if beside.name.startswith("system.txt"):
        name = stem(path)
        energies = _systems(beside, beside.stat().st_mtime_ns)
        if name not in energies:
            raise DataError(f"{beside}: there is no line for {name}: fetch it again")
        return lambda i: Reference(_sid(name), i, energies[name])
    lines = [_frame_reference(beside, number, line) for number, line in _lines(beside)]
    frames = count_frames(path)
    if len(lines) != frames.whole and not (frames.cut and len(lines) > frames.whole):
        raise DataError(
            f"{beside}: {len(lines)} lines for the {frames.whole} frames of {path.name}, so it is "
            "unknown which belongs to which: fetch both files again"
        )
    return lines.__getitem__


def _frame_reference(path: Path, number: int, line: str) -> Reference:
    match = _FRAME_LINE.fullmatch(line)
    if match is None:
        raise DataError(
            f"{path}: line {number} is {line[:60]!r}, "
            "expected random<sid>,frame<fid>,<energy in eV>"
        )
    return Reference(_sid(match[1]), int(match[2]), float(match[3]))


@lru_cache(maxsize=4)
def _systems(path: Path, changed: int) -> dict[str, float]:  # noqa: ARG001  reads a new file anew
    energies: dict[str, float] = {}
    for number, line in _lines(path):
        match = _SYSTEM_LINE.fullmatch(line)
        if match is None or match[1] in energies:
            what = "expected <system id>,<energy in eV>" if match is None else "given before"
            raise DataError(f"{path}: line {number} is {line[:60]!r}, {what}")
        energies[match[1]] = float(match[2])
    return energies


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.strip()
    except STREAM_ERRORS as error:
        raise DataError(
            f"{path}: the file is damaged after line {number} ({error}): fetch it again"
        ) from None


def _begins_like_one(path: Path) -> bool:
    try:
        with open_text(path) as file:
            return file.readline(200).startswith("random")
    except STREAM_ERRORS:
        return False


def _sid(name: str) -> int | str:
    match = _RANDOM.fullmatch(name)
    return int(match[1]) if match else name
