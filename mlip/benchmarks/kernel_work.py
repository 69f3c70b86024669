"""How many operations the passes of an operator hold, from its signature.

The backward pass has the gradients by all inputs, the double backward pass the gradients of those,
contracted with cotangents, by the inputs and by the gradient of the result. Each product of the
formulas is counted once where passes share it within one, whatever a back end really does: two
operations for a multiply-add, or a product with a weight or scale; one for other additions and
products. What has no channels is not counted: edge matrices Σ C·Y, gradients by harmonics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from mlip.ops import ConvolutionSignature, RotationSignature
from mlip.ops.cpu.coupling import couplings
from mlip.ops.shared_operator import OperatorSignature
from mlip.ops.sphere_products import ProductSignature


class Work(NamedTuple):
    """Operations of each pass."""

    forward: int
    backward: int
    double_backward: int

    def times(self, number: int) -> Work:
        """Multiply all three."""
        return Work(*(number * operations for operations in self))


SEGMENT_SUM = Work(1, 0, 1)  # for each number of the input; the backward pass copies
FORCES_AND_VIRIAL = Work(2 * 3 + 2 * 9, 3 + 2 * 18, 2 * 3 + 2 * 36)  # for each edge


def four_linear(entries: int, d_in: int, d_out: int) -> Work:
    """Count φ = Σ y[k] · w · M[k, i] · x[i] for one edge and channel; ∂φ/∂y is the result.

    With t = Mᵀy, the gradients are w·t by x, t·x by w and (w·y)⊗x, or y⊗(w·x), by M. For cotangents
    a of x, B of M and c of w, φ(y, a, M, w) + φ(y, x, B, w) + φ(y, x, M, c) is differentiated by y,
    x, M and w.

    Args:
        entries: of M that are not zero.
        d_in: components of x.
        d_out: components of y.
    """
    near = min(d_in, d_out)  # the weight goes to the side with fewer components
    forward = entries + near
    backward = 2 * entries + 2 * d_in + near
    double_backward = 7 * entries + 3 * d_out + 2 * d_in + 2 * near
    return Work(2 * forward, 2 * backward, 2 * double_backward)


def convolution_work(signature: ConvolutionSignature, n_radial: int = 0) -> Work:
    """Count a convolution for one edge and one channel of each degree.

    With radial functions, weights w = b·K are made in each pass, and the derivatives by w, also the
    first ones in the double backward pass, go on to b and K.

    Args:
        signature: its paths count.
        n_radial: radial functions; 0 if weights are given.
    """
    works = []
    for coupling in couplings(signature.paths):
        d_in, d_out = 2 * coupling.path[0] + 1, 2 * coupling.path[2] + 1
        works.append(four_linear(len(coupling.matrix), d_in, d_out))
        if n_radial:
            works.append(Work(2 * n_radial, 2 * 3 * n_radial, 2 * (7 * n_radial + d_out)))
    return _total(works)


def rotation_work(signature: RotationSignature, back: bool) -> Work:
    """Count a rotation into the frame of an edge, or back, for one end and channel."""
    rows = Counter(signature.degrees)
    widths = [(2 * degree + 1, rows[degree]) for degree in rows]
    pairs = [(d_out, d_in) if back else (d_in, d_out) for d_in, d_out in widths]
    return _total(four_linear(d_in * d_out, d_in, d_out) for d_in, d_out in pairs)


def operator_work(signature: OperatorSignature) -> Work:
    """Count a shared operator on the summed features of its ends, for one edge and channel."""
    product = four_linear(signature.rows * signature.columns, signature.columns, signature.rows)
    sums = (signature.n_ends - 1) * signature.columns
    return _total([product, Work(sums, 2 * sums, 3 * sums)])


def products_work(signature: ProductSignature) -> Work:
    """Count running products of functions on the sphere, for one atom and channel."""
    order, rows, out_rows = signature.order, signature.rows, signature.out_rows
    forward = 2 * (order * rows + (order - 1) * out_rows) + order - 1
    backward = 2 * (2 * order * rows + (order - 1) * out_rows) + 4 * order - 6
    double_backward = 2 * (3 * order * rows + 2 * (order - 1) * out_rows) + 12 * order - 19
    return Work(forward, backward, double_backward).times(signature.points)


def _total(works: Iterable[Work]) -> Work:
    return Work(*map(sum, zip(*works, strict=True)))
