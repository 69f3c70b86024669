"""Turned, moved and renumbered structures have the same energy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip.graph import atoms_to_graph
from mlip.potential import Potential
from tests.contract.base import Contract, cluster, crystal, slab
from tests.finite_differences import close, evaluate, rotation, transformed


class Symmetry(Contract):
    """Rotations, translations, permutations and what follows from them."""

    @pytest.mark.parametrize("make", [crystal, cluster, lambda: slab(6.0)])
    def test_rotation_and_inversion(self, potential: Potential, make: Callable[[], Atoms]) -> None:
        atoms = make()
        matrices = [rotation(1), rotation(2), np.eye(3)[[1, 2, 0]]]
        if self.inversion:
            matrices += [-np.eye(3), -rotation(4)]
        start = evaluate(potential, atoms)
        for q in matrices:
            turned = evaluate(potential, transformed(atoms, q))
            close(turned.energies, start.energies, self.rotation_tolerance)
            close(turned.forces, start.forces @ q.T, self.rotation_tolerance)
            close(turned.stress, q @ start.stress @ q.T, self.rotation_tolerance)

    def test_bonds_along_the_axes_are_no_special_case(self, potential: Potential) -> None:
        """Poles of the harmonics: energy, force and its derivative as in any direction."""
        length = 0.55 * potential.cutoff
        expected = None
        for bond in [rotation(7)[0], *np.eye(3), *-np.eye(3)]:
            atoms = Atoms("NaCl", positions=[[0, 0, 0], bond * length])
            graph = atoms_to_graph(atoms, potential.cutoff)
            graph.positions.requires_grad_(True)
            prediction = potential(graph, create_graph=True)
            (curvature,) = torch.autograd.grad(prediction.forces.square().sum(), graph.positions)
            forces = prediction.forces.detach().numpy()
            close(forces, forces @ np.outer(bond, bond), self.rotation_tolerance, "not along bond")
            found = [prediction.energy.item(), forces[1] @ bond, curvature[1].numpy() @ bond]
            expected = expected or found
            close(found, expected, self.rotation_tolerance, f"bond along {bond}")

    def test_perfect_rock_salt_keeps_its_symmetry(self, potential: Potential) -> None:
        atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
        quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
        for frame in (atoms, transformed(atoms, quarter), transformed(atoms, rotation(8))):
            result = evaluate(potential, frame)
            close(result.forces, 0.0, self.rotation_tolerance)
            pressure = np.trace(result.stress) / 3
            close(result.stress, pressure * np.eye(3), self.rotation_tolerance)

    @pytest.mark.parametrize("make", [crystal, cluster, lambda: slab(6.0)])
    def test_translation_and_wrapped_images(
        self, potential: Potential, make: Callable[[], Atoms]
    ) -> None:
        atoms = make()
        start = evaluate(potential, atoms)
        moved = atoms.copy()
        images = np.random.default_rng(9).integers(-2, 3, (len(atoms), 3)) * atoms.pbc
        moved.positions += images @ atoms.cell.array + [3.1, -7.3, 0.77]
        result = evaluate(potential, moved)
        close(result.energies, start.energies, 1e-10)
        close(result.forces, start.forces, 1e-10)
        close(result.stress, start.stress, 1e-10)

    def test_permutation_of_atoms(self, potential: Potential) -> None:
        for atoms in (crystal(), cluster()):
            order = np.random.default_rng(10).permutation(len(atoms))
            start, shuffled = evaluate(potential, [atoms, atoms[order]])
            close(shuffled.energies, start.energies[order], 1e-10)
            close(shuffled.forces, start.forces[order], 1e-10)
            close(shuffled.stress, start.stress, 1e-10)

    def test_permutation_of_the_edges_of_a_target(self, potential: Potential) -> None:
        graph = atoms_to_graph(crystal(), potential.cutoff)
        noise = torch.rand(graph.edge_index.shape[1], generator=torch.Generator().manual_seed(1))
        order = torch.argsort(graph.edge_index[1] + 0.9 * noise)
        shuffled = copy.copy(graph)
        shuffled.edge_index = graph.edge_index[:, order]
        shuffled.edge_shift = graph.edge_shift[order]
        for a, b in zip(potential(graph), potential(shuffled), strict=True):
            close(b, a, 1e-10)

    def test_no_net_force_no_torque_and_symmetric_stress(self, potential: Potential) -> None:
        for atoms in (crystal(), cluster(), slab(6.0)):
            result = evaluate(potential, atoms)
            close(result.forces.sum(0), 0.0, 1e-10, "net force")
            close(result.stress, result.stress.T, 1e-10)
            assert np.isnan(result.stress).all() == (not atoms.pbc.all())
        atoms = cluster()
        torque = np.cross(atoms.positions, evaluate(potential, atoms).forces).sum(0)
        close(torque, 0.0, self.rotation_tolerance, "torque")
