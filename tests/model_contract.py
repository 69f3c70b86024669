"""The physics that every model must obey; a model joins with one subclass in tests/models.

All checks run in float64 on random weights, scaled so that forces are of order 1 eV/Å, through
`Potential`, and compare with finite differences, larger cells, rotated copies: never with stored
numbers. Lengths are multiples of the model's own cutoff where they must reach past it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from mlip.errors import UnknownElementError
from mlip.graph import AtomicGraph, atoms_to_graph, batch_graphs, edge_vectors
from mlip.models import create_model
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator
from tests.finite_differences import (
    STENCIL,
    STRAINS,
    Result,
    autograd_hessian,
    close,
    derivative,
    displaced,
    evaluate,
    numerical_forces,
    numerical_stress,
    rotation,
    transformed,
)

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


def global_state() -> tuple[Any, ...]:
    """Everything a model must leave alone."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),  # noqa: NPY002
        tuple(np.geterr().items()),
    )


class ModelContract:
    """Inherit and set `model` and `layers`; pytest then runs every check on the model.

    Attributes:
        model: registered name and configuration without `elements`.
        layers: rounds of messages; the receptive field is layers × cutoff.
        inversion: whether mirror images have the same energy.
        rotation_tolerance: eV, eV/Å and eV/Å³.
        backend: what runs the operators; None for the choice of the environment.
    """

    model: tuple[str, dict[str, Any]]
    layers: int = 1
    inversion: bool = True
    rotation_tolerance: float = 1e-8
    backend: str | None = None

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
        return Potential(plain.model, reference_energies=REFERENCES, scale=scale).eval()

    @pytest.fixture(scope="class")
    def potential(self) -> Potential:
        """Share one potential among the checks."""
        return self.make_potential()

    # Symmetry

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

    # Extensivity, batches, locality

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

    # Edge cases

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

    # Derivatives

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
        direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
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

    # Smoothness

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

    # Programs

    def test_save_and_load_give_the_same_bits(self, potential: Potential, tmp_path: Path) -> None:
        potential.save(tmp_path / "model.safetensors")
        loaded = Potential.load(tmp_path / "model.safetensors", dtype="float64")
        assert loaded.model_hash() == potential.model_hash()
        assert loaded.cutoff == potential.cutoff
        for a, b in zip(evaluate(loaded, crystal()), evaluate(potential, crystal()), strict=True):
            close(a, b, 0.0)

    def test_single_precision_is_close(self, potential: Potential) -> None:
        single = copy.deepcopy(potential).to_dtype(torch.float32)
        for atoms in (crystal(), cluster()):
            a, b = evaluate(single, atoms), evaluate(potential, atoms)
            close(a.energies, b.energies, 1e-4)
            close(a.forces, b.forces, 1e-3)
            close(a.stress, b.stress, 1e-4)
            assert a.forces.dtype == np.float64

    def test_same_input_same_bits(self, potential: Potential) -> None:
        first = evaluate(potential, [crystal(), cluster()])
        evaluate(potential, bulk("Cu", a=3.6))
        again = evaluate(potential, [crystal(), cluster()])
        for a, b in zip(first, again, strict=True):
            for x, y in zip(a, b, strict=True):
                assert np.array_equal(x, y, equal_nan=True)

    def test_global_state_is_left_alone(self, potential: Potential) -> None:
        before = global_state()
        try:
            evaluate(potential, crystal())
            with pytest.raises(UnknownElementError):
                evaluate(potential, Atoms("O"))
            after = global_state()
        finally:
            torch.set_default_dtype(before[0])
            torch.set_grad_enabled(before[1])
        assert after == before

    def test_the_graph_is_left_alone(self, potential: Potential) -> None:
        for graph in (
            atoms_to_graph(crystal(), potential.cutoff),
            batch_graphs([atoms_to_graph(cluster(), potential.cutoff)] * 2),
        ):
            before = graph.clone()
            for create_graph in (False, True):
                potential(graph, create_graph=create_graph)
            assert set(graph.keys()) == set(before.keys())
            for key in tensors(graph):
                torch.testing.assert_close(graph[key], before[key], rtol=0, atol=0, equal_nan=True)
                assert graph[key].requires_grad == before[key].requires_grad

    def test_derivatives_on_request(self, potential: Potential) -> None:
        """Energy alone equals the full answer; what was not asked for is None."""
        graph = atoms_to_graph(crystal(), potential.cutoff)
        full = potential(graph)
        with torch.no_grad():
            energy = potential(graph, forces=False, stress=False)
        assert (energy.forces, energy.stress) == (None, None)
        assert torch.equal(energy.energy, full.energy)
        assert torch.equal(potential(graph, stress=False).forces, full.forces)
        assert torch.equal(potential(graph, forces=False).stress, full.stress)
        assert not full.forces.requires_grad
        assert edge_vectors(graph).dtype == full.energy.dtype == torch.float64


def tensors(graph: AtomicGraph) -> list[str]:
    """Names of the tensor fields."""
    return [key for key in graph.keys() if isinstance(graph[key], torch.Tensor)]  # noqa: SIM118
