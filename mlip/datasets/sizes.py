"""Count atoms and edges of every structure once, and remember the counts beside the data."""

from __future__ import annotations

import numpy as np

from mlip.datasets.dataset import Dataset
from mlip.datasets.structure import Array
from mlip.graph import neighbor_list


def count_atoms(dataset: Dataset) -> Array:
    """Give the number of atoms of every structure, [len] uint32."""
    return np.asarray(dataset.n_atoms()).astype(np.uint32)


def count_edges(dataset: Dataset, cutoff: float) -> Array:
    """Give the number of directed edges within ``cutoff`` (Å) of every structure, [len] uint32."""
    counts = np.empty(len(dataset), dtype=np.uint32)
    for i in range(len(dataset)):
        s = dataset[i]
        counts[i] = neighbor_list(s.positions, s.cell, s.pbc, cutoff)[0].shape[1]
    return counts
