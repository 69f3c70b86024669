"""The native store as a file format."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mlip.datasets.lmdb_reader import LmdbReader
from mlip.datasets.options import ReadOptions
from mlip.datasets.store import METADATA_KEY, StructureStore
from mlip.errors import DataError


def is_lmdb(path: Path) -> bool:
    """Recognise any LMDB file, by name or by content."""
    with path.open("rb") as file:
        return path.suffix == ".lmdb" or file.read(20)[16:] == b"\xde\xc0\xef\xbe"


def open_store(path: Path, options: ReadOptions) -> StructureStore:  # noqa: ARG001
    """Open a native store.

    Raises:
        DataError: damaged, or an LMDB file of some other kind; says what is in it.
    """
    reader = LmdbReader(path)
    try:
        if reader.get(METADATA_KEY) is None and reader.entries:
            keys = ", ".join(f"{key!r:.40}" for key in islice(reader.keys(), 5))
            raise DataError(
                f"an LMDB file of no known layout: {reader.entries} entries, the first keys are "
                f"{keys}; known are mlip stores (key {METADATA_KEY!r}), OC20 (pickles under the "
                "keys 0, 1, ...) and ASE databases (compressed JSON)"
            )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return StructureStore(path)
