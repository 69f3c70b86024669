"""A block of Facet that ends in scalars, in inference: forward and backward pass.

Nothing here is seen by autograd: ``facet_inference.py`` calls both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from mlip.models.facet_packed import Matrices, scaled, split
from mlip.nn.node_update import ScalarUpdate
from mlip.ops import Neighborhood

if TYPE_CHECKING:
    from mlip.models.facet import FacetBlock


class Weights(NamedTuple):
    """Weights of a block with all constant factors in them.

    message: signature of the convolution as text. kernel: [R, n_weights] of the radial functions.
    after, skip: from the summed messages and from the old scalars. layers: of the perceptron.
    """

    message: str
    kernel: Tensor
    after: Tensor
    skip: Tensor
    layers: Matrices

    @property
    def target(self) -> tuple[int, ...]:
        """Channels of the result."""
        return (self.layers[-1].shape[1],)


def covers(update: ScalarUpdate) -> bool:
    """Whether this is the perceptron of an update."""
    mlp = update.mlp
    return mlp.activation is silu and mlp.final_is_linear and not len(mlp.norm_scales)


def prepare(block: FacetBlock) -> Weights:
    """Give the weights of a block."""
    from mlip.ops.cpu.library import encode

    assert isinstance(block.update, ScalarUpdate)
    *layers, last = (layer.detach() for layer in block.update.mlp.kernels)
    if block.residual_gain is not None:
        last = last * block.residual_gain.gain
    return Weights(
        encode(block.signature),
        block.radial.kernels[0].detach(),
        scaled(block.after)[0] * block.message_scale,
        scaled(block.skip)[0],
        (*layers, last),
    )


def forward(
    w: Weights,
    neighbors: Neighborhood,
    harmonics: Tensor,
    basis: Tensor,
    x: Tensor,
    channels: Sequence[int],
    sources: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the scalars of a block, without a residual, and what the backward pass needs.

    Arguments as for a block of products.
    """
    from mlip.ops.cpu.library import convolve

    n = neighbors.n_nodes
    sums = convolve(
        sources, harmonics, basis, w.kernel, neighbors.rowptr, neighbors.source, w.message
    )
    y = torch.mm(sums.view(n, -1), w.after)
    y.addmm_(split(x, n, channels)[0], w.skip)
    hidden = []
    for layer in w.layers[:-1]:
        hidden.append(torch.mm(y, layer))
        y = silu(hidden[-1])
    return torch.mm(y, w.layers[-1]).view(-1), (sources, *hidden)


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

    n = neighbors.n_nodes
    sources, *hidden = kept
    slope = torch.mm(gradient.view(n, -1), w.layers[-1].T)
    for layer, before in zip(reversed(w.layers[:-1]), reversed(hidden), strict=True):
        slope = torch.mm(torch.ops.aten.silu_backward(slope, before), layer.T)
    of_sums = torch.mm(slope, w.after.T).view(-1)
    wanted = [want_features, True, True, False]
    of_x, of_harmonics, of_basis, _ = convolve_backward(
        sources, harmonics, basis, w.kernel, of_sums, neighbors.rowptr, neighbors.source, w.message,
        wanted,
    )  # fmt: skip
    if want_features:
        split(of_x, n, channels)[0].addmm_(slope, w.skip.T)
    return of_x, of_harmonics, of_basis
