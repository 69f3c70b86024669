"""Count the edges of every entry of a store once and remember the counts beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from mlip.datasets.structure import Array
from mlip.errors import MlipError
from mlip.files import atomic_write

if TYPE_CHECKING:
    from mlip.datasets.store import StructureStore


def count_edges(store: StructureStore, cutoff: float) -> Array:
    """Give the number of directed edges within ``cutoff`` (Å) of every entry, [len] int64.

    The counts are kept in ``<store>.edges-<cutoff>.npz`` and used again as long as the store holds
    the same entries; a folder that cannot be written costs only the time of counting again.
    """
    from mlip.graph import neighbor_list

    path = store.path.with_name(f"{store.path.name}.edges-{cutoff:.17g}.npz")
    kept = _load(path, store.fingerprint(), len(store))
    if kept is not None:
        return kept
    counts = np.empty(len(store), dtype=np.int64)
    for i, s in enumerate(store):
        counts[i] = neighbor_list(s.positions, s.cell, s.pbc, cutoff)[0].shape[1]
    with contextlib.suppress(MlipError), atomic_write(path) as file:
        np.savez(file, edges=counts, fingerprint=np.array(store.fingerprint()))
    return counts


def _load(path: Path, fingerprint: str, length: int) -> Array | None:
    try:
        with np.load(path, allow_pickle=False) as content:
            counts, of_store = content["edges"], str(content["fingerprint"])
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        return None
    fits = of_store == fingerprint and counts.shape == (length,) and counts.dtype == np.int64
    return counts if fits else None
