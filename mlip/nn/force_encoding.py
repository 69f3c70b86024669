"""Encoding of known forces for denoising of non-equilibrium structures (DeNS)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlip.so3 import spherical_harmonics


def encode_forces(forces: Tensor, lmax: int) -> Tensor:
    """Expand forces in spherical harmonics: |f|/√3 · Y(f/|f|), whose l = 1 part is f itself.

    After DeNS (Liao et al., arXiv 2403.09549, eq. 6).

    Args:
        forces: [N, 3] eV/Å; zero forces give zeros.
        lmax: highest degree.

    Returns:
        [N, (lmax+1)²].
    """
    size = torch.linalg.vector_norm(forces, dim=1, keepdim=True)
    return spherical_harmonics(lmax, forces) * (size / math.sqrt(3))
