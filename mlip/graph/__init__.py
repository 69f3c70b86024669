"""Structures as graphs: neighbour lists, one graph, batches of graphs.

Names are loaded on first use, so that neighbour lists alone do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip.graph.batch import batch_graphs, batch_index, edge_vectors, number_of_graphs
    from mlip.graph.graph import AtomicGraph, BareGraph, as_atoms, atoms_to_graph, make_graph
    from mlip.graph.neighbors import neighbor_list, pair_distances

_PUBLIC = {
    "AtomicGraph": "mlip.graph.graph",
    "BareGraph": "mlip.graph.graph",
    "as_atoms": "mlip.graph.graph",
    "atoms_to_graph": "mlip.graph.graph",
    "batch_graphs": "mlip.graph.batch",
    "batch_index": "mlip.graph.batch",
    "edge_vectors": "mlip.graph.batch",
    "make_graph": "mlip.graph.graph",
    "neighbor_list": "mlip.graph.neighbors",
    "number_of_graphs": "mlip.graph.batch",
    "pair_distances": "mlip.graph.neighbors",
}

__all__ = [
    "AtomicGraph",
    "BareGraph",
    "as_atoms",
    "atoms_to_graph",
    "batch_graphs",
    "batch_index",
    "edge_vectors",
    "make_graph",
    "neighbor_list",
    "number_of_graphs",
    "pair_distances",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlip.graph' has no attribute {name!r}")
