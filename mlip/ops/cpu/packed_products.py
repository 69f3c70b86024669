"""Products of functions on the sphere whose coefficients lie degree after degree.

For code that writes its own backward pass: nothing here is seen by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from mlip.ops.cpu import threads
from mlip.ops.cpu.library import as_array
from mlip.ops.cpu.runner import SERIAL
from mlip.ops.cpu.sphere_products import loops


@dataclass(frozen=True)
class PackedProducts:
    """Running products of ``order`` factors, as ``mlip.ops.sphere_products`` defines them.

    Packed coefficients: flat, for each degree [N, 2l + 1, factors · channels].

    to_grid: [G, K]. from_grid: [K_out, G]. channels: of one factor, a multiple of a vector.
    """

    to_grid: Tensor
    from_grid: Tensor
    order: int
    channels: int

    def products(self, u: Tensor, n_atoms: int) -> Tensor:
        """Multiply packed factors; packed products."""
        width = (self.order - 1) * self.channels
        out = u.new_empty(n_atoms * len(self.from_grid) * width)
        self._run("products", n_atoms, u, out)
        return out

    def slopes(self, u: Tensor, gradient: Tensor, n_atoms: int) -> Tensor:
        """Give the gradient by the factors of Σ gradient·products."""
        out = torch.empty_like(u)
        self._run("slopes", n_atoms, u, gradient, out)
        return out

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Entries of both matrices, point after point."""
        return as_array(self.to_grid).ravel(), as_array(self.from_grid.T).ravel()

    def _run(self, loop: str, n_atoms: int, *tensors: Tensor) -> None:
        points, rows = self.to_grid.shape
        dtype = str(self.to_grid.dtype).removeprefix("torch.")
        module = loops(rows, len(self.from_grid), self.order, dtype, packed=True)
        arrays = [tensor.numpy() for tensor in tensors]
        call = partial(getattr(module, loop), *arrays, *self._tables, self.channels, points)
        work = n_atoms * self.channels * points
        threads.run_range(call, n_atoms, serial=work < SERIAL)
