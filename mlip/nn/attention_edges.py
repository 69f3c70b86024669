"""What attention layers share of the edges, and their cutting into groups of neighbouring atoms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip.nn.edge_frames import EdgeFrames

EDGES_PER_GROUP = 256  # and thread: what a group touches stays in the cache of a core
EDGES_PER_GROUP_CUDA = 32_768


class Group(NamedTuple):
    """A range of atoms and the range of edges that end at them."""

    first_edge: int
    end_edge: int
    first_atom: int
    end_atom: int

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.end_atom - self.first_atom

    @property
    def edges(self) -> slice:
        """Rows of the edges."""
        return slice(self.first_edge, self.end_edge)

    @property
    def atoms(self) -> slice:
        """Rows of the atoms."""
        return slice(self.first_atom, self.end_atom)


class AttentionEdges(NamedTuple):
    """What all layers know of the edges, sorted by target.

    source, target: [E] atoms. source_element, target_element: [E] rows of element tables.
    frames: rotations. basis: [E, R] radial functions. envelope: [E], 0 at the cutoff.
    groups: if layers shall go through the edges group by group and recompute in the backward pass
        what they do not keep. Weights are then constants and second derivatives are not defined.
    """

    source: Tensor
    target: Tensor
    source_element: Tensor
    target_element: Tensor
    frames: EdgeFrames
    basis: Tensor
    envelope: Tensor
    groups: tuple[Group, ...] | None = None

    def part(self, group: Group) -> AttentionEdges:
        """Take the edges of a group; targets count from its first atom, sources do not."""
        rows = group.edges
        return AttentionEdges(
            self.source[rows],
            self.target[rows] - group.first_atom,
            self.source_element[rows],
            self.target_element[rows],
            self.frames._replace(matrix=self.frames.matrix[rows]),
            self.basis[rows],
            self.envelope[rows],
        )

    def ends(self, group: Group) -> Tensor:
        """Take sources and targets of the edges of a group, [2, edges], counted from no group."""
        return torch.stack([self.source[group.edges], self.target[group.edges]])


def group_edges(target: Tensor, n_atoms: int, per_thread: int | None = None) -> tuple[Group, ...]:
    """Cut atoms into ranges with about equally many edges.

    Args:
        target: [E], sorted.
        n_atoms: N.
        per_thread: edges of a group for each thread of the CPU; default EDGES_PER_GROUP.
    """
    on_cpu = target.device.type == "cpu"
    per_thread = per_thread or EDGES_PER_GROUP
    limit = per_thread * torch.get_num_threads() if on_cpu else EDGES_PER_GROUP_CUDA
    ends = torch.bincount(target, minlength=n_atoms).cumsum(0).tolist()
    groups, first_atom, first_edge = [], 0, 0
    for atom, end in enumerate(ends):
        following = ends[atom + 1] if atom + 1 < n_atoms else None
        if following is None or following - first_edge > limit:
            groups.append(Group(first_edge, end, first_atom, atom + 1))
            first_atom, first_edge = atom + 1, end
    return tuple(groups)
