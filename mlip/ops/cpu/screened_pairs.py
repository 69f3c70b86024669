"""Repulsion of screened nuclei: one loop over the edges, one more for its only derivative."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array
from mlip.ops.segment import segment_sum

SERIAL_EDGES = 1 << 14  # below, threads do not pay
Reals = NDArray[np.float64]


class Law(NamedTuple):
    """E = q_i q_j/r · Σ_k c_k exp(−d_k (s_i + s_j) r) · u(r/R), u the polynomial envelope.

    atoms: [Z, 3] q, s (1/Å) and reach (Å) of each atomic number; R = min(reach_i +
        reach_j, cutoff).
    screening: [K, 2] c and d. cutoff: Å. order: of the envelope.
    """

    atoms: Reals
    screening: Reals
    cutoff: float
    order: int


class ScreenedPairs(torch.autograd.Function):
    """Sum over the edges of each atom: ``apply(law, numbers, edge_index, edge_vector)`` gives [N].

    Raises:
        InputError: an edge of atoms, or an atom of an element, that does not exist.
    """

    @staticmethod
    def forward(ctx: Any, law: Law, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        energy, slope = vectors.new_empty(len(vectors)), vectors.new_empty(len(vectors))
        try:
            _run("screened_pairs", vectors, index, numbers, tuple(law), energy, slope)
        except IndexError as error:
            raise InputError(
                f"pairs of {len(numbers)} atoms: an edge points to an atom that does not exist, or "
                f"an atomic number is not one of 0 to {len(law.atoms) - 1}"
            ) from error
        ctx.save_for_backward(vectors, index, slope)
        return segment_sum(energy, index[1], len(numbers))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        vectors, index, slope = ctx.saved_tensors
        out = vectors.new_empty(vectors.shape)
        _run("along_vectors", vectors, index, gradient, slope, out)
        return None, None, None, out


def _run(name: str, vectors: Tensor, *rest: Any) -> None:
    given = [as_array(each) if isinstance(each, Tensor) else each for each in (vectors, *rest)]
    loop = partial(getattr(cache.loops(), name), *given)
    threads.run_range(loop, len(vectors), serial=len(vectors) < SERIAL_EDGES)
