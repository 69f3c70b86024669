"""The manifest of a folder of shards: what each file holds and its checksum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mlip
from mlip.datasets.structure import Array
from mlip.files import atomic_write, file_sha256

MANIFEST = "manifest.json"
FORMAT = "mlip-shards"


def write_manifest(
    path: Path, shards: Sequence[Path], counts: Sequence[int], n_atoms: Array,
    metadata: dict[str, Any],
) -> None:  # fmt: skip
    """Describe shards: structures, atoms, bytes and sha256 of each, and their sums.

    Args:
        path: manifest to write.
        shards: complete files, in order.
        counts: structures in each.
        n_atoms: [sum of counts] atoms of every structure.
        metadata: facts about the data.

    Raises:
        MlipError: it cannot be written.
    """
    parts = np.split(n_atoms, np.cumsum(counts)[:-1])
    rows: list[dict[str, Any]] = [
        {
            "name": shard.name,
            "structures": int(count),
            "atoms": int(atoms.sum()),
            "bytes": shard.stat().st_size,
            "sha256": file_sha256(shard),
        }
        for shard, count, atoms in zip(shards, counts, parts, strict=True)
    ]
    content = {
        "format": FORMAT,
        "version": 1,
        "written_by": f"mlip {mlip.__version__}",
        **{key: sum(row[key] for row in rows) for key in ("structures", "atoms", "bytes")},
        **metadata,
        "shards": rows,
    }
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


def write_sizes(path: Path, n_atoms: Array) -> None:
    """Write the table of sizes that readers of ``.aselmdb`` folders look for.

    Args:
        path: usually ``metadata.npz``.
        n_atoms: atoms of every structure in the order of the data set.
    """
    with atomic_write(path) as file:
        np.savez(file, natoms=n_atoms.astype(np.int64))
