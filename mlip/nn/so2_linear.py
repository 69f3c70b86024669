"""Linear map of features in the frames of edges: equivariant to the roll about the edge."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlip.nn.so3_layers import dense


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map order-major [E, n, channels_in] to [E, n, channels_out] and invariants [E, extra]."""
        return self.mix(x, self.matrices())

    def matrices(self) -> list[Tensor]:
        """Write the weights of each order as one real matrix [out, in]."""
        return [self.axial.weight, *(_complex_matrix(weight) for weight in self.orders)]

    def mix(self, x: Tensor, matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the outputs with the matrices of `matrices`."""
        n_edges, n_axial = x.shape[0], self.lmax + 1
        axial = nn.functional.linear(x[:, :n_axial].flatten(1), matrices[0], self.axial.bias)
        invariants, axial = axial[:, : self.extra], axial[:, self.extra :]
        parts = [axial.reshape(n_edges, n_axial, self.channels_out)]
        for rows, matrix in zip(self._rows(), matrices[1:], strict=True):
            mixed = x[:, rows].flatten(1) @ matrix.T  # x+ and then x−
            parts.append(mixed.view(n_edges, rows.stop - rows.start, self.channels_out))
        return torch.cat(parts, dim=1), invariants

    def pull_back(self, of_x: Tensor, of_invariants: Tensor, matrices: list[Tensor]) -> Tensor:
        """Map gradients of both outputs to that of the input."""
        n_edges, n_axial = of_x.shape[0], self.lmax + 1
        axial = torch.cat([of_invariants, of_x[:, :n_axial].flatten(1)], dim=1)
        parts = [axial @ matrices[0]]
        for rows, matrix in zip(self._rows(), matrices[1:], strict=True):
            parts.append(of_x[:, rows].flatten(1) @ matrix)
        channels_in = matrices[0].shape[1] // n_axial
        return torch.cat(parts, dim=1).view(n_edges, of_x.shape[1], channels_in)

    def _rows(self) -> list[slice]:
        """Give the coefficients of the orders ±1, ±2, ..."""
        counts = [2 * (self.lmax + 1 - m) for m in range(1, len(self.orders) + 1)]
        starts = [self.lmax + 1 + sum(counts[:i]) for i in range(len(counts))]
        return [slice(a, a + n) for a, n in zip(starts, counts, strict=True)]


def _complex_matrix(weight: Tensor) -> Tensor:
    """Write (R + iI) as the real matrix [[R, −I], [I, R]] that acts on (x+, x−)."""
    real, imaginary = weight.chunk(2)
    return torch.cat(
        [torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)], dim=0
    )
