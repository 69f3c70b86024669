"""The first block of Facet in inference: its features are rows of a table, one for each element.

Summed messages are then Σ_s Σ_n K[n, c] X[s, c] A[i, lm, s, n] with the radial kernel K, the table
X and A[i, lm, s, n] = Σ_j b_n(r_ij) Y_lm(r_ij) over the neighbours j of element s. A has R numbers
for each element that is there, as channels of a convolution whose kernel is the identity; K and X
go into the matrices that follow. With few elements these are fewer channels than X has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mlip.models.facet_product_block import Passes
from mlip.ops import ConvolutionSignature
from mlip.ops.backend import CHANNEL_BLOCK


class ElementWeights(NamedTuple):
    """What runs a block whose messages are summed by element.

    made_of: what runs it in general. features: [S, width], what the new convolution takes from an
    atom of each element.
    """

    made_of: Passes
    passes: Passes
    features: Tensor


def width_of(n_elements: int, n_radial: int, dtype: torch.dtype) -> int:
    """Channels of the convolution: of each element its radial functions, then padding."""
    block = CHANNEL_BLOCK[dtype]
    return -(-n_elements * n_radial // block) * block


def weights_of_elements(
    general: Passes,
    signature: ConvolutionSignature,
    table: Tensor,
    present: tuple[int, ...],
) -> ElementWeights:
    """Change the weights of a block to those that sum messages by element.

    Args:
        general: what runs the block.
        signature: of its convolution, from scalars alone.
        table: X, [S, C].
        present: rows of elements that are there.
    """
    from mlip.ops.cpu.library import encode
    from mlip.ops.cpu.node_program import Matrix

    weights = general.weights
    kernel, after = weights.kernel, weights.after
    n_radial, n = len(kernel), len(present)
    width = width_of(n, n_radial, kernel.dtype)
    unit = kernel.new_zeros(n_radial, width)
    unit[:, : n * n_radial] = torch.eye(n_radial).to(kernel).repeat(1, n)
    features = table.new_zeros(len(table), width)
    for slot, row in enumerate(present):
        features[row, slot * n_radial : (slot + 1) * n_radial] = 1
    own = table.detach()[list(present)]
    matrices = [matrix.tensor for matrix in after]
    for part, (_, _, l3) in zip(kernel.split(table.shape[1], 1), signature.paths, strict=True):
        rows = (own[:, None] * part).flatten(0, 1) @ after[l3].tensor  # [elements · R, mixed]
        matrices[l3] = torch.nn.functional.pad(rows, (0, 0, 0, width - len(rows)))
    messages = replace(signature, channels=(width,))
    changed = weights._replace(
        message=encode(messages),
        kernel=unit.repeat(1, len(signature.paths)),
        after=tuple(map(Matrix, matrices)),
    )
    return ElementWeights(general, Passes(changed), features)
