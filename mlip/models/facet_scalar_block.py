"""A block of Facet that ends in scalars, in inference: forward and backward pass.

Nothing here is seen by autograd: ``facet_inference.py`` calls both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.nn.functional import silu

from mlip.models.facet_packed import message_gradients, scaled
from mlip.nn.node_update import ScalarUpdate
from mlip.ops.cpu.memory import empty_for

if TYPE_CHECKING:
    from mlip.models.facet import FacetBlock
    from mlip.ops.cpu.node_program import Matrix, Program
    from mlip.ops.cpu.runner import EdgeList


class Weights(NamedTuple):
    """Weights of a block with all constant factors in them.

    message: signature of the convolution as text. kernel: [R, n_weights] of the radial functions.
    channels: of each degree of the old features. residual: whether old scalars are added to the new
    ones. after, skip: from the summed messages and from the old scalars. layers: of the perceptron.
    """

    message: str
    kernel: Tensor
    channels: tuple[int, ...]
    residual: bool
    after: Matrix
    skip: Matrix
    layers: tuple[Matrix, ...]

    @property
    def target(self) -> tuple[int, ...]:
        """Channels of the result."""
        return (self.layers[-1].shape[1],)


class Passes(NamedTuple):
    """What runs a block."""

    weights: Weights
    forward: Program
    backward: Program


def covers(update: ScalarUpdate) -> bool:
    """Whether this is the perceptron of an update."""
    mlp = update.mlp
    return mlp.activation is silu and mlp.final_is_linear and not len(mlp.norm_scales)


def prepare(block: FacetBlock) -> Passes:
    """Give what runs a block."""
    from mlip.ops.cpu.library import encode
    from mlip.ops.cpu.node_program import Matrix

    assert isinstance(block.update, ScalarUpdate)
    *layers, last = (layer.detach() for layer in block.update.mlp.kernels)
    if block.residual_gain is not None:
        last = last * block.residual_gain.gain
    weights = Weights(
        encode(block.signature),
        block.radial.kernels[0].detach(),
        block.signature.channels,
        block.residual,
        Matrix(scaled(block.after)[0] * block.message_scale),
        Matrix(scaled(block.skip)[0]),
        tuple(map(Matrix, (*layers, last))),
    )
    return Passes(weights, _forward(weights), _backward(weights))


def _forward(w: Weights) -> Program:
    """Write the steps from summed messages to new scalars."""
    from mlip.ops.cpu.node_program import Program

    program = Program()
    sums, x, out = (program.given(n) for n in (w.after.shape[:1], w.channels, w.target))
    layers = [program.given(layer.shape[1:]) for layer in w.layers[:-1]]
    y = program.local(w.after.shape[1:])
    program.multiply(y, sums, 0, w.after)
    program.multiply(y, x, 0, w.skip, add=True)
    for hidden, layer in zip(layers, w.layers[:-1], strict=True):
        program.multiply(hidden, y, 0, layer)
        y = program.local(hidden.channels)
        program.silu(y, hidden)
    program.multiply(out, y, 0, w.layers[-1])
    if w.residual:
        program.add(out, x)
    return program


def _backward(w: Weights) -> Program:
    """Write the steps from the gradient by new scalars to those by messages and old features."""
    from mlip.ops.cpu.node_program import Program

    program = Program()
    gradient, d_sums, dx = (program.given(n) for n in (w.target, w.after.shape[:1], w.channels))
    layers = [program.given(layer.shape[1:]) for layer in w.layers[:-1]]
    slope = gradient
    for hidden, layer in zip(reversed(layers), reversed(w.layers), strict=False):
        of_active, of_hidden = program.local(hidden.channels), program.local(hidden.channels)
        program.multiply(of_active, slope, 0, layer.T)
        program.silu_slopes(of_hidden, of_active, hidden)
        slope = of_hidden
    dy = program.local(w.after.shape[1:])
    program.multiply(dy, slope, 0, w.layers[0].T)
    program.multiply(d_sums, dy, 0, w.after.T)
    program.multiply(dx, dy, 0, w.skip.T)
    for degree in range(1, len(w.channels)):
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
    """Compute the scalars of a block, and what the backward pass needs.

    Arguments as for a block of products.
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
    d_sums, dx = (empty_for(gradient, (size,)) for size in passes.backward.sizes(n)[1:3])
    passes.backward.run(n, gradient, d_sums, dx, *kept)
    onto = dx if want_features else None
    of_edges = message_gradients(
        w.message, w.kernel, edges, harmonics, basis, sources, d_sums, onto
    )
    return onto, *of_edges
