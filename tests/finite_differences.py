"""What checks of models share: predictions, turned and strained copies, numerical derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms

from mlip.graph import atoms_to_graph, batch_graphs
from mlip.potential import Potential

STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))  # fourth-order first derivative
STRAINS = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]


class Result(NamedTuple):
    """Energy, energies [N], forces [N, 3], stress [3, 3] of one structure, as numpy."""

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray


def evaluate(potential: Potential, structures: Atoms | Sequence[Atoms]) -> Any:
    """Predict one structure, or several in one batch (then a list of results)."""
    several = not isinstance(structures, Atoms)
    frames = list(structures) if several else [structures]
    graphs = [atoms_to_graph(atoms, potential.cutoff) for atoms in frames]
    p = potential(batch_graphs(graphs) if several else graphs[0])
    ends = np.cumsum([len(atoms) for atoms in frames])[:-1]
    energies = np.split(p.energies.detach().numpy(), ends)
    forces = np.split(p.forces.detach().numpy(), ends)
    results = [
        Result(float(p.energy[k]), energies[k], forces[k], p.stress[k].detach().numpy())
        for k in range(len(frames))
    ]
    return results if several else results[0]


def close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Compare to an absolute tolerance; NaN only equals NaN."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=what)


def transformed(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    """Rotate (or invert) positions and cell."""
    copied = atoms.copy()
    copied.set_cell(atoms.cell.array @ matrix.T)
    copied.positions = atoms.positions @ matrix.T
    return copied


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    """Deform positions and cell by 1 + strain."""
    copied = atoms.copy()
    copied.set_cell(atoms.cell.array @ (np.eye(3) + strain).T, scale_atoms=False)
    copied.positions = atoms.positions @ (np.eye(3) + strain).T
    return copied


def rotation(seed: int) -> np.ndarray:
    """Draw a proper rotation."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def derivative(values: np.ndarray, step: float) -> np.ndarray:
    """Difference values [..., 4] at the points of STENCIL."""
    return values @ np.array([weight for _, weight in STENCIL]) / step


def displaced(atoms: Atoms, step: float) -> list[Atoms]:
    """Move each coordinate to the points of STENCIL, 12 copies for each atom."""
    frames = []
    for index in np.ndindex(len(atoms), 3):
        for offset, _ in STENCIL:
            frames.append(atoms.copy())
            frames[-1].positions[index] += offset * step
    return frames


def numerical_forces(potential: Potential, atoms: Atoms, step: float) -> np.ndarray:
    """Compute forces [N, 3] from energies alone."""
    results = evaluate(potential, displaced(atoms, step))
    energies = np.array([result.energy for result in results])
    return -derivative(energies.reshape(-1, 3, 4), step)


def numerical_stress(potential: Potential, atoms: Atoms, step: float) -> np.ndarray:
    """Compute the stresses of STRAINS [6] from energies alone."""
    frames = []
    for i, j in STRAINS:
        for offset, _ in STENCIL:
            strain = np.zeros((3, 3))
            strain[i, j] += offset * step / 2
            strain[j, i] += offset * step / 2
            frames.append(strained(atoms, strain))
    energies = np.array([result.energy for result in evaluate(potential, frames)])
    return derivative(energies.reshape(6, 4), step) / atoms.get_volume()


def autograd_hessian(potential: Potential, atoms: Atoms) -> np.ndarray:
    """Differentiate forces once more: [3N, 3N]."""
    graph = atoms_to_graph(atoms, potential.cutoff)
    graph.positions.requires_grad_(True)
    forces = potential(graph, stress=False, create_graph=True).forces.flatten()
    rows = [torch.autograd.grad(f, graph.positions, retain_graph=True)[0] for f in forces]
    return -torch.stack(rows).flatten(1).numpy()
