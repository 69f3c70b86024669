"""Tell which files of a folder are the data, by their names alone."""

from __future__ import annotations

from pathlib import Path

from mlip.datasets.formats.extxyz import COMPRESSED, is_extxyz
from mlip.datasets.formats.oc20_raw import sidecar
from mlip.errors import DataError

_LMDB = (".aselmdb", ".lmdb", ".mdb")
_VASP = ("vasprun.xml", "OUTCAR")
_SHOWN = 8


def folder_files(folder: Path) -> list[Path]:
    """Give the data files of a folder, sorted by name.

    LMDB shards come first (whatever else lies beside them is ignored), then extended XYZ (raw OC20
    text where each has its ``.txt``; of a file and its compressed copy the plain one), then ASE
    trajectories, databases and JSON, then the output of a VASP run.

    Raises:
        DataError: no data, two kinds of data, or text frames of which some lack their ``.txt``.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    lmdb = {end: [p for p in files if p.suffix == end] for end in _LMDB}
    found = {end: group for end, group in lmdb.items() if group}
    if not found:
        text = _plain_first([p for p in files if is_extxyz(p)])
        others = {end: [p for p in files if p.suffix == end] for end in (".traj", ".db")}
        groups = {".extxyz": text, **others}
        found = {end: group for end, group in groups.items() if group}
    documents = [p for p in files if p.suffix == ".json"]
    if not found and documents:
        found = {".json": documents}
    if len(found) > 1:
        first = " and ".join(group[0].name for group in found.values())
        raise DataError(
            f"{folder} holds several kinds of data ({first}): name the files, for instance "
            f"'{folder}/*{next(iter(found))}'"
        )
    chosen = next(iter(found.values())) if found else _vasp_output(files)
    if not chosen:
        raise DataError(f"{folder}: there are no data files in this folder; {_contents(folder)}")
    _check_sidecars(chosen)
    return chosen


def _plain_first(files: list[Path]) -> list[Path]:
    """Leave out a compressed file whose plain copy lies beside it."""
    names = {p.name for p in files}
    return [p for p in files if p.suffix not in COMPRESSED or p.stem not in names]


def _check_sidecars(files: list[Path]) -> None:
    paired = [p for p in files if is_extxyz(p) and sidecar(p) is not None]
    alone = [p for p in files if p not in set(paired)]
    if paired and alone:
        raise DataError(
            f"{alone[0]} has no .txt with its reference energies, {paired[0].name} has: fetch it, "
            "or name the files"
        )


def _vasp_output(files: list[Path]) -> list[Path]:
    for name in _VASP:
        for path in files:
            if path.name == name or (path.stem == name and path.suffix in COMPRESSED):
                return [path]
    return []


def _contents(folder: Path) -> str:
    """Say what is there instead, and how to name data one level below."""
    for end in _LMDB:
        if next(folder.glob(f"*/*{end}"), None) is not None:
            return f"its subfolders have some: name them as '{folder}/*/*{end}'"
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    more = ", ..." if len(names) > _SHOWN else ""
    return f"it holds {', '.join(names[:_SHOWN])}{more}" if names else "it is empty"
