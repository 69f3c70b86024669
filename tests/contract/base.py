"""Structures, potential and settings that the checks of a model share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111

from mlip.models import create_model
from mlip.potential import Potential
from tests.finite_differences import evaluate

ELEMENTS = (11, 17, 29)
REFERENCES = {11: -0.7, 17: 0.4, 29: 1.1}


def crystal() -> Atoms:
    """Rattled, slightly sheared rock salt, 8 atoms."""
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.set_cell(atoms.cell @ (np.eye(3) + np.triu(np.full((3, 3), 0.02))), scale_atoms=True)
    atoms.rattle(0.12, seed=3)
    return atoms


def cluster() -> Atoms:
    """A molecule without symmetry."""
    positions = [[0, 0, 0], [2.1, 0.2, 0.1], [0.4, 1.9, -0.3], [-0.3, 0.6, 2.2], [1.8, 2.0, 1.1]]
    return Atoms("NaClCu2Cl", positions=positions)


def slab(vacuum: float) -> Atoms:
    """Two layers of copper, periodic in the plane."""
    atoms = fcc111("Cu", (1, 2, 2), a=3.7, vacuum=vacuum, orthogonal=True)
    atoms.rattle(0.05, seed=5)
    atoms.pbc = (True, True, False)
    return atoms


class Contract:
    """What all checks need of a model.

    Attributes:
        model: registered name and configuration without `elements`.
        layers: rounds of messages; the receptive field is layers × cutoff.
        inversion: whether mirror images have the same energy.
        rotation_tolerance: eV, eV/Å and eV/Å³.
        backend: what runs the operators; None for the choice of the environment.
        wrapper: the potential that is checked; one of another device gives results on the CPU.
    """

    model: tuple[str, dict[str, Any]]
    layers: int = 1
    inversion: bool = True
    rotation_tolerance: float = 1e-8
    backend: str | None = None
    wrapper: type[Potential] = Potential

    @pytest.fixture(autouse=True, scope="class")
    def _chosen_backend(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self.backend is not None:
                patch.setenv("MLIP_BACKEND", self.backend)
            yield

    def make_model(self) -> torch.nn.Module:
        """Build the model with random weights, always the same ones."""
        name, config = self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return create_model(name, {"elements": ELEMENTS, **config})

    def make_potential(self) -> Potential:
        """Wrap the model in a float64 potential whose forces are of order 1 eV/Å."""
        plain = Potential(self.make_model()).to_dtype(torch.float64).eval()
        forces = [np.abs(evaluate(plain, atoms).forces).max() for atoms in (crystal(), cluster())]
        scale = dict.fromkeys(ELEMENTS, 1.0 / max(forces))
        return self.wrapper(plain.model, reference_energies=REFERENCES, scale=scale).eval()

    @pytest.fixture(scope="class")
    def potential(self) -> Potential:
        """Share one potential among the checks."""
        return self.make_potential()
