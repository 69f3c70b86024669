"""Products of functions on the sphere whose coefficients lie degree after degree.

For code that writes its own backward pass: nothing here is seen by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mlip.ops.cpu import threads
from mlip.ops.cpu.cache import load
from mlip.ops.cpu.packed_products_text import source_text
from mlip.ops.cpu.runner import BLOCK, SERIAL
from mlip.so3 import minimal_grid, spherical_harmonics


@dataclass(frozen=True)
class PackedProducts:
    """Running products of ``order`` factors, projected to degrees up to ``lmax_out``.

    Those of ``mlip.ops.sphere_products`` on a grid that is exact for them. Packed coefficients:
    flat, for each degree [N, 2l + 1, factors · channels].

    lmax: of the factors. scale: of every factor. channels: of one.
    """

    lmax: int
    lmax_out: int
    order: int
    scale: float
    channels: int

    def products(self, u: Tensor, n_atoms: int) -> Tensor:
        """Multiply packed factors; packed products."""
        out = u.new_empty(n_atoms * (self.lmax_out + 1) ** 2 * (self.order - 1) * self.channels)
        self._run("products", n_atoms, u, out)
        return out

    def slopes(self, u: Tensor, gradient: Tensor, n_atoms: int) -> Tensor:
        """Give the gradient by the factors of Σ gradient·products."""
        out = torch.empty_like(u)
        self._run("slopes", n_atoms, u, gradient, out)
        return out

    def _run(self, loop: str, n_atoms: int, *tensors: Tensor) -> None:
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        partial_vector = self.channels % BLOCK[dtype] > 0
        module = loops(self.lmax, self.lmax_out, self.order, dtype, partial_vector)
        arrays = [tensor.numpy() for tensor in tensors]
        circles, *matrices = tables(self.lmax, self.lmax_out, self.order, self.scale, dtype)
        call = partial(getattr(module, loop), *arrays, *matrices, self.channels, circles)
        work = n_atoms * self.channels * circles * (2 * self.lmax + 1) ** 2
        threads.run_range(call, n_atoms, serial=work < SERIAL)


@cache
def tables(
    lmax: int, lmax_out: int, order: int, scale: float, dtype: str
) -> tuple[int, np.ndarray, np.ndarray]:
    """Count the circles, and give values of the harmonics of orders m ≥ 0 where sin mφ is 0.

    Both tables are [circles · entries]; the first is that of the factors with their scale, the
    second has the weights of the circles.
    """
    most = max(lmax, lmax_out)
    grid = minimal_grid(order * lmax + lmax_out, 0)
    columns = [degree**2 + degree + m for degree in range(most + 1) for m in range(degree + 1)]
    values = spherical_harmonics(most, grid.points[:, 0])[:, columns]
    weights = grid.weights.sum(1, keepdim=True)
    found = (
        np.ascontiguousarray(each.numpy(), dtype).ravel()
        for each in (scale * values, weights * values)
    )
    return (len(values), *found)  # type: ignore[return-value]


@cache
def loops(lmax: int, lmax_out: int, order: int, dtype: str, partial_vector: bool) -> ModuleType:
    """Compiled loops, from the cache on disk if they are there."""
    text = source_text(lmax, lmax_out, order, dtype, partial_vector)
    return load(f"packed_products_{lmax}_{lmax_out}_{order}_{dtype}", text)
