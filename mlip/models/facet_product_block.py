"""A block of Facet with products on the sphere, in inference: forward and backward pass.

Nothing here is seen by autograd: ``facet_inference.py`` calls both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlip.models.facet_packed import Matrices, empty, scaled, split, widths
from mlip.nn.node_update import SphereProductUpdate
from mlip.ops import Neighborhood

if TYPE_CHECKING:
    from mlip.models.facet import FacetBlock
    from mlip.ops.cpu.packed_products import PackedProducts


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

    @property
    def target(self) -> tuple[int, ...]:
        """Channels of the result."""
        return tuple(widths(self.down, 1))


def prepare(block: FacetBlock) -> Weights:
    """Give the weights of a block."""
    from mlip.ops.cpu.library import encode
    from mlip.ops.cpu.packed_products import PackedProducts

    update = block.update
    assert isinstance(update, SphereProductUpdate)
    mixed, target = update.up.channels_in, update.channels_out
    ones = torch.ones(sum(target)).to(block.after.weights[0])
    gain = block.residual_gain.gain if block.residual_gain is not None else ones
    gains = gain.split(target)
    down = [weight * own for weight, own in zip(scaled(update.down), gains, strict=True)]
    first, gates = update.invariants.kernels
    factors = torch.cat([gains[0], ones[target[0] :]])
    width = update.up.channels_out[0] // update.order
    return Weights(
        encode(block.signature),
        block.radial.kernels[0].detach(),
        tuple(weight * block.message_scale for weight in scaled(block.after)),
        scaled(block.skip),
        scaled(update.up),
        tuple(weight[:n].contiguous() for weight, n in zip(down, mixed, strict=False)),
        tuple(weight[n:].contiguous() for weight, n in zip(down, mixed, strict=False)),
        first[: mixed[0]].detach(),
        first[mixed[0] :].detach(),
        gates * factors,
        PackedProducts(*update.degrees, update.order, update.scale, width),
    )


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass, packed or [N, …]."""

    sources: Tensor
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
    sources: Tensor,
) -> tuple[Tensor, Kept]:
    """Compute packed features of a block, without a residual, and what the backward pass needs.

    Args:
        w: weights.
        neighbors, harmonics, basis: edges.
        x: packed features.
        channels: of each degree of x.
        sources: packed features that messages are made of, in general x.
    """
    from mlip.ops.cpu.library import convolve

    n = neighbors.n_nodes
    sums = convolve(
        sources, harmonics, basis, w.kernel, neighbors.rowptr, neighbors.source, w.message
    )
    old = split(x, n, channels)
    _, y = empty(x, n, widths(w.after, 1))
    factors, u = empty(x, n, widths(w.up, 1))
    summed = split(sums, n, widths(w.after, 0))
    for degree, rows in enumerate(y):
        torch.mm(summed[degree], w.after[degree], out=rows)
        if degree < len(old) and len(w.skip[degree]):
            rows.addmm_(old[degree], w.skip[degree])
        torch.mm(rows, w.up[degree], out=u[degree])
    products = w.products.products(factors, n)
    v = split(products, n, widths(w.down_products, 0))
    linear, z = empty(x, n, widths(w.down, 1))
    for degree, rows in enumerate(z):
        torch.mm(y[degree], w.down[degree], out=rows)
        rows.addmm_(v[degree], w.down_products[degree])
    hidden = (y[0] @ w.hidden).addmm_(v[0], w.hidden_products)
    gates = torch.nn.functional.silu(hidden) @ w.gates  # [N, ΣC]
    return _gated(linear, gates, n, widths(w.down, 1)), Kept(
        sources, factors, linear, hidden, gates
    )


def _gated(linear: Tensor, gates: Tensor, n: int, channels: Sequence[int]) -> Tensor:
    """Add gates to scalars; multiply the other degrees by one plus gates."""
    out, parts = empty(linear, n, channels)
    pairs = zip(split(linear, n, channels), gates.split(list(channels), 1), parts, strict=True)
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
    kept: Sequence[Tensor],
    gradient: Tensor,
    channels: Sequence[int],
    want_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by packed features (without a residual), harmonics and basis."""
    from mlip.ops.cpu.library import convolve_backward

    n, kept = neighbors.n_nodes, Kept(*kept)
    d_linear, d_gates = _gate_slopes(kept, gradient, n, widths(w.down, 1))
    d_hidden = torch.ops.aten.silu_backward(d_gates @ w.gates.T, kept.hidden)
    d_products, dv = empty(gradient, n, widths(w.down_products, 0))
    for degree, rows in enumerate(d_linear):
        torch.mm(rows, w.down_products[degree].T, out=dv[degree])
    dv[0].addmm_(d_hidden, w.hidden_products.T)
    slopes = w.products.slopes(kept.factors, d_products, n)
    du = split(slopes, n, widths(w.up, 1))
    d_sums, ds = empty(gradient, n, widths(w.after, 0))
    dx, old = empty(gradient, n, channels)
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
    of_x, of_harmonics, of_basis, _ = convolve_backward(
        kept.sources, harmonics, basis, w.kernel, d_sums, neighbors.rowptr, neighbors.source,
        w.message, [want_features, True, True, False],
    )  # fmt: skip
    return dx.add_(of_x) if want_features else dx, of_harmonics, of_basis


def _gate_slopes(
    kept: Kept, gradient: Tensor, n: int, channels: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Gradients by what ``_gated`` takes: matrices of each degree, and [N, ΣC] of the gates."""
    rows, of_gates = [], torch.empty_like(kept.gates)
    parts = [split(flat, n, channels) for flat in (kept.linear, gradient)]
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
