"""Linear maps, normalisation and gates that act on each degree of equivariant features.

Features are a tuple with one tensor [N, 2l+1, C_l] for each degree; C_l may be zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlip.ops import Features

EPSILON = 1e-6
SILU_NORM = 0.5964586854233045  # root mean square of silu over 1,000,001 normal quantiles
SHIFTED_SOFTPLUS_NORM = 0.5331546468474913  # likewise of softplus(x) − ln 2


class EquivariantLinear(nn.Module):
    """Mix the channels of each degree: out = x · W_l / √(fan-in); absent degrees give zeros."""

    def __init__(self, channels_in: Sequence[int], channels_out: Sequence[int]) -> None:
        super().__init__()
        self.channels_in = tuple(channels_in)
        self.channels_out = tuple(channels_out)
        padded = (*self.channels_in, *[0] * len(self.channels_out))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(padded[degree], n_out))
            for degree, n_out in enumerate(self.channels_out)
        )

    def forward(self, x: Features) -> Features:
        """Map [N, 2l+1, channels_in[l]] to [N, 2l+1, channels_out[l]] for each output degree."""
        return tuple(
            x[degree] @ (weight / math.sqrt(weight.shape[0]))
            if weight.shape[0]
            else x[0].new_zeros(x[0].shape[0], 2 * degree + 1, weight.shape[1])
            for degree, weight in enumerate(self.weights)
        )


def pad_or_truncate(x: Features, channels: Sequence[int]) -> Features:
    """Copy the first channels of each degree and fill missing ones with zeros."""
    out = []
    for degree, n_out in enumerate(channels):
        if degree < len(x):
            part = x[degree][:, :, :n_out]
            out.append(nn.functional.pad(part, (0, n_out - part.shape[2])))
        else:
            out.append(x[0].new_zeros(x[0].shape[0], 2 * degree + 1, n_out))
    return tuple(out)


def add(x: Features, y: Features) -> Features:
    """Add two feature tuples of the same shape."""
    return tuple(a + b for a, b in zip(x, y, strict=True))


class ChannelGain(nn.Module):
    """Multiply each channel of each degree by a learnable factor."""

    def __init__(self, channels: Sequence[int], initial: float) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.gain = nn.Parameter(torch.full((sum(channels),), initial))

    def forward(self, x: Features) -> Features:
        """Scale [N, 2l+1, C_l] for each degree."""
        gains = self.gain.split(self.channels)
        return tuple(part * gain for part, gain in zip(x, gains, strict=True))


def equivariant_layer_norm(x: Features) -> Features:
    """Normalise scalars over channels, and all higher degrees by one common root mean square.

    The published form: ε enters twice, √(mean + ε) + ε.
    """
    scalars = x[0]
    out = []
    if scalars.shape[2]:
        centred = scalars - scalars.mean(dim=(1, 2), keepdim=True)
        variance = centred.square().mean(dim=(1, 2), keepdim=True)
        out.append(centred / (torch.sqrt(variance + EPSILON) + EPSILON))
    else:
        out.append(scalars)
    if len(x) > 1:
        count = sum(part.shape[1] * part.shape[2] for part in x[1:])
        total = torch.stack([part.square().sum(dim=(1, 2)) for part in x[1:]]).sum(0)
        scale = 1 / (torch.sqrt(total / count + EPSILON) + EPSILON)
        out.extend(part * scale[:, None, None] for part in x[1:])
    return tuple(out)


def normalized_silu(x: Tensor) -> Tensor:
    """Apply silu scaled to unit second moment for normal input."""
    return nn.functional.silu(x) / SILU_NORM


def normalized_shifted_softplus(x: Tensor) -> Tensor:
    """Apply softplus(x) − ln 2 scaled to unit second moment for normal input."""
    return (nn.functional.softplus(x) - math.log(2.0)) / SHIFTED_SOFTPLUS_NORM


def gate(x: Features, channels: Sequence[int]) -> Features:
    """Apply silu to scalars and multiply higher degrees by gates (normalised silu of scalars).

    Args:
        x: [N, 2l+1, C_l]; degree 0 holds ``channels[0]`` features and then one gate for each
            channel of each higher degree, degree by degree.
        channels: output channels C_l.
    """
    activated = normalized_silu(x[0])
    pieces = activated.split([channels[0], *channels[1:]], dim=2)
    return (pieces[0], *(part * g for part, g in zip(x[1:], pieces[1:], strict=True)))
