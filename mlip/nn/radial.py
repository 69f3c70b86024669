"""Radial functions and cutoff envelopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def polynomial_envelope(x: Tensor, p: int) -> Tensor:
    """Evaluate the polynomial envelope, twice continuously differentiable at the cutoff.

    1 − (p+1)(p+2)/2 x^p + p(p+2) x^{p+1} − p(p+1)/2 x^{p+2} for x < 1 (Gasteiger et al.,
    arXiv 2003.03123, eq. 8): value, first and second derivative vanish at the cutoff and the
    first p − 1 derivatives vanish at x = 0.

    Args:
        x: distance / cutoff, any shape, not negative.
        p: order, at least 3.
    """
    x = x.clamp(max=1.0)
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    return 1 + x**p * (a + x * (b + x * c))


def exponential_envelope(distance: Tensor, cutoff: Tensor, start: float, c: float) -> Tensor:
    """Evaluate the envelope of the published Facet: once continuously differentiable.

    With t = (r − s R)/(R − s R) clipped to [0, 1] and
    h(u) = expm1(c u)/expm1(c) · u² · sin(π u/2): 1 − h(2t)/2 below t = ½, h(2 − 2t)/2 above.

    Args:
        distance: [E] Å.
        cutoff: R, scalar tensor, Å.
        start: s, where the decay starts as a fraction of R.
        c: curvature.
    """
    begin = start * cutoff
    t = ((distance - begin) / (cutoff - begin)).clamp(0.0, 1.0)
    rising = t < 0.5
    u = torch.where(rising, 2 * t, 2 - 2 * t)
    h = torch.expm1(c * u) / math.expm1(c) * u**2 * torch.sin(0.5 * math.pi * u)
    return torch.where(rising, 1 - 0.5 * h, 0.5 * h)


def xplor_envelope(distance: Tensor, cutoff: Tensor, start: float) -> Tensor:
    """Evaluate the XPLOR switching function, once continuously differentiable.

    Args:
        distance: [E] Å.
        cutoff: R, scalar tensor, Å.
        start: where the decay starts as a fraction of R.
    """
    r2, stop2 = distance**2, cutoff**2
    start2 = (start * cutoff) ** 2
    decay = (stop2 - r2) ** 2 * (stop2 + 2 * r2 - 3 * start2) / (stop2 - start2) ** 3
    inside = torch.where(r2 < start2, torch.ones_like(decay), decay)
    return torch.where(r2 < stop2, inside, torch.zeros_like(decay))


class SineBasis(nn.Module):
    """Sine functions sin(f_n r)/r with learnable frequencies f_n (rad/Å)."""

    def __init__(self, frequencies: list[float]) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.tensor(frequencies))

    def forward(self, distance: Tensor) -> Tensor:
        """Map [E] distances (Å) to [E, R]."""
        phase = distance[:, None] * self.frequencies
        return torch.sin(phase) / distance[:, None]


class GaussianBasis(nn.Module):
    """Gaussians of one learnable width around learnable centres (Å)."""

    def __init__(self, n: int, stop: float, width: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(0.0, stop, n))
        self.width = nn.Parameter(torch.tensor([width]))

    def forward(self, distance: Tensor) -> Tensor:
        """Map [E] distances (Å) to [E, R]."""
        return torch.exp(-((distance[:, None] - self.centres) ** 2) / (2 * self.width**2))


def uniform_gaussians(distance: Tensor, n: int, cutoff: float) -> Tensor:
    """Evaluate Gaussians around n centres from 0 to the cutoff, two spacings wide.

    exp(−½ ((d − μ_k) / (2h))²) with μ_k = k h and h = cutoff/(n − 1); not normalised.

    Args:
        distance: [E] Å.
        n: number of centres, 2 or more.
        cutoff: Å.

    Returns:
        [E, n].
    """
    centres = torch.arange(n, dtype=distance.dtype, device=distance.device)
    offset = (distance * ((n - 1) / cutoff))[:, None] - centres
    return torch.exp(-0.125 * offset.square())
