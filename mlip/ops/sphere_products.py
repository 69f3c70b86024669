"""Running products of functions on the sphere: f1·f2, f1·f2·f3, … from and to coefficients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip.ops.backend import Backend, compare, default_backend, of_width, use_kernel

CHECK_ATOMS = 64


class ProductSignature(NamedTuple):
    """Shapes: coefficients of the factors and of the products, points of the grid, factors."""

    rows: int
    out_rows: int
    points: int
    order: int

    def __str__(self) -> str:
        return f"product of {self.order} functions with {self.rows} coefficients on the sphere"


def sphere_products(
    u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int, backend: Backend | None = None
) -> Tensor:
    """Multiply functions on the sphere point by point and project the products back.

    With f_i = to_grid · u_i on the points of a grid, the products f1·f2, …, f1⋯f_order, each
    multiplied by from_grid.

    Args:
        u: [N, K, order·C] coefficients, factor after factor in the channels.
        to_grid: [G, K].
        from_grid: [K_out, G].
        order: number of factors, at least 2.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        [N, K_out, (order − 1)·C].
    """
    backend = backend or default_backend()
    signature = ProductSignature(u.shape[1], len(from_grid), len(to_grid), order)

    def check() -> tuple[float, float]:
        return compare(
            lambda x: (_definition(x, to_grid.to(x), from_grid.to(x), order),),
            lambda x: (_kernel(x, to_grid, from_grid, order),),
            [u[:CHECK_ATOMS]],
        )

    name = of_width(signature, u.shape[2] // order, u.dtype)
    if backend != "torch" and len(u) and use_kernel(backend, name, [u], check):
        return _kernel(u, to_grid, from_grid, order)
    return _definition(u, to_grid, from_grid, order)


def _definition(u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int) -> Tensor:
    factors = (to_grid @ u).chunk(order, dim=2)  # [N, G, C]
    product = factors[0]
    products = []
    for factor in factors[1:]:
        product = product * factor
        products.append(product)
    return from_grid @ torch.cat(products, dim=2)


def _kernel(u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int) -> Tensor:
    if u.device.type == "cuda":
        from mlip.ops.cuda.sphere_products import products_op
    else:
        from mlip.ops.cpu.sphere_products import products_op
    return products_op(u, to_grid, from_grid, order)
