"""Features of atoms rotated into the frames of edges and back: the way in and out of SO(2) maps.

For E edges with P ends each (both atoms, or the target alone), Wigner matrices D_e into their
frames, scales s and the four-linear form

    φ(x, y, D, s) = Σ_{e,p,r,k,c} y_e[r, p, c] · s_e[l(r), p, c] · D_e[r, k] · x_{atom(e, p)}[k, c],

`rotate_gather` is ∂φ/∂y and `rotate_scatter`, its transpose, ∂φ/∂x. Derivatives of any order are
derivatives of φ, so that three loops serve them all. Features in frames are cut by order, because
the linear maps that follow act on each order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlip.ops.backend import (
    CHECK_EDGES,
    Backend,
    compare,
    default_backend,
    kernels_of,
    of_width,
    use_kernel,
)
from mlip.ops.segment import segment_sum
from mlip.so3 import degree_major, order_major, order_sizes

HIGHEST_CUDA_DEGREE = 6  # above, registers do not hold the coefficients of an atom
Orders = tuple[Tensor, ...]


@dataclass(frozen=True)
class RotationSignature:
    """Degrees up to ``lmax`` outside, of which the frames keep the orders |m| ≤ ``mmax``."""

    lmax: int
    mmax: int

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degree of each row of a frame, in the sequence of ``order_major``."""
        return tuple(degree for degree, _ in order_major(self.lmax, self.mmax))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of the orders 0, +1, −1, +2, −2, …."""
        return order_sizes(self.lmax, self.mmax)

    @property
    def n_coefficients(self) -> int:
        """Coefficients of an atom: (lmax + 1)²."""
        return (self.lmax + 1) ** 2

    def __str__(self) -> str:
        return f"rotation into the frames of edges, degrees ≤ {self.lmax}, orders ≤ {self.mmax}"


def rotate_gather(
    signature: RotationSignature,
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    backend: Backend | None = None,
) -> Orders:
    """Rotate features of the atoms at edges into the frames and scale them.

    Args:
        signature: degrees and orders.
        x: [N, (lmax+1)², C].
        matrix: D, [E, n, (lmax+1)²], rows as in ``order_major``. Entries between different degrees
            are zero; compiled code neither reads them nor computes their gradient.
        scale: s, [E, lmax+1, P·C], or [E, 1, P·C] if all degrees have the same.
        ends: [P, E] atoms.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        For each of the orders 0, +1, −1, … a tensor [E, rows, P·C], end after end.
    """
    if _use_kernel(backend, signature, [x], matrix, scale, ends):
        degrees = (signature.lmax, signature.mmax)
        return tuple(kernels_of("rotation", x).gather_op(x, matrix, scale, ends, *degrees))
    return _gather(signature, x, matrix, scale, ends)


def rotate_scatter(
    signature: RotationSignature,
    orders: Orders,
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    n_atoms: int,
    backend: Backend | None = None,
) -> Tensor:
    """Scale features in the frames, rotate them back and add them to the atoms at the edges.

    Args:
        signature: degrees and orders.
        orders: what ``rotate_gather`` returns.
        matrix, scale, ends, backend: as there.
        n_atoms: N.

    Returns:
        [N, (lmax+1)², C].
    """
    if _use_kernel(backend, signature, orders, matrix, scale, ends):
        degrees = (signature.lmax, signature.mmax)
        scatter_op = kernels_of("rotation", matrix).scatter_op
        return scatter_op(list(orders), matrix, scale, ends, n_atoms, *degrees)
    return _scatter(signature, orders, matrix, scale, ends, n_atoms)


def add_to_ends(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
) -> None:
    """Add ``rotate_scatter`` to x [N, K, C], which is contiguous; without derivatives."""
    if _use_kernel(None, signature, [x, *orders], matrix, scale, ends):
        kernels_of("rotation", x).scatter_add(signature, x, orders, matrix, scale, ends)
    elif len(matrix):
        for part, end in zip(_back(signature, orders, matrix, scale, ends), ends, strict=True):
            x.index_add_(0, end, part)


def add_slopes(
    signature: RotationSignature,
    x: Tensor,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    of_matrix: Tensor,
    of_scale: Tensor,
) -> None:
    """Add ∂φ/∂D and ∂φ/∂s to contiguous tensors of their shapes; without derivatives."""
    if _use_kernel(None, signature, [x, *orders], matrix, scale, ends):
        kernels = kernels_of("rotation", x)
        kernels.slopes_add(signature, x, orders, matrix, scale, ends, of_matrix, of_scale)
    elif len(matrix):
        pair = torch.cat([x.index_select(0, end) for end in ends], dim=2)
        y = torch.cat(tuple(orders), dim=1)
        of_row = y * (matrix @ pair)
        if scale.shape[1] == 1:
            of_scale += of_row.sum(1, keepdim=True)
        else:
            degrees = torch.tensor(signature.degrees, device=x.device)
            of_scale.index_add_(1, degrees, of_row)
        scaled = (y * _by_row(signature, scale)).chunk(len(ends), dim=2)
        for part, end in zip(scaled, pair.chunk(len(ends), dim=2), strict=True):
            of_matrix.baddbmm_(part, end.mT)


def _gather(
    signature: RotationSignature, x: Tensor, matrix: Tensor, scale: Tensor, ends: Tensor
) -> Orders:
    local = torch.cat([matrix @ x.index_select(0, end) for end in ends], dim=2)
    return (local * _by_row(signature, scale)).split(signature.sizes, dim=1)


def _scatter(
    signature: RotationSignature,
    orders: Orders,
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
    n_atoms: int,
) -> Tensor:
    back = _back(signature, orders, matrix, scale, ends)
    sums = [segment_sum(part, end, n_atoms) for part, end in zip(back, ends, strict=True)]
    return sum(sums[1:], start=sums[0])


def _back(
    signature: RotationSignature,
    orders: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
) -> tuple[Tensor, ...]:
    """Scale features in the frames and rotate them back: [E, (lmax+1)², C] for each end."""
    scaled = torch.cat(tuple(orders), dim=1) * _by_row(signature, scale)
    return (matrix.mT @ scaled).chunk(len(ends), dim=2)


def _by_row(signature: RotationSignature, scale: Tensor) -> Tensor:
    """Repeat the scales of degrees [E, lmax+1, ...] for their rows: [E, n, ...]."""
    if scale.shape[1] == 1:
        return scale
    lmax = signature.lmax
    parts = [scale]
    for order in range(1, signature.mmax + 1):
        parts += [scale[:, order : lmax + 1]] * 2
    return torch.cat(parts, dim=1)


def _use_kernel(
    backend: Backend | None,
    signature: RotationSignature,
    features: Sequence[Tensor],
    matrix: Tensor,
    scale: Tensor,
    ends: Tensor,
) -> bool:
    backend = backend or default_backend()
    if backend == "torch" or not len(matrix):
        return False
    width = scale.shape[2] // len(ends)

    def check() -> tuple[float, float]:
        return _compared(signature, matrix[:CHECK_EDGES], scale[:CHECK_EDGES], len(ends), width)

    many = None
    if signature.lmax > HIGHEST_CUDA_DEGREE:
        many = f"degree {signature.lmax} is above {HIGHEST_CUDA_DEGREE}"
    name = of_width(signature, width, matrix.dtype)
    return use_kernel(backend, name, [matrix, scale, *features], check, cuda=many)


def _compared(
    signature: RotationSignature, matrix: Tensor, scale: Tensor, n_ends: int, width: int
) -> tuple[float, float]:
    """Errors of kernel and definition for there and back with some edges and plain features."""
    n_edges, n_atoms = len(matrix), 1 + len(matrix) // 8
    device = matrix.device
    ends = torch.arange(n_ends * n_edges, device=device).view(n_ends, n_edges) * 7 % n_atoms
    size = n_atoms * signature.n_coefficients * width
    of_column = torch.tensor([degree for degree, _ in degree_major(signature.lmax, signature.lmax)])
    within = torch.tensor(signature.degrees)[:, None] == of_column  # other entries have no gradient
    within = within.to(device)
    x = torch.linspace(-1.0, 1.0, size, dtype=torch.float64).mul(1e3).sin().to(matrix)

    def plain(x: Tensor, d: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        d = d * within
        there = _gather(signature, x, d, s, ends)
        return (_scatter(signature, there, d, s, ends, n_atoms),)

    def fast(x: Tensor, d: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        kernels, degrees = kernels_of("rotation", x), (signature.lmax, signature.mmax)
        there = kernels.gather_op(x, d, s, ends, *degrees)
        return (kernels.scatter_op(there, d, s, ends, n_atoms, *degrees),)

    return compare(plain, fast, [x.view(n_atoms, -1, width), matrix, scale])
