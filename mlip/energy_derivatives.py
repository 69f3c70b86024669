"""What a potential needs to differentiate energies: edge vectors, their gradient, the stress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlip.graph import AtomicGraph, BareGraph
from mlip.ops import edge_vectors

AnyGraph = AtomicGraph | BareGraph


class GraphView:
    """A graph as a model reads it: with edge vectors in the precision of the model.

    ``inference`` tells the model that nobody will ask for derivatives by weights, nor for second
    derivatives: it may then keep and compute less.
    """

    def __init__(self, graph: AnyGraph, edge_vector: Tensor, inference: bool) -> None:
        self.graph, self.edge_vector, self.inference = graph, edge_vector, inference

    def __getattr__(self, name: str) -> Any:
        return getattr(self.graph, name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return getattr(self, name, None) is not None


class EnergyPart(NamedTuple):
    """A part of the node energies. values: [N], any dtype. unit: [N], eV, float64, constant."""

    values: Tensor
    unit: Tensor

    def detach(self) -> EnergyPart:
        return EnergyPart(self.values.detach(), self.unit)


def vectors_of(graph: AnyGraph, batch: Tensor) -> Tensor:
    """Give the edge vectors, [E, 3] Å: those that the graph holds, unless differentiated."""
    positions, cell = graph.positions, graph.cell
    differentiated = positions.requires_grad or cell.requires_grad
    if isinstance(graph, BareGraph) and graph.edge_vector is not None and not differentiated:
        return graph.edge_vector.detach()
    return edge_vectors(positions, cell, graph.edge_index, graph.edge_shift, batch)


def gradient_by_edges(parts: Sequence[EnergyPart], vectors: Tensor, create_graph: bool) -> Tensor:
    """Differentiate the sum of all energies by edge vectors, [E, 3] eV/Å."""
    parts = [part for part in parts if part.values.requires_grad]
    (gradient,) = torch.autograd.grad(
        [part.values for part in parts],
        vectors,
        [part.unit.to(part.values.dtype) for part in parts],
        create_graph=create_graph,
        allow_unused=True,
    )
    return torch.zeros_like(vectors) if gradient is None else gradient


def stress_of(virial: Tensor, graph: AnyGraph) -> Tensor:
    """Divide ∂E/∂ε (eV) by volumes, [B, 3, 3] eV/Å³; NaN where there is none."""
    if virial.is_cpu and not (virial.requires_grad or graph.cell.requires_grad):
        # a few numbers, for which operations of torch take far longer than NumPy
        volumes = np.abs(np.linalg.det(graph.cell.numpy()))
        volumes[(volumes == 0) | ~graph.pbc.numpy().all(1)] = np.nan
        return torch.from_numpy(virial.numpy() / volumes[:, None, None])
    periodic = graph.pbc.all(1)
    a, b, c = graph.cell.unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum(1).abs()
    valid = periodic & (volume > 0)
    safe = torch.where(valid, volume, torch.ones_like(volume))[:, None, None]
    return torch.where(valid[:, None, None], virial / safe, torch.nan)
