"""Ziegler–Biersack–Littmark screened nuclear repulsion at short distance."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.data import covalent_radii
from numpy.typing import NDArray
from torch import Tensor, nn

from mlip.nn.radial import polynomial_envelope
from mlip.ops import default_backend, segment_sum
from mlip.ops.backend import CHECK_EDGES, compare, tracing, use_kernel

if TYPE_CHECKING:
    from mlip.ops.cpu.screened_pairs import Law

COULOMB = 14.399645478425668  # e²/(4π ε0) in eV Å (CODATA 2018)
BOHR = 0.529177210903  # Å
SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
ENVELOPE_ORDER = 6


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
        self.register_buffer("radii", torch.from_numpy(_radii()), persistent=False)

    def forward(
        self, numbers: Tensor, edge_vector: Tensor, edge_index: Tensor, *, inference: bool = False
    ) -> Tensor:
        """Compute the repulsion energy of each atom, half of each pair.

        Args:
            numbers: [N] atomic numbers.
            edge_vector: [E, 3] Å.
            edge_index: [2, E].
            inference: nobody asks for second derivatives; a compiled loop may run on the CPU.

        Returns:
            [N] eV in the dtype of ``edge_vector``.
        """
        use = inference and self._use_kernel(numbers, edge_vector, edge_index)
        function = self._kernel if use else self._definition
        return function(numbers, edge_vector, edge_index)

    def _definition(self, numbers: Tensor, edge_vector: Tensor, edge_index: Tensor) -> Tensor:
        z_source, z_target = numbers[edge_index[0]], numbers[edge_index[1]]
        reach = (self.radii[z_source] + self.radii[z_target]).clamp(max=self.cutoff).to(edge_vector)
        near = torch.nonzero(edge_vector.detach().square().sum(1) < reach**2)[:, 0]
        z_i, z_j = z_source[near].to(edge_vector), z_target[near].to(edge_vector)
        distance = torch.linalg.vector_norm(edge_vector[near], dim=1)
        scaled = distance * (z_i**0.23 + z_j**0.23) / (0.8854 * BOHR)
        screening = torch.stack([c * torch.exp(-d * scaled) for c, d in SCREENING]).sum(0)
        pair = COULOMB * z_i * z_j / distance * screening
        pair = pair * polynomial_envelope(distance / reach[near], ENVELOPE_ORDER)
        return segment_sum(0.5 * pair, edge_index[1][near], numbers.shape[0])

    def _kernel(self, numbers: Tensor, edge_vector: Tensor, edge_index: Tensor) -> Tensor:
        from mlip.ops.cpu.screened_pairs import ScreenedPairs

        given = (_law(self.cutoff), numbers, edge_index, edge_vector)
        energies: Tensor = ScreenedPairs.apply(*given)  # type: ignore[no-untyped-call]
        return energies

    def _use_kernel(self, numbers: Tensor, edge_vector: Tensor, edge_index: Tensor) -> bool:
        if default_backend() == "torch" or tracing() or not len(edge_vector):
            return False

        def check() -> tuple[float, float]:
            some = edge_vector[:CHECK_EDGES]
            shorter = torch.linspace(0.1, 1.0, len(some)).to(some)[:, None]  # repulsion is not 0
            with torch.inference_mode(False):  # tensors made in that mode cannot be saved
                atoms, index = numbers.clone(), edge_index[:, :CHECK_EDGES].clone()
            return compare(
                lambda vectors: (self._definition(atoms, vectors, index),),
                lambda vectors: (self._kernel(atoms, vectors, index),),
                [some * shorter],
            )

        return use_kernel(
            "auto", "ZBL repulsion", [edge_vector], check, cuda="it is written for processors"
        )


def _radii() -> NDArray[np.float64]:
    """Covalent radius of each atomic number, Å."""
    return np.nan_to_num(covalent_radii, nan=1.5)


@cache
def _law(cutoff: float) -> Law:
    """The same energy as the compiled loop takes it: charges have half of e²/(4π ε0) in them."""
    from mlip.ops.cpu.screened_pairs import Law

    z = np.arange(len(covalent_radii))
    charge, per_length = math.sqrt(COULOMB / 2) * z, z**0.23 / (0.8854 * BOHR)
    atoms = np.stack([charge, per_length, _radii()], axis=1)
    return Law(atoms, np.array(SCREENING), cutoff, ENVELOPE_ORDER)
