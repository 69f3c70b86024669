"""Rotation into the frames of edges on CUDA: launches of ``kernels/rotation.cu``.

Kernels of the operators ``mlip::rotate_gather``, ``mlip::rotate_scatter`` and
``mlip::rotate_slopes``, which are declared and differentiated in ``mlip.ops.cpu.rotation``. Any
number of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from mlip.ops.cpu.rotation import check, gather_op, scatter_op, slopes_op
from mlip.ops.cuda.program import Grid, Program, tile_size, whole_warps
from mlip.ops.cuda.rotation_table import BLOCK, chunks, n_entries, table_text
from mlip.ops.cuda.slots import slots
from mlip.ops.rotation import RotationSignature


@lru_cache(maxsize=64)
def rotation_program(signature: RotationSignature) -> Program:
    """The kernels of a signature; compiled when one is first launched."""
    return Program("rotation.cu", {"rotation_table.h": table_text(signature)})


class _Call:
    """Arguments that the launches share, checked and contiguous."""

    def __init__(
        self,
        signature: RotationSignature,
        x: Tensor,
        orders: Sequence[Tensor],
        matrix: Tensor,
        scale: Tensor,
        ends: Tensor,
    ) -> None:
        check(signature, x, orders, matrix, scale, ends, on_cpu=False)
        self.program, self.signature = rotation_program(signature), signature
        self.x, self.matrix, self.scale = x.contiguous(), matrix.contiguous(), scale.contiguous()
        self.orders, self.ends = [part.contiguous() for part in orders], ends.contiguous()
        self.n_edges, (self.n_ends, self.wide) = len(matrix), (len(ends), scale.shape[2])
        self.channels = self.wide // self.n_ends
        self.sizes: tuple[int, ...] = (self.n_edges, self.n_ends, self.channels, scale.shape[1])
        self.entry_bytes = n_entries(signature) * matrix.element_size()

    def by_columns(self, kernel: str, *arguments: Tensor | int) -> None:
        """Launch blocks for an edge and some columns."""
        block = whole_warps(self.wide, BLOCK)
        grid = (self.n_edges, -(-self.wide // block))
        self.launch(kernel, grid, block, self.entry_bytes, *arguments)

    def by_atoms(self, kernel: str, n_atoms: int, *arguments: Tensor | int) -> None:
        """Launch blocks for an atom and some channels."""
        block = whole_warps(self.channels, BLOCK)
        grid = (n_atoms, -(-self.channels // block))
        shared = tile_size(n_entries(self.signature)) * self.entry_bytes
        self.launch(kernel, grid, block, shared, *arguments)

    def by_edges(self, kernel: str, *arguments: Tensor | int) -> None:
        """Launch blocks for an edge."""
        block = whole_warps(self.wide, BLOCK)
        shared = block * chunks(self.signature) * self.matrix.element_size()
        self.launch(kernel, (self.n_edges,), block, shared, *arguments)

    def launch(
        self, kernel: str, grid: Grid, block: int, shared: int, *arguments: Tensor | int
    ) -> None:
        self.program.launch(kernel, self.matrix.dtype, grid, block, shared, arguments)


def gather(
    signature: RotationSignature, x: Tensor, matrix: Tensor, scale: Tensor, ends: Tensor
) -> list[Tensor]:
    """Compute ``rotate_gather`` without derivatives."""
    orders = [x.new_empty(len(matrix), n, scale.shape[2]) for n in signature.sizes]
    call = _Call(signature, x, orders, matrix, scale, ends)
    arguments = [call.x, call.matrix, call.scale, call.ends, *orders]
    call.by_columns("rotate_gather", *arguments, *call.sizes)
    return orders


def scatter_add(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    add: bool = True,
) -> None:
    """Add ``rotate_scatter`` to contiguous x [N, K, C], or write it there."""
    call = _Call(signature, x, orders, matrix, scale, ends)
    arguments = [x, call.matrix, call.scale, *slots(ends, len(x)), *call.orders]
    call.by_atoms("rotate_scatter", len(x), *arguments, *call.sizes, int(add))


def slopes_add(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    of_matrix: Tensor,
    of_scale: Tensor,
    add: bool = True,
) -> None:
    """Add ∂φ/∂D and ∂φ/∂s to contiguous tensors, or write them there."""
    call = _Call(signature, x, orders, matrix, scale, ends)
    sizes = (*call.sizes, int(add))
    arguments = [call.x, call.matrix, call.ends, *call.orders, of_scale]
    call.by_columns("scale_slopes", *arguments, *sizes)
    arguments = [call.x, call.scale, call.ends, *call.orders, of_matrix]
    call.by_edges("matrix_slopes", *arguments, *sizes)


@gather_op.register_kernel("cuda")
def cuda_gather(
    x: Tensor, matrix: Tensor, scale: Tensor, ends: Tensor, lmax: int, mmax: int
) -> list[Tensor]:
    """Kernel of ``mlip::rotate_gather``."""
    return gather(RotationSignature(lmax, mmax), x, matrix, scale, ends)


@scatter_op.register_kernel("cuda")
def cuda_scatter(
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    n_atoms: int,
    lmax: int,
    mmax: int,
) -> Tensor:
    """Kernel of ``mlip::rotate_scatter``."""
    signature = RotationSignature(lmax, mmax)
    out = matrix.new_empty(n_atoms, signature.n_coefficients, scale.shape[2] // len(ends))
    scatter_add(signature, out, orders, matrix, scale, ends, add=False)
    return out


@slopes_op.register_kernel("cuda")
def cuda_slopes(
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    lmax: int,
    mmax: int,
) -> tuple[Tensor, Tensor]:
    """Kernel of ``mlip::rotate_slopes``."""
    found = matrix.new_empty(matrix.shape), scale.new_empty(scale.shape)
    signature = RotationSignature(lmax, mmax)
    slopes_add(signature, x, orders, matrix, scale, ends, *found, add=False)
    return found
