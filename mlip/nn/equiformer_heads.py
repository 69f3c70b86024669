"""Output heads of EquiformerV3 on normalised features: energy, and stress read off directly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlip.nn.so3_layers import SO3Linear, dense
from mlip.nn.sphere_product import gate_by_degree
from mlip.ops import structure_sum
from mlip.so3 import degree_major


class EnergyHead(nn.Module):
    """Two dense layers on the invariants of an atom."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = dense(channels, hidden)
        self.linear_2 = dense(hidden, 1)

    def forward(self, invariants: Tensor) -> Tensor:
        """Map [N, channels] to node energies [N]."""
        return self.linear_2(nn.functional.silu(self.linear_1(invariants)))[:, 0]


class StressHead(nn.Module):
    """Mean over atoms of a scalar and a quadrupole, put together to a symmetric tensor."""

    degrees: Tensor

    def __init__(self, lmax: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = SO3Linear(lmax, channels, hidden)
        self.gate = dense(channels, lmax * hidden)
        self.linear_2 = SO3Linear(lmax, hidden, 1)
        degrees = torch.tensor([degree for degree, _ in degree_major(lmax, lmax)])
        self.register_buffer("degrees", degrees, persistent=False)

    def forward(self, x: Tensor, batch: Tensor, n_graphs: int) -> Tensor:
        """Map [N, K, channels] of atoms in structures ``batch`` [N] to stresses [B, 3, 3]."""
        hidden = gate_by_degree(self.linear_1(x), self.gate(x[:, 0]), self.degrees)
        per_atom = self.linear_2(hidden)[:, :9, 0]
        count = torch.bincount(batch, minlength=n_graphs).to(x)[:, None]
        return symmetric_tensor(structure_sum(per_atom, batch, n_graphs) / count)


def symmetric_tensor(coefficients: Tensor) -> Tensor:
    """Put l = 0 and l = 2 coefficients together to symmetric 3 × 3 tensors.

    The five tensors of l = 2 and 1/√3 are orthonormal; the antisymmetric part l = 1 is left out.

    Args:
        coefficients: [B, 9] of l = 0, 1, 2.

    Returns:
        [B, 3, 3], axes x, y, z.
    """
    trace, _, quadrupole = coefficients.split([1, 3, 5], dim=1)
    xz, xy, yy, yz, zz = (quadrupole * math.sqrt(0.5)).unbind(1)
    third = trace[:, 0] / math.sqrt(3)
    axial = yy / math.sqrt(3)
    rows = (
        (third - axial - zz, xy, xz),
        (xy, third + 2 * axial, yz),
        (xz, yz, third - axial + zz),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
