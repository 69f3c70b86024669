"""A block of Facet in inference: forward and backward pass written out, first derivatives only.

The arithmetic is that of ``FacetBlock`` with messages linear in radial functions and products on
the sphere. What it saves is everything around it: features stay in one array, degree after degree,
matrix products write where the next step reads, constant factors are part of the weights, and
autograd sees one operation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlip.nn.equivariant import EquivariantLinear
from mlip.nn.node_update import SphereProductUpdate
from mlip.nn.so3_layers import versions
from mlip.ops import Features, Neighborhood
from mlip.ops.backend import CHECK_EDGES, compare, odd_channels, tracing, use_kernel

if TYPE_CHECKING:
    from mlip.models.facet import Edges, FacetBlock
    from mlip.ops.cpu.packed_products import PackedProducts

FOR_CPU = "it is written for processors"
Matrices = tuple[Tensor, ...]


class Weights(NamedTuple):
    """Weights of a block with all constant factors in them; one matrix for each degree.

    message: signature of the convolution as text. kernel: [R, n_weights] of the radial functions.
    after, skip: from the summed messages and from the old features. up: to the factors of the
    products. down, down_products: from features and from products. hidden, hidden_products: from
    scalars of both to the hidden layer of the gates; gates: from there to all channels.
    """

    message: str
    kernel: Tensor
    after: Matrices
    skip: Matrices
    up: Matrices
    down: Matrices
    down_products: Matrices
    hidden: Tensor
    hidden_products: Tensor
    gates: Tensor
    products: PackedProducts


def block_in_inference(block: FacetBlock, x: Features, edges: Edges) -> Features | None:
    """Run a block, or return None where it must go the general way.

    Args:
        block: of a Facet that is not trained.
        x: [N, 2l+1, C_l] for each degree.
        edges: what blocks share.
    """
    if block.backend == "torch" or tracing() or not edges.basis.shape[0] or not _simple(block):
        return None
    tensors = [*x, edges.harmonics, edges.basis]

    def check() -> tuple[float, float]:
        return _compared(block, x, edges)

    order = getattr(block.update, "order", 0)
    name = f"block of Facet: {block.signature}, {order} factors, to channels {block.target}"
    # asked for by name, the kernels of the general way tell why they cannot run
    if not use_kernel("auto", name, tensors, check, _uncovered(block, x), cuda=FOR_CPU):
        return None
    return _run(block, edges.neighbors, edges.harmonics, edges.basis, x)


def _run(
    block: FacetBlock, neighbors: Neighborhood, harmonics: Tensor, basis: Tensor, x: Features
) -> Features:
    own = (prepared(block), block.residual)
    found: Features = _Block.apply(own, neighbors, harmonics, basis, *x)  # type: ignore[no-untyped-call]
    return found


def _simple(block: FacetBlock) -> bool:
    """Whether this is the arithmetic of a block; for others nothing is decided here."""
    return (
        isinstance(block.update, SphereProductUpdate)
        and block.before is None
        and len(block.radial.kernels) == 1
        and not block.residual_normalization
        and block.output_gain is None
    )


def _uncovered(block: FacetBlock, x: Features) -> str | None:
    """Why a block cannot run here, or None: its messages are not padded."""
    odd = (odd_channels(width, x[0].dtype) for width in block.signature.channels)
    return next((reason for reason in odd if reason is not None), None)


def prepared(block: FacetBlock) -> Weights:
    """Give the weights of a block, made anew when a parameter has changed."""
    key = versions(block.parameters())
    if block.prepared is None or block.prepared[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            block.prepared = (key, _prepare(block))
    return block.prepared[1]


def _prepare(block: FacetBlock) -> Weights:
    from mlip.ops.cpu.library import encode
    from mlip.ops.cpu.packed_products import PackedProducts

    update = block.update
    assert isinstance(update, SphereProductUpdate)
    mixed, target = update.up.channels_in, update.channels_out
    ones = torch.ones(sum(target)).to(block.after.weights[0])
    gain = block.residual_gain.gain if block.residual_gain is not None else ones
    gains = gain.split(target)
    down = [weight * own for weight, own in zip(_scaled(update.down), gains, strict=True)]
    first, gates = update.invariants.kernels
    factors = torch.cat([gains[0], ones[target[0] :]])
    width = update.up.channels_out[0] // update.order
    return Weights(
        encode(block.signature),
        block.radial.kernels[0].detach(),
        tuple(weight * block.message_scale for weight in _scaled(block.after)),
        _scaled(block.skip),
        _scaled(update.up),
        tuple(weight[:n].contiguous() for weight, n in zip(down, mixed, strict=False)),
        tuple(weight[n:].contiguous() for weight, n in zip(down, mixed, strict=False)),
        first[: mixed[0]].detach(),
        first[mixed[0] :].detach(),
        gates * factors,
        PackedProducts(*update.degrees, update.order, update.scale, width),
    )


def _scaled(linear: EquivariantLinear) -> Matrices:
    """Matrices of a linear map; an absent degree has no rows."""
    return tuple(w.detach() / math.sqrt(max(len(w), 1)) for w in linear.weights)


def _degrees(flat: Tensor, n_atoms: int, channels: Sequence[int]) -> list[Tensor]:
    """View packed features as one matrix [N·(2l+1), C_l] for each degree."""
    parts, first = [], flat.storage_offset()
    for degree, width in enumerate(channels):
        rows = n_atoms * (2 * degree + 1)
        parts.append(flat.as_strided((rows, width), (width, 1), first))
        first += rows * width
    return parts


def _empty(like: Tensor, n_atoms: int, channels: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Make packed features, and their views."""
    size = n_atoms * sum((2 * degree + 1) * n for degree, n in enumerate(channels))
    flat = like.new_empty(size)
    return flat, _degrees(flat, n_atoms, channels)


