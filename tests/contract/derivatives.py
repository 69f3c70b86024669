"""Forces, stress and gradients of weights are derivatives, and the energy is smooth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from mlip.graph import atoms_to_graph, batch_graphs
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator
from tests.contract.base import Contract, cluster, crystal, slab
from tests.finite_differences import (
    STENCIL,
    STRAINS,
    autograd_hessian,
    close,
    derivative,
    displaced,
    evaluate,
    numerical_forces,
    numerical_stress,
)


class Derivatives(Contract):
    """Finite differences of energies and forces; smoothness at the cutoff."""

    @pytest.mark.parametrize("make", [crystal, cluster, lambda: slab(6.0)])
    def test_forces_are_minus_the_gradient(
        self, potential: Potential, make: Callable[[], Atoms]
    ) -> None:
        atoms = make()
        forces = evaluate(potential, atoms).forces
        close(numerical_forces(potential, atoms, 1e-3), forces, 1e-6 * np.abs(forces).max())

    @pytest.mark.parametrize("make", [crystal, lambda: bulk("Cu", a=3.4)])
    def test_stress_is_the_strain_derivative_per_volume(
        self, potential: Potential, make: Callable[[], Atoms]
    ) -> None:
        atoms = make()
        expected = numerical_stress(potential, atoms, 3e-4)
        stress = evaluate(potential, atoms).stress
        found = [stress[i, j] for i, j in STRAINS]
        close(found, expected, 1e-6 * np.abs(stress).max())

    def test_stress_equals_the_autograd_strain_derivative(self, potential: Potential) -> None:
        """Positions and cell are strained here, outside the potential."""
        frames = [crystal(), bulk("Cu", a=3.4)]
        graphs = [atoms_to_graph(atoms, potential.cutoff) for atoms in frames]
        graph = batch_graphs(graphs)
        strain = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
        deformation = torch.eye(3, dtype=torch.float64) + (strain + strain.mT) / 2
        graph.positions = torch.einsum("nij,nj->ni", deformation[graph.batch], graph.positions)
        graph.cell = graph.cell @ deformation.mT
        energy = potential(graph, forces=False, stress=False).energy.sum()
        (gradient,) = torch.autograd.grad(energy, strain)
        for k, result in enumerate(evaluate(potential, frames)):
            close(result.stress, gradient[k].numpy() / frames[k].get_volume(), 1e-10)

    def test_hessian_by_double_backward(self, potential: Potential) -> None:
        atoms = cluster()
        hessian, step = autograd_hessian(potential, atoms), 1e-3
        frames = displaced(atoms, step)
        shifted = np.array([r.forces.ravel() for r in evaluate(potential, frames)])
        expected = -derivative(np.moveaxis(shifted.reshape(len(hessian), 4, -1), 1, 2), step)
        close(hessian, expected.T, 1e-6 * np.abs(hessian).max())
        close(hessian, hessian.T, 1e-8 * max(1.0, np.abs(hessian).max()))
        close(hessian.reshape(len(hessian), -1, 3).sum(1), 0.0, 1e-6, "acoustic sum rule")

    def test_training_gradient_through_forces_and_stress(self, potential: Potential) -> None:
        """d(loss)/d(weights) against differences along a random direction of the weights."""
        model = copy.deepcopy(potential)
        frames = [crystal(), cluster()]
        graph = batch_graphs([atoms_to_graph(atoms, model.cutoff) for atoms in frames])

        def loss() -> torch.Tensor:
            p = model(graph, create_graph=True)
            return p.energy.square().sum() + p.forces.square().sum() + 1e3 * p.stress[0].norm()

        weights = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        generator = torch.Generator().manual_seed(2)
        direction = [
            torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device) for w in weights
        ]
        slope = sum(
            float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None
        )
        start, step, values = [w.detach().clone() for w in weights], 1e-4, []
        for offset, _ in STENCIL:
            with torch.no_grad():
                for w, w0, d in zip(weights, start, direction, strict=True):
                    w.copy_(w0 + offset * step * d)
            values.append(loss().item())
        assert derivative(np.array(values), step) == pytest.approx(slope, rel=1e-6)

    @pytest.mark.parametrize("bound", [False, True])
    def test_cutoff_crossing_is_smooth(self, potential: Potential, bound: bool) -> None:
        """E, F and dF/dr of an atom that leaves the last neighbour have no jump."""

        def state(distance: float) -> tuple[float, float, float]:
            out = np.array([-1.0, -1.0, -1.0]) / np.sqrt(3)
            atoms = Atoms("NaCuCl", positions=[[0, 0, 0], [2.3, 0, 0], [0, 2.2, 0.5]])
            atoms += Atoms("Cl", positions=[out * distance])
            if bound:
                atoms += Atoms("Cu", positions=[out * (distance + 2.2)])
            graph = atoms_to_graph(atoms, potential.cutoff)
            graph.positions.requires_grad_(True)
            direction = torch.zeros_like(graph.positions)
            direction[3:] = torch.from_numpy(out)
            prediction = potential(graph, stress=False, create_graph=True)
            force = (prediction.forces * direction).sum()
            slope = torch.zeros_like(direction)
            if force.requires_grad:
                slope = torch.autograd.grad(force, graph.positions, allow_unused=True)[0]
            along = 0.0 if slope is None else float((slope * direction).sum())
            return prediction.energy.item(), force.item(), along

        cutoff, near = potential.cutoff, 1e-6
        scan = np.array([state(cutoff + k * 1e-3) for k in range(-20, 4)])
        inside, outside = state(cutoff - near), state(cutoff + near)
        close(inside[0], outside[0], 1e-10, "energy jumps at the cutoff")
        close(inside[1], outside[1], 1e-10, "force jumps at the cutoff")
        close(inside[2], outside[2], 1e-4, "derivative of the force jumps at the cutoff")
        assert np.abs(np.diff(scan[:, 0], 2) / 1e-6).max() < 1e3
        assert np.abs(np.diff(scan[:, 2])).max() < 0.1

    def test_dynamics_conserve_energy(self, potential: Potential) -> None:
        """The fluctuation of the total energy falls as the square of the time step."""
        fluctuation = []
        for timestep_fs in (1.0, 2.0):
            atoms = crystal()
            atoms.calc = Calculator(potential)
            MaxwellBoltzmannDistribution(
                atoms, temperature_K=300, rng=np.random.default_rng(13), force_temp=True
            )
            energies = []
            dynamics = VelocityVerlet(atoms, timestep_fs * units.fs)
            for _ in range(int(60 / timestep_fs)):
                dynamics.run(1)
                energies.append(atoms.get_total_energy())
            fluctuation.append(np.std(energies))
        assert 3 < fluctuation[1] / fluctuation[0] < 5
