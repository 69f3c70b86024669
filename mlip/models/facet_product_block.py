"""A block of Facet with products on the sphere, in inference: forward and backward pass.

Nothing here is seen by autograd: ``facet_inference.py`` calls both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlip.models.facet_packed import message_gradients, scaled, widths
from mlip.nn.node_update import SphereProductUpdate
from mlip.ops.cpu.memory import empty_for

if TYPE_CHECKING:
    from mlip.models.facet import FacetBlock
    from mlip.ops.cpu.node_program import Buffer, Matrix, Program
    from mlip.ops.cpu.packed_products import PackedProducts
    from mlip.ops.cpu.runner import EdgeList


class Weights(NamedTuple):
    """Weights of a block with all constant factors in them; one matrix for each degree.

    message: signature of the convolution as text. kernel: [R, n_weights] of the radial functions.
    channels: of each degree of the old features. residual: whether these are added to the new ones.
    after, skip: from the summed messages and from the old features. up: to the factors of the
    products. down, down_products: from features and from products. hidden, hidden_products: from
    scalars of both to the hidden layer of the gates; gates: from there to all channels.
    """

    message: str
    kernel: Tensor
    channels: tuple[int, ...]
    residual: bool
    after: tuple[Matrix, ...]
    skip: tuple[Matrix, ...]
    up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]
    down_products: tuple[Matrix, ...]
    hidden: Matrix
    hidden_products: Matrix
    gates: Matrix
    products: PackedProducts

    @property
    def target(self) -> tuple[int, ...]:
        """Channels of the result."""
        return tuple(widths(self.down, 1))


class Passes:
    """What runs a block; programs are written when first needed."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @cached_property
    def forward(self) -> Program:
        """From summed messages to new features."""
        return _forward(self.weights)

    @cached_property
    def backward(self) -> Program:
        """From the gradient by new features to those by messages and old features."""
        return _backward(self.weights, want_features=True)

    @cached_property
    def backward_edges(self) -> Program:
        """The same without old features."""
        return _backward(self.weights, want_features=False)


def prepare(block: FacetBlock) -> Passes:
    """Give what runs a block."""
    return Passes(_weights(block))


def _weights(block: FacetBlock) -> Weights:
    from mlip.ops.cpu.library import encode
    from mlip.ops.cpu.node_program import Matrix
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
        block.signature.channels,
        block.residual,
        tuple(Matrix(weight * block.message_scale) for weight in scaled(block.after)),
        tuple(map(Matrix, scaled(block.skip))),
        tuple(map(Matrix, scaled(update.up))),
        tuple(Matrix(weight[:n]) for weight, n in zip(down, mixed, strict=False)),
        tuple(Matrix(weight[n:]) for weight, n in zip(down, mixed, strict=False)),
        Matrix(first[: mixed[0]]),
        Matrix(first[mixed[0] :]),
        Matrix(gates * factors),
        PackedProducts(*update.degrees, update.order, update.scale, width),
    )


def _kept(program: Program, w: Weights) -> tuple[Buffer, Buffer, Buffer, Buffer]:
    """Name what a forward pass keeps: factors, features before gates, hidden layer, gates."""
    return (
        program.given(widths(w.up, 1)),
        program.given(w.target),
        program.given(w.hidden.shape[1:]),
        program.given((sum(w.target),)),
    )


def _forward(w: Weights) -> Program:
    from mlip.ops.cpu.node_program import Program

    program = Program(w.products)
    sums, x, out = (program.given(n) for n in (widths(w.after, 0), w.channels, w.target))
    u, linear, hidden, gates = _kept(program, w)
    y, v = program.local(widths(w.after, 1)), program.local(widths(w.down_products, 0))
    active = program.local(hidden.channels)
    for degree, matrix in enumerate(w.after):
        program.multiply(y, sums, degree, matrix)
        if degree < len(w.channels) and w.skip[degree].shape[0]:
            program.multiply(y, x, degree, w.skip[degree], add=True)
        program.multiply(u, y, degree, w.up[degree])
    program.products(v, u)
    for degree, matrix in enumerate(w.down):
        program.multiply(linear, y, degree, matrix)
        program.multiply(linear, v, degree, w.down_products[degree], add=True)
    program.multiply(hidden, y, 0, w.hidden)
    program.multiply(hidden, v, 0, w.hidden_products, add=True)
    program.silu(active, hidden)
    program.multiply(gates, active, 0, w.gates)
    program.gated(out, linear, gates)
    if w.residual:
        program.add(out, x)
    return program


