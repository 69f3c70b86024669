"""A small smooth many-body model, and copies of it that are each broken in one way.

They test the tests: `tests/model_contract.py` must accept the first and reject all others.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from mlip.graph import batch_index
from mlip.potential import Potential, Prediction

Fault = Literal[
    "none", "hard cutoff", "kinked cutoff", "curvature jump", "mean over atoms", "sees the batch",
    "prefers x", "chiral", "order of edges", "centre of mass", "detached term",
    "no double backward", "noise", "mean of neighbours", "global dtype", "wraps atoms",
    "edits the graph", "single precision", "pole",
]  # fmt: skip


class ToyConfig(BaseModel):
    """Settings of `Toy`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    elements: tuple[int, ...]
    cutoff: float = 4.2
    fault: Fault = "none"


class Toy(nn.Module):
    """ε_i = MLP(Σ_j c_j f_k(r_ij), |Σ_j c_j f_1(r_ij) d_ij|²) + bias of the element."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.cutoff, self.elements = config.cutoff, config.elements
        self.charge = nn.Parameter(torch.rand(119) + 0.5)
        self.bias = nn.Parameter(torch.randn(119))
        self.hidden = nn.Linear(4, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, graph: Any) -> Tensor:
        """Compute node energies [N]."""
        fault, numbers = self.config.fault, graph.atomic_numbers
        source, target = graph.edge_index
        d = graph.edge_vector
        if fault == "single precision":
            d = d.float().to(d.dtype)
        if fault == "order of edges":
            d = d * torch.linspace(0.9, 1.1, len(d), dtype=d.dtype)[:, None]
        if fault == "prefers x":
            d = d * d.new_tensor([1.01, 1.0, 1.0])
        r = d.norm(dim=1)
        radial = torch.stack([torch.exp(-r * k) for k in (0.3, 0.6, 1.0)], 1)
        radial = radial * (self.envelope(r / self.cutoff) * self.charge[numbers[source]])[:, None]
        density = self.gather(radial, target, len(numbers))
        vector = self.gather(radial[:, :1] * d, target, len(numbers))
        if fault == "mean of neighbours":
            density = density / torch.bincount(target, minlength=len(numbers))[:, None]
        if fault == "chiral":
            other = self.gather(radial[:, 1:2] * d * r[:, None], target, len(numbers))
            third = self.gather(radial[:, 2:] * d * r[:, None] ** 2, target, len(numbers))
            product = (torch.linalg.cross(vector, other) * third).sum(1, keepdim=True)
            density = density + product * density.new_tensor([1.0, 0.0, 0.0])
        if fault == "pole":
            axis = (d[:, :2].square().sum(1, keepdim=True)).sqrt() / r[:, None]
            around = axis * 0 + d[:, 2:] ** 2 / r[:, None] ** 2 + axis**2  # 1, but not its slope
            density = density + self.gather(radial * around, target, len(numbers))
        features = torch.cat([density, vector.square().sum(1, keepdim=True)], 1)
        energies = self.out(torch.tanh(self.hidden(features)))[:, 0] + self.bias[numbers]
        return self.sabotage(energies, features, graph)

    def envelope(self, x: Tensor) -> Tensor:
        """(1 − x)³ (1 + 3x + 6x²), smooth to the second derivative, or a worse one."""
        inside = (1 - x).clamp(min=0)
        if self.config.fault == "hard cutoff":
            return (x < 1).to(x.dtype)
        if self.config.fault == "kinked cutoff":
            return inside
        if self.config.fault == "curvature jump":
            return inside**2
        return inside**3 * (1 + 3 * x + 6 * x**2)

    def gather(self, values: Tensor, target: Tensor, count: int) -> Tensor:
        """Sum over edges into their targets."""
        if self.config.fault == "no double backward":
            return OnceDifferentiable.apply(values, target, count)
        return values.new_zeros(count, values.shape[1]).index_add(0, target, values)

    def sabotage(self, energies: Tensor, features: Tensor, graph: Any) -> Tensor:
        """Apply the faults that act on the result."""
        fault, batch = self.config.fault, batch_index(graph)
        if fault == "mean over atoms":
            return energies / torch.bincount(batch)[batch]
        if fault == "sees the batch":
            return energies + features.mean() * 1e-3
        if fault == "centre of mass":
            return energies + 1e-3 * graph.positions.to(energies)[:, 0]
        if fault == "wraps atoms":
            return energies + 1e-3 * graph.edge_shift.abs().sum()
        if fault == "detached term":
            return energies + features.detach().sum(1) * features.sum(1)
        if fault == "noise":
            return energies + torch.randn_like(energies) * 1e-13
        if fault == "global dtype":
            torch.set_default_dtype(torch.float64)
        if fault == "edits the graph":
            graph.positions[0] += 1e-9
        return energies


class OnceDifferentiable(torch.autograd.Function):
    """A sum with a right first derivative and a wrong second one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, target: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(target)
        return values.new_zeros(count, values.shape[1]).index_add(0, target, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.detach()[ctx.saved_tensors[0]], None, None


class WrongSignStress(Potential):
    """A potential whose pressure has the sign of the virial."""

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        prediction = super().forward(*args, **kwargs)
        stress = prediction.stress
        return prediction._replace(stress=None if stress is None else -stress)


class SkewStress(Potential):
    """A potential that forgets to symmetrise."""

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        prediction = super().forward(*args, **kwargs)
        skew = torch.tensor([[0.0, 1e-7, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
        stress = prediction.stress
        return prediction._replace(stress=None if stress is None else stress + skew)


class DirectForces(Potential):
    """A potential with a little force that is no derivative of its energy."""

    def forward(self, graph: Any, **kwargs: Any) -> Prediction:
        prediction = super().forward(graph, **kwargs)
        if prediction.forces is None:
            return prediction
        extra = torch.cos(graph.positions.roll(1, 1)) * 0.05
        return prediction._replace(forces=prediction.forces + extra)