def _widths(matrices: Matrices, dim: int) -> list[int]:
    return [matrix.shape[dim] for matrix in matrices]


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass, packed or [N, …]."""

    x: Tensor
    factors: Tensor
    linear: Tensor
    hidden: Tensor
    gates: Tensor


def forward(
    w: Weights,
    neighbors: Neighborhood,
    harmonics: Tensor,
    basis: Tensor,
    x: Tensor,
    channels: Sequence[int],
) -> tuple[Tensor, _Kept]:
    """Compute packed features of a block.

    Args:
        w: weights.
        neighbors, harmonics, basis: edges.
        x: packed features.
        channels: of each degree of x.
    """
    from mlip.ops.cpu.library import convolve

    n = neighbors.n_nodes
    sums = convolve(x, harmonics, basis, w.kernel, neighbors.rowptr, neighbors.source, w.message)
    old = _degrees(x, n, channels)
    _, y = _empty(x, n, _widths(w.after, 1))
    factors, u = _empty(x, n, _widths(w.up, 1))
    summed = _degrees(sums, n, _widths(w.after, 0))
    for degree, rows in enumerate(y):
        torch.mm(summed[degree], w.after[degree], out=rows)
        if degree < len(old) and len(w.skip[degree]):
            rows.addmm_(old[degree], w.skip[degree])
        torch.mm(rows, w.up[degree], out=u[degree])
    products = w.products.products(factors, n)
    v = _degrees(products, n, _widths(w.down_products, 0))
    linear, z = _empty(x, n, _widths(w.down, 1))
    for degree, rows in enumerate(z):
        torch.mm(y[degree], w.down[degree], out=rows)
        rows.addmm_(v[degree], w.down_products[degree])
    hidden = (y[0] @ w.hidden).addmm_(v[0], w.hidden_products)
    gates = torch.nn.functional.silu(hidden) @ w.gates  # [N, ΣC]
    return _gated(linear, gates, n, _widths(w.down, 1)), _Kept(x, factors, linear, hidden, gates)


def _gated(linear: Tensor, gates: Tensor, n: int, channels: Sequence[int]) -> Tensor:
    """Add gates to scalars; multiply the other degrees by one plus gates."""
    out, parts = _empty(linear, n, channels)
    pairs = zip(_degrees(linear, n, channels), gates.split(list(channels), 1), parts, strict=True)
    for degree, (rows, gate, part) in enumerate(pairs):
        if degree == 0:
            torch.add(rows, gate, out=part)
        else:
            wide = rows.view(n, 2 * degree + 1, channels[degree])
            torch.addcmul(wide, wide, gate[:, None], out=part.view(wide.shape))
    return out


def backward(
    w: Weights,
    neighbors: Neighborhood,
    harmonics: Tensor,
    basis: Tensor,
    kept: _Kept,
    gradient: Tensor,
    channels: Sequence[int],
    want_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by packed features (without a residual), harmonics and basis."""
    from mlip.ops.cpu.library import convolve_backward

    n = neighbors.n_nodes
    d_linear, d_gates = _gate_slopes(kept, gradient, n, _widths(w.down, 1))
    d_hidden = torch.ops.aten.silu_backward(d_gates @ w.gates.T, kept.hidden)
    d_products, dv = _empty(gradient, n, _widths(w.down_products, 0))
    for degree, rows in enumerate(d_linear):
        torch.mm(rows, w.down_products[degree].T, out=dv[degree])
    dv[0].addmm_(d_hidden, w.hidden_products.T)
    slopes = w.products.slopes(kept.factors, d_products, n)
    du = _degrees(slopes, n, _widths(w.up, 1))
    d_sums, ds = _empty(gradient, n, _widths(w.after, 0))
    dx, old = _empty(gradient, n, channels)
    for rows in old[len(du) :]:  # degrees that nothing but messages carries on
        rows.zero_()
    for degree, rows in enumerate(du):
        dy = torch.mm(rows, w.up[degree].T)
        if degree < len(d_linear):
            dy.addmm_(d_linear[degree], w.down[degree].T)
        if degree == 0:
            dy.addmm_(d_hidden, w.hidden.T)
        torch.mm(dy, w.after[degree].T, out=ds[degree])
        if want_features and degree < len(old):
            torch.mm(dy, w.skip[degree].T, out=old[degree])
    wanted = [want_features, True, True, False]
    of_x, of_harmonics, of_basis, _ = convolve_backward(
        kept.x, harmonics, basis, w.kernel, d_sums, neighbors.rowptr, neighbors.source, w.message,
        wanted,
    )  # fmt: skip
    return dx.add_(of_x) if want_features else dx, of_harmonics, of_basis