def _backward(w: Weights, *, want_features: bool) -> Program:
    from mlip.ops.cpu.node_program import Program

    program = Program(w.products)
    gradient, d_sums = program.given(w.target), program.given(widths(w.after, 0))
    dx = program.given(w.channels) if want_features else None
    u, linear, hidden, gates = _kept(program, w)
    d_linear, d_gates, d_active, d_hidden = (
        program.local(like.channels) for like in (linear, gates, hidden, hidden)
    )
    dv, du = program.local(widths(w.down_products, 0)), program.local(u.channels)
    dy = program.local(widths(w.after, 1))
    program.gated(d_linear, gradient, gates, add_gates=False)
    program.gate_slopes(d_gates, linear, gradient)
    program.multiply(d_active, d_gates, 0, w.gates.T)
    program.silu_slopes(d_hidden, d_active, hidden)
    for degree, matrix in enumerate(w.down_products):
        program.multiply(dv, d_linear, degree, matrix.T)
    program.multiply(dv, d_hidden, 0, w.hidden_products.T, add=True)
    program.slopes(du, dv, u)
    for degree, matrix in enumerate(w.up):
        program.multiply(dy, du, degree, matrix.T)
        if degree < len(w.down):
            program.multiply(dy, d_linear, degree, w.down[degree].T, add=True)
        if degree == 0:
            program.multiply(dy, d_hidden, 0, w.hidden.T, add=True)
        program.multiply(d_sums, dy, degree, w.after[degree].T)
    if dx is not None:
        for degree in range(len(w.channels)):
            if degree < len(w.skip) and w.skip[degree].shape[0]:
                program.multiply(dx, dy, degree, w.skip[degree].T)
            else:  # nothing but messages carries it on
                program.clear(dx, degree)
        if w.residual:
            program.add(dx, gradient)
    return program


def forward(
    passes: Passes,
    edges: EdgeList,
    harmonics: Tensor,
    basis: Tensor,
    x: Tensor,
    sources: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute packed features of a block, and what the backward pass needs.

    Args:
        passes: of the block.
        edges: those of the graph. harmonics: [E, K]. basis: [E, R].
        x: packed features.
        sources: packed features that messages are made of, in general x.
    """
    from mlip.ops.cpu.library import convolve

    w, n = passes.weights, edges.n_nodes
    sums = convolve(sources, harmonics, basis, w.kernel, edges, w.message)
    out, *kept = (empty_for(x, (size,)) for size in passes.forward.sizes(n)[2:])
    passes.forward.run(n, sums, x, out, *kept)
    return out, (sources, *kept)


def backward(
    passes: Passes,
    edges: EdgeList,
    harmonics: Tensor,
    basis: Tensor,
    kept: Sequence[Tensor],
    gradient: Tensor,
    want_features: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute the gradients by packed features, harmonics and basis."""
    w, n = passes.weights, edges.n_nodes
    sources, *kept = kept
    program = passes.backward if want_features else passes.backward_edges
    sizes = program.sizes(n)[1 : 3 if want_features else 2]
    d_sums, *dx = (empty_for(gradient, (size,)) for size in sizes)
    program.run(n, gradient, d_sums, *dx, *kept)
    onto = dx[0] if want_features else None
    of_edges = message_gradients(
        w.message, w.kernel, edges, harmonics, basis, sources, d_sums, onto
    )
    return onto, *of_edges
