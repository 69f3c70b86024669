"""Running products of functions on the sphere as PyTorch operators on the CPU.

``mlip::sphere_products`` is linear in each factor, ``mlip::sphere_products_backward`` its
derivative. With u(i) the factors of which the i-th is replaced by that of a cotangent a, and P of
the products which hold that factor,

    d/dε P(u + ε a) = Σ_i P(u(i)),

so that second and higher derivatives are these two operators again.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.backend import CHANNEL_BLOCK
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.library import as_array
from mlip.ops.cpu.runner import SERIAL


@lru_cache(maxsize=64)
def loops(rows: int, out_rows: int, order: int, channels: int, dtype: torch.dtype) -> ModuleType:
    """Generate, or read from the cache, the code for numbers of coefficients and of factors."""
    from mlip.ops.cpu.sphere_products_text import source_text

    partial = channels % CHANNEL_BLOCK[dtype] > 0
    number = str(dtype).removeprefix("torch.")
    name = f"sphere_products_{rows}x{out_rows}_{order}_{number}"
    return cache.load(name, source_text(rows, out_rows, order, number, partial))


def _run(loop: str, u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int, *more: Any) -> None:
    """Call a loop for all atoms; tables go point after point."""
    channels = u.shape[2] // order
    module = loops(u.shape[1], len(from_grid), order, channels, u.dtype)
    tables = (as_array(to_grid).ravel(), as_array(from_grid.T).ravel())
    arrays = [as_array(tensor).reshape(-1) for tensor in (u, *more)]
    call = partial(getattr(module, loop), *arrays, *tables, channels, len(to_grid))
    work = len(u) * channels * len(to_grid)
    threads.run_range(call, len(u), serial=work < SERIAL)


def check(
    u: Tensor,
    to_grid: Tensor,
    from_grid: Tensor,
    order: int,
    *gradient: Tensor,
) -> None:
    """Raise an error for what would make the compiled code read outside of its arrays."""
    channels = u.shape[-1] // order
    facts = {
        "u": u.dim() == 3 and u.shape[2] == order * channels,
        "to_grid": to_grid.dim() == 2 and to_grid.shape[1] == u.shape[1],
        "from_grid": from_grid.dim() == 2 and from_grid.shape[1] == len(to_grid),
        "order": order >= 2,
        "precision": {t.dtype for t in (u, to_grid, from_grid, *gradient)} == {u.dtype},
        "gradient": all(
            t.shape == (len(u), len(from_grid), (order - 1) * channels) for t in gradient
        ),
    }
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise InputError(
            f"products on the sphere: {', '.join(wrong)} do not fit; expected the shapes of "
            "mlip.ops.sphere_products and one precision"
        )


def products(u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int) -> Tensor:
    """Compute ``sphere_products`` without derivatives."""
    check(u, to_grid, from_grid, order)
    out = u.new_empty(out_shape(u, from_grid, order))
    _run("products", u, to_grid, from_grid, order, out)
    return out


def slopes(u: Tensor, gradient: Tensor, to_grid: Tensor, from_grid: Tensor, order: int) -> Tensor:
    """Compute the gradient by u of Σ gradient·products without derivatives."""
    check(u, to_grid, from_grid, order, gradient)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    _run("slopes", u, to_grid, from_grid, order, gradient, out)
    return out


def out_shape(u: Tensor, from_grid: Tensor, order: int) -> tuple[int, int, int]:
    """Return the shape of the products."""
    return u.shape[0], from_grid.shape[0], u.shape[2] // order * (order - 1)


@torch.library.custom_op("mlip::sphere_products", mutates_args=(), device_types="cpu")
def products_op(u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int) -> Tensor:
    """Operator of ``mlip.ops.sphere_products``."""
    return products(u, to_grid, from_grid, order)


@torch.library.custom_op("mlip::sphere_products_backward", mutates_args=(), device_types="cpu")
def slopes_op(
    u: Tensor, gradient: Tensor, to_grid: Tensor, from_grid: Tensor, order: int
) -> Tensor:
    """Operator of the gradient by u of Σ gradient·products."""
    return slopes(u, gradient, to_grid, from_grid, order)


@products_op.register_fake
def _(u: Tensor, to_grid: Tensor, from_grid: Tensor, order: int) -> Tensor:  # noqa: ARG001
    return u.new_empty(out_shape(u, from_grid, order))


@slopes_op.register_fake
def _(
    u: Tensor,
    gradient: Tensor,  # noqa: ARG001
    to_grid: Tensor,  # noqa: ARG001
    from_grid: Tensor,  # noqa: ARG001
    order: int,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.order = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    u, *tables = ctx.saved_tensors
    return slopes_op(u, gradient, *tables, ctx.order), None, None, None


def _double_backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    u, gradient, *tables = ctx.saved_tensors
    order = ctx.order
    of_u: list[Tensor | int] = [0] * order
    of_gradient: list[Tensor | int] = [0] * (order - 1)
    factors, other = u.chunk(order, 2), cotangent.chunk(order, 2)
    for i in range(order):
        replaced = torch.cat([*factors[:i], other[i], *factors[i + 1 :]], 2)
        first = max(i - 1, 0)  # products before it do not hold this factor
        if ctx.needs_input_grad[1]:
            changed = products_op(replaced, *tables, order).chunk(order - 1, 2)
            of_gradient = [
                known + part if m >= first else known
                for m, (known, part) in enumerate(zip(of_gradient, changed, strict=True))
            ]
        if ctx.needs_input_grad[0]:
            parts = gradient.chunk(order - 1, 2)
            held = torch.cat([torch.zeros_like(p) for p in parts[:first]] + [*parts[first:]], 2)
            changed = slopes_op(replaced, held, *tables, order).chunk(order, 2)
            of_u = [
                known + part if j != i else known
                for j, (known, part) in enumerate(zip(of_u, changed, strict=True))
            ]
    return (
        torch.cat(of_u, 2) if ctx.needs_input_grad[0] else None,  # type: ignore[arg-type]
        torch.cat(of_gradient, 2) if ctx.needs_input_grad[1] else None,  # type: ignore[arg-type]
        None,
        None,
        None,
    )


products_op.register_autograd(_backward, setup_context=_setup)
slopes_op.register_autograd(_double_backward, setup_context=_setup)
