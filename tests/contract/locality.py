"""Atoms see what is within reach, whatever else is in the cell, the vacuum or the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip.errors import UnknownElementError
from mlip.graph import atoms_to_graph, batch_graphs
from mlip.potential import Potential
from tests.contract.base import Contract, cluster, crystal, slab
from tests.finite_differences import Result, close, evaluate


class Locality(Contract):
    """Extensivity, batches, reach, and structures at the edge of what is sensible."""

    @pytest.mark.parametrize("repeats", [(2, 1, 1), (2, 2, 2), (3, 4, 1)])
    def test_supercells_are_extensive(
        self, potential: Potential, repeats: tuple[int, int, int]
    ) -> None:
        atoms = bulk("NaCl", "rocksalt", a=5.4)
        atoms.rattle(0.15, seed=11)
        copies = int(np.prod(repeats))
        one, many = evaluate(potential, atoms), evaluate(potential, atoms.repeat(repeats))
        close(many.energy / copies, one.energy, 1e-10)
        close(many.energies, np.tile(one.energies, copies), 1e-10)
        close(many.forces, np.tile(one.forces, (copies, 1)), 1e-10)
        close(many.stress, one.stress, 1e-10)

    def test_distant_fragments_add(self, potential: Potential) -> None:
        one, other = cluster(), cluster()[[1, 3, 4]]
        for distance in (1.5 * self.layers * potential.cutoff + 8.0, 1e4):
            shifted = other.copy()
            shifted.positions += [distance, 0.3 * distance, 0]
            a, b, both = evaluate(potential, [one, other, one + shifted])
            close(both.energy, a.energy + b.energy, 1e-10)
            close(both.forces, np.concatenate([a.forces, b.forces]), 1e-10)

    def test_batch_equals_single(self, potential: Potential) -> None:
        lone = Atoms("Cu", cell=np.eye(3) * 40, pbc=True)
        frames = [crystal(), Atoms("Na"), cluster(), lone, slab(5.0), bulk("Cu", a=3.6)]
        for atoms, batched in zip(frames, evaluate(potential, frames), strict=True):
            single = evaluate(potential, atoms)
            assert np.isfinite(single.energy)
            for a, b, what in zip(batched, single, Result._fields, strict=True):
                close(a, b, 1e-10, what)

    def test_no_gradient_across_structures(self, potential: Potential) -> None:
        frames = [cluster(), crystal(), cluster()]
        graph = batch_graphs([atoms_to_graph(atoms, potential.cutoff) for atoms in frames])
        graph.positions.requires_grad_(True)
        energy = potential(graph, forces=False, stress=False).energy
        for k in range(len(frames)):
            (gradient,) = torch.autograd.grad(energy[k], graph.positions, retain_graph=True)
            assert not gradient[graph.batch != k].any()
            assert gradient[graph.batch == k].any()

    def test_receptive_field_is_exact(self, potential: Potential) -> None:
        """On a chain, an atom past layers × cutoff has no gradient at all; a neighbour has."""
        reach = self.layers * potential.cutoff
        spacing = 0.45 * potential.cutoff
        count = int(np.ceil(reach / spacing)) + 3
        rng = np.random.default_rng(12)
        positions = rng.uniform(-0.2, 0.2, (count, 3)) + np.arange(count)[:, None] * [spacing, 0, 0]
        atoms = Atoms(["Na", "Cl", "Cu"] * count, positions=np.zeros((3 * count, 3)))[:count]
        atoms.positions = positions
        distances = np.linalg.norm(positions - positions[0], axis=1)
        graph = atoms_to_graph(atoms, potential.cutoff)
        graph.positions.requires_grad_(True)
        energies = potential(graph, forces=False, stress=False).energies
        (gradient,) = torch.autograd.grad(energies[0], graph.positions)
        assert not gradient[distances > reach].any()
        assert gradient[1].abs().max() > 1e-6
        moved = atoms.copy()
        moved.positions[distances > reach + 0.3] += [0.11, 0.07, -0.05]
        close(evaluate(potential, moved).energies[0], energies[0].item(), 1e-13)

    def test_isolated_atoms_and_empty_edge_sets(self, potential: Potential) -> None:
        far = 1.5 * potential.cutoff
        lone = Atoms("Cu")
        pair = Atoms("Cu2", positions=[[0, 0, 0], [far, 0, 0]])
        boxed = Atoms("Cu", cell=np.eye(3) * far, pbc=True)
        for frames in ([lone], [pair], [boxed], [lone, pair, boxed, cluster()]):
            for atoms, result in zip(frames, evaluate(potential, frames), strict=True):
                if atoms.symbols[0] != "Cu":
                    continue
                assert np.isfinite(result.energies).all()
                close(result.energies, evaluate(potential, lone).energy, 1e-10)
                close(result.forces, 0.0, 0.0)
                close(result.stress, 0.0 if atoms.pbc.all() else np.nan, 0.0)

    def test_isolated_atoms_can_be_trained_on(self, potential: Potential) -> None:
        """No edges, yet a second backward pass exists and is finite."""
        model = copy.deepcopy(potential)
        prediction = model(atoms_to_graph(Atoms("Cu"), model.cutoff), create_graph=True)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("distance", [0.2, 0.01])
    def test_colliding_atoms_are_finite(self, potential: Potential, distance: float) -> None:
        atoms = cluster()
        atoms.positions[1] = atoms.positions[0] + [0, 0, distance]
        result = evaluate(potential, atoms)
        assert np.isfinite(result.energy)
        assert np.isfinite(result.forces).all()

    @pytest.mark.parametrize("kind", ["fcc", "bcc", "needle"])
    def test_tiny_cells_equal_their_supercell(self, potential: Potential, kind: str) -> None:
        if kind == "needle":
            cell = 4.4 * np.array([[1, 0, 0], [0.72, 0.694, 0], [0.72, 0.31, 0.62]])
            atoms = Atoms("NaCu", positions=[[0, 0, 0], [3.2, 1.4, 1.2]], cell=cell, pbc=True)
        else:
            atoms = bulk("Cu", kind, a=3.7 if kind == "fcc" else 3.0)
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + np.triu(np.full((3, 3), 0.03))))
        one, many = evaluate(potential, atoms), evaluate(potential, atoms.repeat(4))
        close(many.energy / 64, one.energy, 1e-10)
        close(many.forces, np.tile(one.forces, (64, 1)), 1e-10)
        close(many.stress, one.stress, 1e-10)

    def test_vacuum_of_a_slab_does_not_matter(self, potential: Potential) -> None:
        start = evaluate(potential, slab(2.0))
        frames = [slab(9.0), slab(2.0), slab(2.0), slab(2.0 * potential.cutoff)]
        frames[1].cell[2] = 0.0
        frames[2].cell[2] = [1.3, -0.4, 2.0]
        frames[3].pbc = True
        for result in evaluate(potential, frames):
            close(result.energy, start.energy, 1e-10)
            close(result.forces, start.forces, 1e-10)

    def test_unknown_elements_are_named(self, potential: Potential) -> None:
        graph = atoms_to_graph(Atoms("CuOX", positions=np.eye(3) * 3), potential.cutoff)
        with pytest.raises(UnknownElementError, match=r"O.*Na.*Cl.*Cu"):
            potential(graph)
