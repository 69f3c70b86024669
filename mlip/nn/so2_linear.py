"""Linear map of features in the frames of edges: equivariant to the roll about the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mlip.nn.so3_layers import dense
from mlip.ops import PackedMatrix

Map = Callable[[Tensor], Tensor]


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
        self._constants: tuple[tuple[int, ...], Constants] | None = None

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Map features of the orders 0, +1, −1, ….

        Args:
            x: tensors [E, degrees, channels_in].

        Returns:
            Tensors [E, degrees·channels_out], the first behind ``extra`` invariants.
        """
        out = [self.axial(x[0].flatten(1))]
        for weight, plus, minus in zip(self.orders, x[1::2], x[2::2], strict=True):
            real, imaginary = weight.chunk(2)
            maps = [partial(linear, weight=w) for w in (real, real - imaginary, real + imaginary)]
            out += _complex_product(maps, plus.flatten(1), minus.flatten(1))
        return out

    def infer(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Map like ``forward``, with constant weights and without derivatives."""
        constants = self.constants()
        out = [constants.axial(x[0].flatten(1), self.axial.bias)]
        for maps, plus, minus in zip(constants.orders, x[1::2], x[2::2], strict=True):
            out += _complex_product(maps, plus.flatten(1), minus.flatten(1))
        return out

    def pull_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Map gradients of the outputs to those of the inputs, [E, degrees, channels_in]."""
        constants = self.constants()
        found = [constants.axial_back(gradients[0])]
        for maps, plus, minus in zip(
            constants.orders_back, gradients[1::2], gradients[2::2], strict=True
        ):
            found += _complex_product(maps, plus, minus, conjugate=True)
        channels_in = self.axial.in_features // (self.lmax + 1)
        return [part.unflatten(1, (-1, channels_in)) for part in found]

    def constants(self) -> Constants:
        """Prepare the weights for `infer` and `pull_back`, again when they have changed."""
        weights = (self.axial.weight, *self.orders)
        key = tuple(number for w in weights for number in (w.data_ptr(), w._version))
        if self._constants is None or self._constants[0] != key:
            axial, *orders = (weight.detach() for weight in weights)
            parts = [weight.chunk(2) for weight in orders]
            maps = [(real, real - imaginary, real + imaginary) for real, imaginary in parts]
            self._constants = (
                key,
                Constants(
                    PackedMatrix(axial),
                    [[PackedMatrix(m) for m in three] for three in maps],
                    PackedMatrix(axial.T),
                    [[PackedMatrix(m.T) for m in three] for three in maps],
                ),
            )
        return self._constants[1]


class Constants(NamedTuple):
    """Matrices of an `SO2Linear`: R, R − I and R + I of each order m > 0; transposed ones."""

    axial: PackedMatrix
    orders: list[list[PackedMatrix]]
    axial_back: PackedMatrix
    orders_back: list[list[PackedMatrix]]


def _complex_product(
    maps: Sequence[Map], plus: Tensor, minus: Tensor, conjugate: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply R + iI, or R − iI, to x+ + i x− by three real products (after Gauss).

    R x+ ∓ I x− = R (x+ + x−) − (R ± I) x−, R x− ± I x+ = R (x+ + x−) − (R ∓ I) x+.

    Args:
        maps: products with R, R − I and R + I.
        plus: x+, [E, in].
        minus: x−.
        conjugate: take the lower signs.
    """
    real, difference, total = maps
    if conjugate:
        difference, total = total, difference
    both = real(plus + minus)
    return both - total(minus), both - difference(plus)
