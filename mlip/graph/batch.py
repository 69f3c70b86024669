"""Batches of graphs, and what every consumer of a graph or batch needs: edge vectors, indices.

The container is torch_geometric's; nothing here knows models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from mlip import ops
from mlip.errors import InputError
from mlip.graph.graph import AtomicGraph, BareGraph


def batch_graphs(graphs: Sequence[AtomicGraph]) -> Batch:
    """Join graphs into one.

    Args:
        graphs: one or more single graphs with the same fields and cutoff.

    Returns:
        A torch_geometric Batch: fields concatenated, edges renumbered, with `batch` [N] (graph of
        each atom) and `ptr` [B + 1] (first atom of each graph). ``to_data_list`` takes it apart.

    Raises:
        InputError: no graphs, or fields or cutoffs that differ.
    """
    graphs = list(graphs)
    if not graphs:
        raise InputError("a batch needs at least one graph, got none")
    _check_alike(graphs)
    return Batch.from_data_list(graphs)


def edge_vectors(graph: Data) -> Tensor:
    """Compute ``r_source + shift @ cell - r_target``, differentiable in positions and cell.

    The vector of the reversed edge is its negative to the last bit.

    Args:
        graph: an AtomicGraph or a batch of them.

    Returns:
        [E, 3] Å, float64.
    """
    return ops.edge_vectors(
        graph.positions, graph.cell, graph.edge_index, graph.edge_shift, batch_index(graph)
    )


def number_of_graphs(graph: Data | BareGraph) -> int:
    """Count the structures B in a graph (1) or batch."""
    return int(graph.cell.shape[0])


def batch_index(graph: Data | BareGraph) -> Tensor:
    """Give the structure [N] that each atom belongs to: zeros for a single graph."""
    if number_of_graphs(graph) == 1:
        return torch.zeros_like(graph.atomic_numbers)
    batch: Tensor = graph.batch
    return batch


def _check_alike(graphs: Sequence[AtomicGraph]) -> None:
    """Refuse graphs that cannot be one batch."""
    expected = set(graphs[0].keys())
    for place, graph in enumerate(graphs):
        if "ptr" in graph:
            raise InputError(f"graph {place} of the batch is itself a batch: give single graphs")
        if differ := expected.symmetric_difference(graph.keys()):
            raise InputError(
                f"graph {place} of the batch and graph 0 differ in fields: {sorted(differ)}"
            )
    cutoffs = {float(graph.cutoff) for graph in graphs}
    if len(cutoffs) > 1:
        raise InputError(f"graphs of one batch have different cutoffs: {sorted(cutoffs)} Å")
