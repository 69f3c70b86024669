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
        n_edges, n_axial = x.shape[0], self.lmax + 1
        axial = self.axial(x[:, :n_axial].flatten(1))
        invariants, axial = axial[:, : self.extra], axial[:, self.extra :]
        parts = [axial.reshape(n_edges, n_axial, self.channels_out)]
        start = n_axial
        for order, weight in enumerate(self.orders, 1):
            count = 2 * (n_axial - order)
            pair = x[:, start : start + count].flatten(1)  # x+ and then x−
            start += count
            mixed = pair @ _complex_matrix(weight).T
            parts.append(mixed.view(n_edges, count, self.channels_out))
        return torch.cat(parts, dim=1), invariants


def _complex_matrix(weight: Tensor) -> Tensor:
    """Write (R + iI) as the real matrix [[R, −I], [I, R]] that acts on (x+, x−)."""
    real, imaginary = weight.chunk(2)
    return torch.cat(
        [torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)], dim=0
    )
