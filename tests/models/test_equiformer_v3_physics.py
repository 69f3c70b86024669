"""EquiformerV3 in gradient mode where its own construction is delicate.

Poles of the edge frames (±y and the cone of 1.4 mrad around it that the published code freezes), a
softmax over few neighbours near the cutoff, edges along the axes by symmetry. What holds for every
model is in test_contract.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

from mlip.graph import atoms_to_graph, batch_graphs, edge_vectors
from mlip.nn.edge_frames import POLE
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator
from tests.finite_differences import (
    STRAINS,
    autograd_hessian,
    close,
    evaluate,
    numerical_forces,
    numerical_stress,
    rotation,
)
from tests.models.test_equiformer_v3 import small_potential

CONE = float(np.arccos(POLE))  # rad


def rough_potential(**changes) -> Potential:
    """Random weights, biases and embeddings of elements on edges included; forces of 1 eV/Å."""
    model = small_potential(**changes).model
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator).to(weight)
    plain = Potential(model)
    return Potential(model, scale=1 / np.abs(evaluate(plain, tilted(0.3)).forces).max())


def tilted(angle: float) -> Atoms:
    """A molecule with one bond at an angle (rad) to y, in a direction of no symmetry."""
    bond = 2.4 * np.array([0.6 * np.sin(angle), np.cos(angle), 0.8 * np.sin(angle)])
    positions = [[0, 0, 0], bond, [1.9, -0.6, 0.8], [1.1, 1.4, -1.3], [-1.2, 0.9, 1.7]]
    return Atoms("NaClCu2Cl", positions=positions)


def box() -> Atoms:
    """Two atoms without symmetry, each its own neighbour along the axes, ±y among them."""
    return Atoms("CuNa", [[0, 0, 0], [1.1, 0.9, 1.6]], cell=np.diag([2.6, 2.8, 2.5]), pbc=True)


@pytest.fixture(scope="module")
def potential() -> Potential:
    return rough_potential()


@pytest.fixture(scope="module")
def published() -> Potential:
    return rough_potential(published=True)


# Poles


# Steps leave the cone (3.4e-3 Å for this bond) or stay within it.
@pytest.mark.parametrize("step", [1e-2, 2e-4])
@pytest.mark.parametrize("angle", [0.0, 0.3 * CONE, 1.1 * CONE, np.pi, np.pi - 0.3 * CONE])
def test_forces_near_the_poles_are_minus_the_gradient(potential, angle, step):
    found = evaluate(potential, tilted(angle)).forces
    close(numerical_forces(potential, tilted(angle), step), found, 2e-7)


def test_stress_of_edges_on_the_axes_is_the_strain_derivative(potential):
    """Shear turns the edges on ±y, so their derivative by direction matters."""
    atoms = box()
    expected = numerical_stress(potential, atoms, 2e-3)
    stress = evaluate(potential, atoms).stress
    close([stress[i, j] for i, j in STRAINS], expected, 1e-7)
    close(evaluate(potential, atoms.repeat(2)).stress, stress, 1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.5 * CONE, np.pi])
def test_hessian_near_the_poles(potential, angle):
    """Symmetric, and equal to that of the turned molecule, whose bonds are far from the poles."""
    found, q = autograd_hessian(potential, tilted(angle)), rotation(4)
    other = tilted(angle)
    other.positions = other.positions @ q.T
    turn = np.kron(np.eye(len(other)), q)
    close(found, found.T, 1e-11)
    close(turn @ found @ turn.T, autograd_hessian(potential, other), 1e-10)


def test_single_precision_is_as_good_at_the_poles_as_elsewhere(potential):
    """The published angles lose up to 1e-2 eV/Å of 3 there."""
    single = copy.deepcopy(potential).to_dtype(torch.float32)

    def noise(angle: float) -> float:
        frames = [tilted(angle * factor) for factor in np.linspace(0.9, 1.1, 8)]
        pairs = zip(evaluate(single, frames), evaluate(potential, frames), strict=True)
        return max(np.abs(a.forces - b.forces).max() for a, b in pairs)

    elsewhere = noise(0.8)
    assert 0 < elsewhere < 1e-5
    for angle in (0.0, 1e-7, 1e-4, 1e-3, 1.5e-3, 5e-3, 5e-2, np.pi - 1e-3):
        assert noise(angle) < 3 * elsewhere


# The published treatment of the poles


def frozen_forces(potential: Potential, atoms: Atoms) -> tuple[float, torch.Tensor]:
    """Energy and forces of the exact model with the bond near ±y put on the axis beforehand."""
    graph = atoms_to_graph(atoms, potential.cutoff)
    graph.positions.requires_grad_(True)
    vectors = edge_vectors(graph)
    length = vectors.norm(dim=1)
    cosine = (vectors[:, 1] / length).detach()
    axis = torch.zeros_like(vectors)
    axis[:, 1] = cosine.sign()
    near = (cosine.abs() > np.cos(CONE))[:, None]
    assert int(near.sum()) == 2
    graph.edge_vector = torch.where(near, axis * length[:, None], vectors)
    energy = potential.model(graph).sum() * potential.scale[29]
    return energy.item(), -torch.autograd.grad(energy, graph.positions)[0]


@pytest.mark.parametrize("angle", [0.0, 0.5 * CONE, np.pi - 0.5 * CONE])
def test_published_setting_puts_directions_on_the_axis(potential, published, angle):
    energy, forces = frozen_forces(potential, tilted(angle))
    found = evaluate(published, tilted(angle))
    assert found.energy == pytest.approx(energy, abs=1e-12)
    close(found.forces, forces.numpy(), 1e-12)
    assert np.abs(found.forces - evaluate(potential, tilted(angle)).forces).max() > 1e-3


def test_published_energy_jumps_at_the_cone(potential, published):
    edge = [tilted(CONE * (1 + sign * 1e-6)) for sign in (-1, 1)]
    inside, outside = (result.energy for result in evaluate(published, edge))
    assert abs(inside - outside) > 1e-5
    inside, outside = (result.energy for result in evaluate(potential, edge))
    assert abs(inside - outside) < 1e-8


def energy_range_of_a_rotor(potential: Potential, timestep_fs: float) -> float:
    """Largest change of the total energy while the bond near y turns through the pole, eV."""
    atoms = tilted(-4 * CONE)
    spin = 2e-3 / units.fs * np.array([0.8, 0.0, -0.6])  # the bond moves from one side to the other
    atoms.set_velocities(np.cross(spin, atoms.positions - atoms.get_center_of_mass()))
    atoms.calc = Calculator(potential)
    dynamics = VelocityVerlet(atoms, timestep_fs * units.fs)
    energies = []
    for _ in range(round(6 / timestep_fs)):
        energies.append(atoms.get_total_energy())
        dynamics.run(1)
    return float(np.ptp(energies))


def test_dynamics_through_the_pole_conserve_energy(potential, published):
    """The error falls as the square of the time step; not in the published setting."""
    coarse, fine = (energy_range_of_a_rotor(potential, step) for step in (0.5, 0.25))
    assert 3 < coarse / fine < 5
    jumps = energy_range_of_a_rotor(published, 0.25)
    assert jumps > 10 * fine


# Softmax over few neighbours near the cutoff


def pair(distance: float) -> Atoms:
    """Two atoms that have only each other."""
    return Atoms("NaCl", positions=[[0, 0, 0], rotation(7)[0] * distance])


def ring(distance: float) -> Atoms:
    """Three atoms whose bonds reach the cutoff together."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0.5, np.sqrt(0.75), 0]])
    return Atoms("NaClCu", positions=distance * corners @ rotation(7).T)


