"""Feed-forward network of EquiformerV3 on the features of one atom."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlip.nn.prepared import Prepared
from mlip.nn.so3_layers import SO3Linear, add_to_scalars, dense, mix_channels
from mlip.nn.sphere_product import SphereBasis, gated_product, sphere_product
from mlip.ops import by_groups

ATOMS_PER_GROUP = 8  # and thread: what a group touches stays in the cache of a core


class SphereFeedForward(nn.Module):
    """Linear map, SwiGLU-S² activation, linear map (arXiv 2604.09130).

    The paper puts the two linear maps around the product on the grid. They have no bias and mix
    channels alone, so they commute with the way to the grid and back, and act here on the few
    coefficients; the gate is constant over the grid and commutes too. In inference they are
    multiplied into the linear maps of each degree before and after them.
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
        self._fold: Prepared[tuple[Tensor, Tensor, Tensor]] = Prepared()
        with torch.no_grad():  # two scalar paths meet in l = 0
            self.linear_2.weight[0] /= math.sqrt(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, K, channels] to the same shape."""
        self._fold.clear()
        first, second = self.expand(self.linear_1(x)).chunk(2, dim=2)
        gate, scalars = self._invariants(x)
        product = sphere_product(self.basis, first, second) * gate[:, None]
        return self.linear_2(add_to_scalars(self.contract(product), scalars))

    def infer(self, x: Tensor) -> Tensor:
        """Map like `forward`, with constant weights and without a second derivative."""
        first, bias, second = self.folded()

        def group(_: int, rows: Tensor) -> Tensor:
            hidden = mix_channels(rows, first)
            hidden[:, 0] += bias
            gate, scalars = self._invariants(rows)
            (product,) = gated_product(self.basis, [hidden.flatten(1)], 0, gate)
            scalars = nn.functional.linear(scalars, self.linear_2.weight[0], self.linear_2.bias)
            return add_to_scalars(mix_channels(product, second), scalars)

        size = ATOMS_PER_GROUP * torch.get_num_threads() if x.device.type == "cpu" else len(x)
        rows = [slice(i, i + size) for i in range(0, len(x), max(size, 1))]
        return by_groups(group, [(part, part) for part in rows], len(x), x)

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply neighbouring linear maps: [L+1, 2·hidden, C], bias, [L+1, C, hidden]."""
        weights = (
            self.linear_1.weight,
            self.linear_1.bias,
            self.expand.weight,
            self.contract.weight,
            self.linear_2.weight,
        )

        def fold() -> tuple[Tensor, Tensor, Tensor]:
            w1, b1, expand, contract, w2 = (weight.double() for weight in weights)
            found = (expand @ w1, expand @ b1, w2 @ contract)
            first, bias, second = (tensor.to(weights[0]) for tensor in found)
            return first, bias, second

        return self._fold.get(weights, fold)

    def _invariants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gate of the product and what l = 0 gets more, [N, hidden] each."""
        s1, s2 = self.scalars(x[:, 0]).chunk(2, dim=1)
        return torch.sigmoid(self.gate(x[:, 0])), nn.functional.silu(s1) * s2
