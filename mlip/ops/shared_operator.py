"""One matrix for each edge, applied to all channels: the hot path of TDN.

For E edges with P ends each (one atom, or several whose features are added), matrices K_e, weights
w and the four-linear form

    φ(x, y, K, w) = Σ_{e,k,i,c} y_e[k, c] · w_e[c] · K_e[k, i] · Σ_p x_{end(p, e)}[i, c],

`operator_gather` is ∂φ/∂y, and `operator_scatter` sums the same products into the ends of edges: it
is ∂φ/∂x for transposed matrices. Derivatives of any order are derivatives of φ. `operator_apply` is
the product alone, where features belong to edges.
"""

from __future__ import annotations

from dataclasses import dataclass

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

MOST_COEFFICIENTS = 49  # degrees up to 6; above, code grows beyond what compiles in reasonable time


@dataclass(frozen=True)
class OperatorSignature:
    """Shape of the matrices, and how many ends an edge has."""

    rows: int
    columns: int
    n_ends: int

    def __str__(self) -> str:
        ends = f"{self.n_ends} end{'s' * (self.n_ends > 1)}"
        return f"shared operator, {self.rows} × {self.columns}, {ends} of an edge"


def operator_apply(
    x: Tensor, operator: Tensor, weights: Tensor, backend: Backend | None = None
) -> Tensor:
    """Multiply the features of each edge by its matrix and weights.

    Args:
        x: [E, d1, C].
        operator: K, [E, d3, d1].
        weights: w, [E, C].
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        w · K x, [E, d3, C].
    """
    if _use_kernel(backend, x, operator, weights, n_ends=1):
        return kernels_of("shared_operator", x).apply_op(x, operator, weights)
    return _apply(operator, x, weights)


def operator_gather(
    x: Tensor, operator: Tensor, weights: Tensor, ends: Tensor, backend: Backend | None = None
) -> Tensor:
    """Multiply the summed features of the ends of each edge by its matrix and weights.

    Args:
        x: [N, d1, C].
        operator: K, [E, d3, d1].
        weights: w, [E, C].
        ends: [P, E] rows of x, int64.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        w · K (x_{end 1} + x_{end 2} + …), [E, d3, C].
    """
    if _use_kernel(backend, x, operator, weights, len(ends)):
        return kernels_of("shared_operator", x).gather_op(x, operator, weights, ends)
    return _gather(x, operator, weights, ends)


def operator_scatter(
    y: Tensor,
    operator: Tensor,
    weights: Tensor,
    ends: Tensor,
    n_atoms: int,
    backend: Backend | None = None,
) -> Tensor:
    """Multiply the features of each edge by its matrix and weights and add them to its ends.

    Args:
        y: [E, d1, C].
        operator: K, [E, d3, d1].
        weights: w, [E, C].
        ends: [P, E] rows of the result, int64.
        n_atoms: N.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        [N, d3, C].
    """
    if _use_kernel(backend, y, operator, weights, len(ends)):
        return kernels_of("shared_operator", y).scatter_op(y, operator, weights, ends, n_atoms)
    return _scatter(y, operator, weights, ends, n_atoms)


def add_to_ends(x: Tensor, y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor) -> None:
    """Add ``operator_scatter`` to x [N, d3, C], which is contiguous; without derivatives."""
    if _use_kernel(None, y, operator, weights, len(ends)):
        kernels_of("shared_operator", x).scatter_add(x, y, operator, weights, ends)
    else:
        product = _apply(operator, y, weights)
        for end in ends:
            x.index_add_(0, end, product)


def operator_slopes(
    x: Tensor, y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ∂φ/∂K [E, d3, d1] and ∂φ/∂w [E, C]; without derivatives."""
    if _use_kernel(None, x, operator, weights, len(ends)):
        return kernels_of("shared_operator", x).slopes_op(x, y, operator, weights, ends)
    pair = _sum_of_ends(x, ends)
    return (y * weights[:, None]) @ pair.mT, (y * (operator @ pair)).sum(1)


def _apply(operator: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Evaluate w · K x for x [E, d1, C]: [E, d3, C]."""
    product, weights = operator @ x, weights[:, None]
    if torch.is_grad_enabled() and (product.requires_grad or weights.requires_grad):
        return product * weights
    return product.mul_(weights)  # fresh memory of that size costs more than the arithmetic


def _sum_of_ends(x: Tensor, ends: Tensor) -> Tensor:
    parts = [x.index_select(0, end) for end in ends]
    return sum(parts[1:], start=parts[0])


def _gather(x: Tensor, operator: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return _apply(operator, _sum_of_ends(x, ends), weights)


def _scatter(y: Tensor, operator: Tensor, weights: Tensor, ends: Tensor, n_atoms: int) -> Tensor:
    product = _apply(operator, y, weights)
    sums = [segment_sum(product, end, n_atoms) for end in ends]
    return sum(sums[1:], start=sums[0])


def _use_kernel(
    backend: Backend | None, features: Tensor, operator: Tensor, weights: Tensor, n_ends: int
) -> bool:
    backend = backend or default_backend()
    if backend == "torch" or not len(operator):
        return False
    signature = OperatorSignature(operator.shape[1], operator.shape[2], n_ends)

    def check() -> tuple[float, float]:
        return _compared(operator[:CHECK_EDGES], weights[:CHECK_EDGES], n_ends)

    many = None
    if max(operator.shape[1:]) > MOST_COEFFICIENTS:
        many = f"{max(operator.shape[1:])} coefficients are more than {MOST_COEFFICIENTS}"
    name = of_width(signature, weights.shape[1], weights.dtype)
    return use_kernel(backend, name, [features, operator, weights], check, many, many)


def _compared(operator: Tensor, weights: Tensor, n_ends: int) -> tuple[float, float]:
    """Errors of kernel and definition for products there and back, with plain features."""
    n_edges, _, columns = operator.shape
    n_atoms = 1 + n_edges // 8
    device = operator.device
    ends = torch.arange(n_ends * n_edges, device=device).view(n_ends, n_edges) * 7 % n_atoms
    size = n_atoms * columns * weights.shape[1]
    x = torch.linspace(-1.0, 1.0, size, dtype=torch.float64).mul(1e3).sin().to(operator)

    def plain(x: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (_scatter(_gather(x, k, w, ends), k.mT, w, ends, n_atoms),)

    def fast(x: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        kernels = kernels_of("shared_operator", x)
        there = kernels.gather_op(x, k, w, ends)
        return (kernels.scatter_op(there, k.mT, w, ends, n_atoms),)

    return compare(plain, fast, [x.view(n_atoms, columns, -1), operator, weights])