def unequal(distance: float) -> Atoms:
    """An atom whose only two neighbours leave shortly one after the other."""
    a, b, _ = rotation(7)
    other = (0.6 * b - 0.8 * a) * 1.0001
    return Atoms("NaClCu", positions=[[0, 0, 0], a * distance, other * distance])


def lattice(distance: float) -> Atoms:
    """All twelve neighbours of an atom leave together."""
    return bulk("Cu", a=distance * np.sqrt(2))


def along(potential: Potential, make: Callable[[float], Atoms], distance: float) -> list[float]:
    """Energy and its first and second derivative by the distance, by autograd."""
    start = make(distance)
    graph = atoms_to_graph(start, potential.cutoff)
    size = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    graph.positions, graph.cell = graph.positions * size, graph.cell * size
    energy = potential(graph, forces=False, stress=False).energy.sum()
    if not energy.requires_grad:
        return [energy.item(), 0.0, 0.0]
    (slope,) = torch.autograd.grad(energy, size, create_graph=True)
    curvature = torch.autograd.grad(slope, size)[0] if slope.requires_grad else slope
    return [energy.item(), slope.item() / distance, curvature.item() / distance**2]


@pytest.mark.parametrize("epsilon", [1e-16, 1e-8])
@pytest.mark.parametrize("make", [pair, ring, unequal, lattice])
def test_the_last_neighbours_leave_smoothly(make, epsilon):
    """The softmax gives a lone neighbour full weight up to the end: the outer envelope ends it."""
    potential = rough_potential(attention_epsilon=epsilon)
    cutoff = potential.cutoff
    far = along(potential, make, cutoff + 1e-9)
    gone = along(potential, make, 3 * cutoff)
    close(far, gone, 1e-12)
    close(gone[1:], 0.0, 0.0)
    previous = np.inf
    for gap in (1e-2, 1e-3, 1e-4):  # E ~ gap³, force ~ gap², its derivative ~ gap
        energy, slope, curvature = np.abs(np.subtract(along(potential, make, cutoff - gap), gone))
        assert energy < 30 * gap**3
        assert slope < 100 * gap**2
        assert curvature < 200 * gap
        assert 0 < energy < previous
        previous = energy


def test_forces_of_the_last_neighbour_are_derivatives(potential):
    for distance in (potential.cutoff - 0.3, potential.cutoff - 0.02):
        for make in (pair, unequal):
            found = evaluate(potential, make(distance)).forces
            close(numerical_forces(potential, make(distance), 1e-4), found, 1e-8)


# Edge sets of different sizes side by side


def test_delicate_structures_share_a_batch(potential):
    """Without edges, on the axes, near the pole: the same numbers alone and together."""
    graphs = [Atoms("Na"), box(), tilted(0.5 * CONE), pair(4.19), Atoms("Cl"), ring(9.0)]
    for atoms, result in zip(graphs, evaluate(potential, graphs), strict=True):
        alone = evaluate(potential, atoms)
        close(result.energies, alone.energies, 1e-12)
        close(result.forces, alone.forces, 1e-12)
        close(result.stress, alone.stress, 1e-12)
    empty = batch_graphs([atoms_to_graph(atoms, potential.cutoff) for atoms in graphs[::4]])
    assert empty.edge_index.shape[1] == 0
    assert torch.isfinite(potential(empty).energy).all()
