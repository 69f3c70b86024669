"""Small OC20 LMDB files for tests."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lmdb
import torch
from torch_geometric.data import Data

from mlip.datasets.formats.oc20 import Oc20Dataset, open_oc20
from mlip.datasets.options import ReadOptions

N = 5


def entry(**changes: Any) -> Data:
    """Make an S2EF entry; a change to None takes the field away."""
    fields: dict[str, Any] = {
        "pos": torch.arange(3.0 * N).reshape(N, 3) / 7,
        "cell": torch.tensor([[[9.0, 0, 0], [1, 8, 0], [0, 0, 20]]]),
        "atomic_numbers": torch.tensor([29.0, 29, 13, 8, 1]),
        "natoms": N,
        "tags": torch.tensor([0, 0, 1, 2, 2]),
        "fixed": torch.tensor([1.0, 1, 0, 0, 0]),
        "y": -1.5,
        "force": torch.ones(N, 3) / 3,
        "sid": torch.tensor([77]),
        "fid": 3,
    }
    fields |= changes
    return Data(**{k: v for k, v in fields.items() if v is not None})


def relaxation(**changes: Any) -> Data:
    """Make an IS2RE entry."""
    fields = {
        "y": None, "y_init": 2.0, "y_relaxed": -0.5, "pos_relaxed": torch.full((N, 3), 0.25),
        "fid": None,
    } | changes  # fmt: skip
    return entry(**fields)


def write(path: Path, entries: dict[Any, Any], length: Any = None) -> Path:
    environment = lmdb.open(str(path), subdir=False, map_size=2**28, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            name = key if isinstance(key, bytes) else b"%d" % key
            transaction.put(name, value if isinstance(value, bytes) else pickle.dumps(value, 4))
        if length is not None:
            transaction.put(b"length", pickle.dumps(length, 4))
    return path


def opened(path: Path, *entries: Any, **options: Any) -> Oc20Dataset:
    write(path, dict(enumerate(entries)), len(entries))
    return open_oc20(path, ReadOptions(**options))
