"""Linear map of features in the frames of edges: equivariant to the roll about the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mlip.nn.prepared import Prepared
from mlip.nn.so3_layers import dense

Matrices = tuple[Tensor, Tensor, Tensor]


class SO2Linear(nn.Module):
    """Mix degrees and channels of each order m (Passaro and Zitnick, arXiv 2302.03655, eq. 3).

    m = 0: one dense layer with bias over all degrees, which also yields ``extra`` invariants.
    m > 0: with x± the coefficients of ±m over the degrees l ≥ m,
    out+ = R x+ − I x−, out− = I x+ + R x−, no bias.

    Args:
        lmax: highest degree.
        mmax: highest order.
        channels_in: channels of the input.
        channels_out: channels of the output.
        extra: additional invariants.
    """

    def __init__(
        self, lmax: int, mmax: int, channels_in: int, channels_out: int, extra: int = 0
    ) -> None:
        super().__init__()
        self.lmax, self.channels_out, self.extra = lmax, channels_out, extra
        self.axial = dense((lmax + 1) * channels_in, extra + (lmax + 1) * channels_out)
        self.orders = nn.ParameterList()  # rows: R above I
        for order in range(1, mmax + 1):
            n_degrees = lmax + 1 - order
            bound = 1 / math.sqrt(2 * n_degrees * channels_in)
            weight = torch.empty(2 * n_degrees * channels_out, n_degrees * channels_in)
            self.orders.append(nn.Parameter(weight.uniform_(-bound, bound)))
        self._constants: Prepared[list[Matrices]] = Prepared()

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Map features of the orders 0, +1, −1, ….

        Args:
            x: tensors [E, degrees, channels_in].

        Returns:
            Tensors [E, degrees·channels_out], the first behind ``extra`` invariants.
        """
        self._constants.clear()
        return self.infer(x, [_three_real(weight) for weight in self.orders])

    def infer(self, x: Sequence[Tensor], constants: Sequence[Matrices]) -> list[Tensor]:
        """Map like ``forward``, with R, R − I and R + I of the orders m > 0."""
        out = [self.axial(x[0].flatten(1))]
        for matrices, plus, minus in zip(constants, x[1::2], x[2::2], strict=True):
            out += _complex_product(matrices, plus.flatten(1), minus.flatten(1))
        return out

    def pull_back(self, gradients: Sequence[Tensor], constants: Sequence[Matrices]) -> list[Tensor]:
        """Map gradients of the outputs to those of the inputs, [E, degrees, channels_in]."""
        found = [gradients[0] @ self.axial.weight]
        pairs = zip(constants, gradients[1::2], gradients[2::2], strict=True)
        for (real, difference, total), plus, minus in pairs:
            found += _complex_product((real.T, total.T, difference.T), plus, minus)
        channels_in = self.axial.in_features // (self.lmax + 1)
        return [part.unflatten(1, (-1, channels_in)) for part in found]

    def constants(self) -> list[Matrices]:
        """Prepare the weights of orders m > 0 for inference, again when they have changed."""
        return self._constants.get(self.orders, lambda: list(map(_three_real, self.orders)))


def _three_real(weight: Tensor) -> Matrices:
    """Compute R, R − I and R + I of R above I."""
    real, imaginary = weight.chunk(2)
    return real, real - imaginary, real + imaginary


def _complex_product(matrices: Matrices, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
    """Apply R + iI to x+ + i x− by three real products instead of four (after Gauss).

    R x+ − I x− = R (x+ + x−) − (R + I) x−, R x− + I x+ = R (x+ + x−) − (R − I) x+.

    Args:
        matrices: R, R − I and R + I, [out, in]; with the last two exchanged, R − iI is applied.
        plus: x+, [E, in].
        minus: x−.
    """
    real, difference, total = matrices
    both = linear(plus + minus, real)
    return both - linear(minus, total), both - linear(plus, difference)
