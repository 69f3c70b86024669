"""Gated products of functions on the sphere on CUDA: launches of ``kernels/gated_product.cu``.

Any number of channels; the way to the grid and back is that of the CPU, over circles of latitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from mlip.ops.cuda.gated_product_table import BLOCK, table_text
from mlip.ops.cuda.program import Program
from mlip.ops.gated_product import Tables
from mlip.ops.sphere_tables import block_sizes


@lru_cache(maxsize=64)
def product_program(lmax: int, mmax: int, in_frame: bool, tables: Tables) -> Program:
    """The kernels for one grid; compiled when one is first launched."""
    text = table_text(tables(), lmax, mmax, in_frame)
    return Program("gated_product.cu", {"gated_product_table.h": text})


class GridKernels:
    """Kernels of ``mlip.ops.gated_product`` for one grid."""

    def __init__(
        self,
        lmax: int,
        mmax: int,
        in_frame: bool,
        tables: Tables,
        gate: Tensor,  # noqa: ARG002
    ) -> None:
        self.program = product_program(lmax, mmax, in_frame, tables)
        self.sizes = block_sizes(lmax, mmax, in_frame)

    def product(self, extra: int, gate: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Compute the products [N, rows, h]."""
        out = [gate.new_empty(len(gate), n, gate.shape[1]) for n in self.sizes]
        self._launch("gated_product", extra, gate, [*hidden, gate, *out])
        return out

    def slopes(
        self, extra: int, gate: Tensor, hidden: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Compute the gradients by gate and hidden tensors."""
        of_gate, *of_hidden = (tensor.new_empty(tensor.shape) for tensor in (gate, *hidden))
        of_hidden[0][:, :extra] = 0
        tensors = [*hidden, gate, *gradients, *of_hidden, of_gate]
        self._launch("gated_slopes", extra, gate, tensors)
        return [of_gate, *of_hidden]

    def _launch(self, kernel: str, extra: int, gate: Tensor, tensors: list[Tensor]) -> None:
        n_rows, width = gate.shape
        arrays = [tensor.contiguous() for tensor in tensors]
        grid = (-(-n_rows * width // BLOCK),)
        sizes = (n_rows, width, extra)
        self.program.launch(kernel, gate.dtype, grid, BLOCK, 0, (*arrays, *sizes))
