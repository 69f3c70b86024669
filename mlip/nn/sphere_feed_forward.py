"""Feed-forward network of EquiformerV3 on the features of one atom."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlip.nn.so3_layers import SO3Linear, add_to_scalars, dense
from mlip.nn.sphere_product import SphereBasis, sphere_product


class SphereFeedForward(nn.Module):
    """Linear map, SwiGLU-S² activation, linear map (arXiv 2604.09130).

    The paper puts the two linear maps around the product on the grid. They have no bias and mix
    channels alone, so they commute with the way to the grid and back, and act here on the few
    coefficients; the gate is constant over the grid and commutes too.
    """

    def __init__(self, basis: SphereBasis, channels: int, hidden: int) -> None:
        super().__init__()
        self.basis = basis
        self.linear_1 = SO3Linear(basis.lmax, channels, hidden)
        self.scalars = dense(channels, 2 * hidden)
        self.gate = dense(channels, hidden)
        self.expand = dense(hidden, 2 * hidden, bias=False)
        self.contract = dense(hidden, hidden, bias=False)
        self.linear_2 = SO3Linear(basis.lmax, hidden, channels)
        with torch.no_grad():  # two scalar paths meet in l = 0
            self.linear_2.weight[0] /= math.sqrt(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, K, channels] to the same shape."""
        invariants = x[:, 0]
        first, second = self.expand(self.linear_1(x)).chunk(2, dim=2)  # [N, K, hidden]
        product = sphere_product(self.basis, first, second)
        product = product * torch.sigmoid(self.gate(invariants))[:, None]
        s1, s2 = self.scalars(invariants).chunk(2, dim=1)
        mixed = add_to_scalars(self.contract(product), nn.functional.silu(s1) * s2)
        return self.linear_2(mixed)