def _gate_slopes(
    kept: _Kept, gradient: Tensor, n: int, channels: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Gradients by what ``_gated`` takes: matrices of each degree, and [N, ΣC] of the gates."""
    rows, of_gates = [], torch.empty_like(kept.gates)
    parts = [_degrees(flat, n, channels) for flat in (kept.linear, gradient)]
    gates = (kept.gates.split(list(channels), 1), of_gates.split(list(channels), 1))
    for degree, (linear, slope, gate, of_gate) in enumerate(zip(*parts, *gates, strict=True)):
        if degree == 0:
            of_gate.copy_(slope)
            rows.append(slope)
        else:
            wide = slope.view(n, 2 * degree + 1, channels[degree])
            torch.sum(wide * linear.view(wide.shape), 1, out=of_gate)
            rows.append(torch.addcmul(wide, wide, gate[:, None]).view(slope.shape))
    return rows, of_gates


def _residual(
    x: Tensor, out: Tensor, n: int, channels: Sequence[int], target: Sequence[int]
) -> None:
    """Add the channels that two packed features share to ``out``."""
    pairs = zip(_degrees(x, n, channels), _degrees(out, n, target), strict=False)
    for rows, own in pairs:
        shared = min(rows.shape[1], own.shape[1])
        if shared:
            own[:, :shared] += rows[:, :shared]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: tuple[Weights, bool],
        neighbors: Neighborhood,
        harmonics: Tensor,
        basis: Tensor,
        *x: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, residual = block
        ctx.channels = tuple(part.shape[2] for part in x)
        ctx.weights, ctx.neighbors, ctx.residual = weights, neighbors, residual
        flat = torch.cat([part.reshape(-1) for part in x])
        out, kept = forward(weights, neighbors, harmonics, basis, flat, ctx.channels)
        target = _widths(weights.down, 1)
        if residual:
            _residual(flat, out, neighbors.n_nodes, ctx.channels, target)
        ctx.save_for_backward(harmonics, basis, *kept)
        n = neighbors.n_nodes
        return tuple(
            rows.view(n, 2 * degree + 1, -1) for degree, rows in enumerate(_degrees(out, n, target))
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        harmonics, basis, *kept = ctx.saved_tensors
        n, channels = ctx.neighbors.n_nodes, ctx.channels
        gradient = torch.cat([part.reshape(-1) for part in gradients])
        wanted = any(ctx.needs_input_grad[4:])
        dx, of_harmonics, of_basis = backward(
            ctx.weights, ctx.neighbors, harmonics, basis, _Kept(*kept), gradient, channels, wanted
        )
        if not wanted:
            return None, None, of_harmonics, of_basis, *[None] * len(channels)
        if ctx.residual:
            _residual(gradient, dx, n, _widths(ctx.weights.down, 1), channels)
        rows = enumerate(_degrees(dx, n, channels))
        parts = (part.view(n, 2 * degree + 1, channels[degree]) for degree, part in rows)
        return None, None, of_harmonics, of_basis, *parts


def _compared(block: FacetBlock, x: Features, edges: Edges) -> tuple[float, float]:
    """Errors of this and of the general way in plain PyTorch, on the first edges."""
    count = min(CHECK_EDGES, edges.basis.shape[0])
    part = edges.neighbors.first(count)

    def plain(harmonics: Tensor, basis: Tensor, *features: Tensor) -> Features:
        general = copy.deepcopy(block).to(basis.dtype).requires_grad_(False)
        general.use_backend("torch")
        own = edges._replace(harmonics=harmonics, basis=basis, neighbors=part, inference=False)
        found: Features = general(features, own)
        return found

    def fast(harmonics: Tensor, basis: Tensor, *features: Tensor) -> Features:
        return _run(block, part, harmonics, basis, features)

    return compare(plain, fast, [edges.harmonics[:count], edges.basis[:count], *_disturbed(x)])


def _disturbed(x: Features) -> list[Tensor]:
    """Add noise: what vanishes by symmetry, in a perfect crystal, has no relative error."""
    generator = torch.Generator().manual_seed(0)
    size = torch.cat([part.detach().flatten() for part in x]).square().mean().sqrt()
    noise = [torch.randn(part.shape, generator=generator).to(part) for part in x]
    return [part.detach() + size * own for part, own in zip(x, noise, strict=True)]
