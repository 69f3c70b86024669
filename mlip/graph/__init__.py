"""Structures as graphs: neighbour lists, one graph, batches of graphs."""

from mlip.graph.batch import batch_graphs, batch_index, edge_vectors, number_of_graphs
from mlip.graph.graph import AtomicGraph, as_atoms, atoms_to_graph, make_graph
from mlip.graph.neighbors import neighbor_list

__all__ = [
    "AtomicGraph",
    "as_atoms",
    "atoms_to_graph",
    "batch_graphs",
    "batch_index",
    "edge_vectors",
    "make_graph",
    "neighbor_list",
    "number_of_graphs",
]
