"""Ziegler–Biersack–Littmark screened nuclear repulsion at short distance."""

from __future__ import annotations

import torch
from ase.data import covalent_radii
from torch import Tensor, nn

from mlip.nn.radial import polynomial_envelope
from mlip.ops import segment_sum

COULOMB = 14.399645478425668  # e²/(4π ε0) in eV Å (CODATA 2018)
BOHR = 0.529177210903  # Å
SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))


class ZBLRepulsion(nn.Module):
    """Universal ZBL pair energy, switched off smoothly at the sum of the covalent radii.

    E_ij = e²/(4π ε0) Z_i Z_j / r · Σ_k c_k exp(−d_k r/a), a = 0.8854 a0 / (Z_i^0.23 + Z_j^0.23)
    (Ziegler, Biersack and Littmark, 1985), times a C2 polynomial envelope.

    Args:
        cutoff: neighbour cutoff of the graphs, Å; the repulsion never reaches farther.
    """

    radii: Tensor

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        radii = torch.as_tensor(covalent_radii, dtype=torch.float64).nan_to_num(nan=1.5)
        self.register_buffer("radii", radii, persistent=False)

    def forward(self, numbers: Tensor, edge_vector: Tensor, edge_index: Tensor) -> Tensor:
        """Compute the repulsion energy of each atom, half of each pair.

        Args:
            numbers: [N] atomic numbers.
            edge_vector: [E, 3] Å.
            edge_index: [2, E].

        Returns:
            [N] eV in the dtype of ``edge_vector``.
        """
        z_source, z_target = numbers[edge_index[0]], numbers[edge_index[1]]
        reach = (self.radii[z_source] + self.radii[z_target]).clamp(max=self.cutoff).to(edge_vector)
        near = torch.nonzero(edge_vector.detach().square().sum(1) < reach**2)[:, 0]
        z_i, z_j = z_source[near].to(edge_vector), z_target[near].to(edge_vector)
        distance = torch.linalg.vector_norm(edge_vector[near], dim=1)
        scaled = distance * (z_i**0.23 + z_j**0.23) / (0.8854 * BOHR)
        screening = torch.stack([c * torch.exp(-d * scaled) for c, d in SCREENING]).sum(0)
        pair = COULOMB * z_i * z_j / distance * screening
        pair = pair * polynomial_envelope(distance / reach[near], 6)
        return segment_sum(0.5 * pair, edge_index[1][near], numbers.shape[0])
