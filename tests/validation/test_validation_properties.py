"""Properties under ASE's EMT, against independent routes to the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.geometry.rdf import get_rdf

from mlip.errors import InputError, MlipError
from mlip.validation import properties as p


@pytest.fixture(scope="module")
def copper() -> Atoms:
    """Conventional copper cell at its EMT equilibrium, found by bisection on the pressure."""
    low, high = 3.5, 3.7
    for _ in range(40):
        middle = (low + high) / 2
        atoms = bulk("Cu", a=middle, cubic=True)
        atoms.calc = EMT()
        compressed = atoms.get_stress()[:3].sum() < 0
        low, high = (middle, high) if compressed else (low, middle)
    return bulk("Cu", a=low, cubic=True)


def energy_under_strain(atoms: Atoms, strain: np.ndarray) -> float:
    """Energy per volume (GPa) of the deformation 1 + ε, ions following the cell."""
    strained = atoms.copy()
    strained.set_cell(atoms.cell.array @ (np.eye(3) + strain).T, scale_atoms=True)
    strained.calc = EMT()
    return strained.get_potential_energy() / atoms.get_volume() / units.GPa


def second_derivative(atoms: Atoms, direction: np.ndarray, step: float = 2e-3) -> float:
    plus, middle, minus = (
        energy_under_strain(atoms, factor * step * direction) for factor in (1, 0, -1)
    )
    return (plus - 2 * middle + minus) / step**2


def strain_of(*pairs: tuple[int, int]) -> np.ndarray:
    strain = np.zeros((3, 3))
    for a, b in pairs:
        strain[a, b] = 1
    return strain


def test_lattice_constant_has_no_pressure(copper: Atoms) -> None:
    started = bulk("Cu", a=3.7, cubic=True)
    found = p.lattice_constant(started, EMT(), fmax=1e-5)
    assert found == pytest.approx(copper.cell[0, 0], abs=1e-4)
    assert started.cell[0, 0] == 3.7
    assert started.calc is None


def test_lattice_constant_wants_a_cubic_cell() -> None:
    with pytest.raises(InputError, match="cubic"):
        p.lattice_constant(bulk("Cu"), EMT())


def test_relaxation_that_does_not_converge_is_an_error() -> None:
    with pytest.raises(MlipError, match="did not relax"):
        p.relax_crystal(bulk("Cu", a=3.9), EMT(), fmax=1e-6, steps=1)
    rattled = bulk("Cu", cubic=True)
    rattled.rattle(0.2, seed=1)
    with pytest.raises(MlipError, match="did not relax"):
        p.relax_ions(rattled, EMT(), fmax=1e-6, steps=1)


def test_elastic_constants_are_second_derivatives_of_the_energy(copper: Atoms) -> None:
    constants = p.elastic_constants(copper, EMT())
    c11 = second_derivative(copper, strain_of((0, 0)))
    c11_plus_c12 = second_derivative(copper, strain_of((0, 0), (1, 1))) / 2
    c44 = second_derivative(copper, strain_of((1, 2), (2, 1))) / 4
    cubic = p.cubic_elasticity(constants)
    assert cubic.c11_GPa == pytest.approx(c11, rel=2e-3)
    assert cubic.c11_GPa + cubic.c12_GPa == pytest.approx(c11_plus_c12, rel=2e-3)
    assert cubic.c44_GPa == pytest.approx(c44, rel=2e-3)
    coupling = constants[:3, 3:]
    assert np.abs(coupling).max() < 1e-6 * c11


def test_bulk_modulus_is_the_same_by_both_routes(copper: Atoms) -> None:
    cubic = p.cubic_elasticity(p.elastic_constants(copper, EMT()))
    eos = p.equation_of_state(copper, EMT(), volume_range=0.04)
    assert eos.bulk_modulus_GPa == pytest.approx(cubic.bulk_modulus_GPa, rel=5e-3)
    assert eos.volume == pytest.approx(copper.get_volume() / 4, rel=1e-3)
    by_pressure = -np.diff([pressure(copper, f) for f in (0.999, 1.001)])[0] / 0.002
    assert eos.bulk_modulus_GPa == pytest.approx(by_pressure, rel=5e-3)
    assert 3 < eos.bulk_modulus_derivative < 8


def pressure(atoms: Atoms, factor: float) -> float:
    scaled = atoms.copy()
    scaled.set_cell(atoms.cell * np.cbrt(factor), scale_atoms=True)
    scaled.calc = EMT()
    return -scaled.get_stress()[:3].mean() / units.GPa


def test_equation_of_state_refuses_a_range_without_minimum() -> None:
    with pytest.raises(InputError, match="no energy minimum"):
        p.equation_of_state(bulk("Cu", a=4.0), EMT())
    with pytest.raises(InputError, match="5 points"):
        p.equation_of_state(bulk("Cu"), EMT(), points=4)


def test_relaxed_ions_soften_the_shear_of_an_alloy(copper: Atoms) -> None:
    """In a cell without inversion at the sites, ions that may relax lower the constants."""
    alloy = copper.repeat((2, 1, 1))
    alloy.symbols[[0, 3, 5]] = "Au"
    alloy = p.relax_crystal(alloy, EMT(), fmax=1e-4)
    clamped = p.elastic_constants(alloy, EMT())
    relaxed = p.elastic_constants(alloy, EMT(), relax=True, fmax=1e-4)
    softening = np.linalg.eigvalsh(clamped - relaxed)
    assert softening.min() > -0.3  # GPa, numerical noise of the relaxations
    assert softening.max() > 1.0


def test_vacancy_by_hand(copper: Atoms) -> None:
    supercell = copper.repeat(2)
    found = p.vacancy_formation_energy(supercell, EMT(), fmax=1e-3)
    unrelaxed = supercell.copy()
    unrelaxed.calc = EMT()
    perfect = unrelaxed.get_potential_energy()
    del unrelaxed[5]
    frozen = unrelaxed.get_potential_energy() - 31 / 32 * perfect
    assert 0.5 * frozen < found < frozen
    assert p.vacancy_formation_energy(supercell, EMT(), index=7, fmax=1e-3) == pytest.approx(
        found, abs=1e-4
    )
    supercell.symbols[0] = "Au"
    with pytest.raises(InputError, match="one element"):
        p.vacancy_formation_energy(supercell, EMT())


def test_drift_recovers_a_known_line() -> None:
    time = np.linspace(0, 10, 401)
    ripple = 0.002 * np.sin(2 * np.pi * time / 0.3)
    drift = p.energy_drift(time, -3.5 + 0.5e-3 * time + 1e-3 * ripple)
    assert drift.slope == pytest.approx(0.5, abs=1e-3)
    assert drift.fluctuation == pytest.approx(0.002 / np.sqrt(2), rel=0.02)
    with pytest.raises(InputError, match="three samples"):
        p.energy_drift(time[:2], time[:2])


def test_drift_of_verlet_grows_with_the_square_of_the_time_step(copper: Atoms) -> None:
    supercell = copper.repeat(2)
    small = p.nve_drift(supercell, EMT(), timestep_fs=2, duration_ps=0.6, interval=1)
    large = p.nve_drift(supercell, EMT(), timestep_fs=4, duration_ps=0.6, interval=1)
    assert 3 < large.fluctuation / small.fluctuation < 5.5
    assert abs(small.slope) < 0.02
    assert small.energies[0] == pytest.approx(large.energies[0], abs=1e-9)
    assert small.time_ps[-1] == pytest.approx(0.6)


def test_drift_sees_forces_that_are_not_the_gradient(copper: Atoms) -> None:
    class Broken(EMT):
        def calculate(self, *args: object, **kwargs: object) -> None:
            super().calculate(*args, **kwargs)
            self.results["forces"] = 0.9 * self.results["forces"]

    sound = p.nve_drift(copper.repeat(2), EMT(), duration_ps=0.2)
    broken = p.nve_drift(copper.repeat(2), Broken(), duration_ps=0.2)
    assert np.ptp(broken.energies) > 20 * np.ptp(sound.energies)


def test_radial_distribution_matches_ase(copper: Atoms) -> None:
    frames = [copper.repeat(3) for _ in range(3)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.1, seed=seed)
    r, g = p.radial_distribution(frames, r_max=5.0, bins=50)
    expected = np.mean([get_rdf(frame, 5.0, 50)[0] for frame in frames], axis=0)
    shell_of_ase = 4 * np.pi * r**2 * 0.1
    shell_exact = 4 / 3 * np.pi * ((r + 0.05) ** 3 - (r - 0.05) ** 3)
    n = len(frames[0])  # ASE counts N−1 neighbours in the density it divides by
    np.testing.assert_allclose(g * shell_exact / shell_of_ase, expected, rtol=1.5 / n, atol=1e-12)


def test_radial_distribution_counts_images_and_coordination() -> None:
    """One atom in a small cell: 12 first neighbours, whatever r_max."""
    primitive = bulk("Cu", a=3.6)
    r, g = p.radial_distribution([primitive], r_max=8.0, bins=400)
    shell = 4 / 3 * np.pi * ((r + 0.01) ** 3 - (r - 0.01) ** 3)
    density = 1 / primitive.get_volume()
    assert (g * shell * density)[r < 3.0].sum() == pytest.approx(12)
    gas = Atoms("Ar2000", positions=np.random.default_rng(0).uniform(0, 30, (2000, 3)))
    gas.set_cell([30, 30, 30])
    gas.pbc = True
    r, g = p.radial_distribution([gas], r_max=6.0, bins=6)
    assert g[3:] == pytest.approx(1, abs=0.03)


def test_radial_distribution_refuses_clusters_and_nothing() -> None:
    with pytest.raises(InputError, match="periodic"):
        p.radial_distribution([Atoms("Ar")])
    with pytest.raises(InputError, match="at least one"):
        p.radial_distribution([])


def test_pair_potential_obeys_cauchy() -> None:
    """A central pair potential has C12 = C44 at zero pressure."""
    calculator = LennardJones(sigma=2.5, epsilon=0.2, rc=7.0, smooth=True)
    atoms = bulk("Ar", "fcc", a=2.5 * 1.56, cubic=True)
    atoms = p.relax_crystal(atoms, calculator, isotropic=True, fmax=1e-6)
    cubic = p.cubic_elasticity(p.elastic_constants(atoms, calculator))
    assert cubic.c12_GPa == pytest.approx(cubic.c44_GPa, rel=5e-3)
