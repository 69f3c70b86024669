"""Linear map and layer norm of features [N, (L+1)², C], equally many channels in each degree."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def dense(channels_in: int, channels_out: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer with weights from U(±1/√fan-in) and zero bias."""
    layer = nn.Linear(channels_in, channels_out, bias=bias)
    with torch.no_grad():
        layer.weight.uniform_(-1 / math.sqrt(channels_in), 1 / math.sqrt(channels_in))
        if bias:
            layer.bias.zero_()
    return layer


def split_by_degree(x: Tensor, lmax: int) -> tuple[Tensor, ...]:
    """Cut [N, (L+1)², C] into [N, 2l+1, C] for each degree."""
    return x.split([2 * degree + 1 for degree in range(lmax + 1)], dim=1)


def add_to_scalars(x: Tensor, scalars: Tensor) -> Tensor:
    """Add [N, C] to the first coefficient (l = 0) of [N, K, C]."""
    return torch.cat([x[:, :1] + scalars[:, None], x[:, 1:]], dim=1)


def mix_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Apply one matrix [L+1, C_out, C_in] for each degree to [N, (L+1)², C_in]."""
    parts = split_by_degree(x, len(weight) - 1)
    mixed = [part @ matrix.T for part, matrix in zip(parts, weight, strict=True)]
    return torch.cat(mixed, dim=1)


class SO3Linear(nn.Module):
    """Mix channels with one matrix for each degree, and a bias for l = 0."""

    def __init__(self, lmax: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels_in)
        weight = torch.empty(lmax + 1, channels_out, channels_in).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, (L+1)², C_in] to [N, (L+1)², C_out]."""
        mixed = mix_channels(x, self.weight)
        return add_to_scalars(mixed, self.bias.expand(x.shape[0], -1))


class MergedLayerNorm(nn.Module):
    """Divide all degrees by one common root mean square, l = 0 centred over channels first.

    y_l = x_l · (v + ε)^(−1/2) · weight_l with v = mean over l of the mean over (m, c) of x_l²
    (EquiformerV3, arXiv 2604.09130); then a bias on l = 0.
    """

    def __init__(self, lmax: int, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.lmax, self.epsilon = lmax, epsilon
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, (L+1)², C] to the same shape."""
        scalars, *rest = split_by_degree(x, self.lmax)
        parts = [scalars - scalars.mean(dim=2, keepdim=True), *rest]
        means = [part.square().mean(dim=(1, 2)) for part in parts]
        scale = (torch.stack(means).mean(0) + self.epsilon).rsqrt()[:, None, None]
        normal = [part * (scale * weight) for part, weight in zip(parts, self.weight, strict=True)]
        normal[0] = normal[0] + self.bias
        return torch.cat(normal, dim=1)
