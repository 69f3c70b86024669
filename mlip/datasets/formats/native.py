"""The native store as a file format."""

from __future__ import annotations

from pathlib import Path

from mlip.datasets.lmdb_file import check_lmdb_file
from mlip.datasets.options import ReadOptions
from mlip.datasets.store import StructureStore


def is_lmdb(path: Path) -> bool:
    """Recognise any LMDB file, by name or by content."""
    with path.open("rb") as file:
        return path.suffix == ".lmdb" or file.read(20)[16:] == b"\xde\xc0\xef\xbe"


def open_store(path: Path, options: ReadOptions) -> StructureStore:  # noqa: ARG001
    """Open a native store."""
    check_lmdb_file(path)
    return StructureStore(path)
