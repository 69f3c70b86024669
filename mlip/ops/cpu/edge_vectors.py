"""Vectors of edges in one loop, without derivatives."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array

SERIAL_EDGES = 1 << 14  # below, threads do not pay


def vectors(
    positions: Tensor, cell: Tensor, edge_index: Tensor, edge_shift: Tensor, batch: Tensor
) -> Tensor:
    """Evaluate ``mlip.ops.edge_vectors``; arguments as there, float64 and int64.

    Raises:
        InputError: shapes that do not fit, or an edge of an atom or a structure that does not
            exist.
    """
    n_nodes, n_edges = len(positions), len(edge_shift)
    shapes = (positions.shape, cell.shape, edge_index.shape, edge_shift.shape, batch.shape)
    if shapes != ((n_nodes, 3), (len(cell), 3, 3), (2, n_edges), (n_edges, 3), (n_nodes,)):
        raise InputError(
            f"vectors of {n_edges} edges of {n_nodes} atoms: shapes {[list(s) for s in shapes]} do "
            "not fit; expected those of mlip.ops.edge_vectors"
        )
    found = torch.empty((n_edges, 3), dtype=torch.float64)
    given = (as_array(t) for t in (positions, cell, edge_index, edge_shift, batch))
    loop = partial(cache.loops().edge_vectors, *given, found.numpy())
    try:
        threads.run_range(loop, n_edges, serial=n_edges < SERIAL_EDGES)
    except IndexError as error:
        raise InputError(
            f"vectors of edges of {n_nodes} atoms in {len(cell)} structures: edge_index or batch "
            "points to one that does not exist"
        ) from error
    return found
