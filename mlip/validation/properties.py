"""Properties of crystals under any ASE calculator: lattice, elasticity, vacancy, drift, structure.

Every function takes `ase.Atoms` and a calculator, leaves the atoms as they were and returns plain
numbers or arrays. Elastic moduli are in GPa, everything else in eV, Å, ps. Nothing here knows what
kind of potential it measures, except whether its forces are derivatives (a calculator that says
``conservative = False`` gets a warning), and nothing here plots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.eos import EquationOfState as AseEquationOfState
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from ase.optimize import FIRE, LBFGS
from ase.optimize.optimize import Optimizer

from mlip.errors import InputError, MlipError
from mlip.simulation.conservation import IN_DYNAMICS, IN_ELASTICITY, warn_of_direct_forces

__all__ = [
    "CubicElasticity",
    "EquationOfState",
    "NveDrift",
    "cubic_elasticity",
    "elastic_constants",
    "energy_drift",
    "equation_of_state",
    "lattice_constant",
    "nve_drift",
    "radial_distribution",
    "relax_crystal",
    "relax_ions",
    "vacancy_formation_energy",
]

# Voigt order of the six strains: xx yy zz yz xz xy.
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


class EquationOfState(NamedTuple):
    """Energy against volume, and the Birch–Murnaghan curve through it (per atom)."""

    volumes: np.ndarray  # [K] Å³/atom, ascending
    energies: np.ndarray  # [K] eV/atom
    volume: float  # equilibrium, Å³/atom
    energy: float  # at equilibrium, eV/atom
    bulk_modulus_GPa: float
    bulk_modulus_derivative: float  # dB/dP at equilibrium


class CubicElasticity(NamedTuple):
    """The three elastic constants of a cubic crystal."""

    c11_GPa: float
    c12_GPa: float
    c44_GPa: float

    @property
    def bulk_modulus_GPa(self) -> float:
        """Bulk modulus (C11 + 2 C12) / 3."""
        return (self.c11_GPa + 2 * self.c12_GPa) / 3


class NveDrift(NamedTuple):
    """What became of the total energy in a microcanonical run."""

    slope: float  # least squares, meV/atom/ps
    fluctuation: float  # standard deviation about that line, meV/atom
    time_ps: np.ndarray  # [K]
    energies: np.ndarray  # [K] total energy per atom, eV


def with_calculator(atoms: Atoms, calculator: Calculator) -> Atoms:
    """Copy a structure and give the copy a calculator."""
    copy = atoms.copy()
    copy.calc = calculator
    return copy


def relax_crystal(
    atoms: Atoms,
    calculator: Calculator,
    *,
    isotropic: bool = False,
    fmax: float = 1e-3,
    steps: int = 300,
) -> Atoms:
    """Relax the positions and the cell of a crystal at zero pressure.

    Args:
        atoms: crystal periodic in three directions.
        calculator: gives energy, forces and stress.
        isotropic: scale the cell only (its shape stays).
        fmax: largest force, and largest volume·stress component per atom of the cell, eV/Å and eV.
        steps: largest number of L-BFGS steps.

    Raises:
        MlipError: not converged after that many steps.
    """
    relaxed = with_calculator(atoms, calculator)
    target = FrechetCellFilter(relaxed, hydrostatic_strain=isotropic)
    _relax(LBFGS(target, logfile=None), relaxed, fmax, steps)
    return relaxed


def relax_ions(
    atoms: Atoms, calculator: Calculator, *, fmax: float = 1e-3, steps: int = 300
) -> Atoms:
    """Relax the positions in a fixed cell.

    Raises:
        MlipError: not converged after that many FIRE steps.
    """
    relaxed = with_calculator(atoms, calculator)
    _relax(FIRE(relaxed, logfile=None), relaxed, fmax, steps)
    return relaxed


def _relax(optimizer: Optimizer, atoms: Atoms, fmax: float, steps: int) -> None:
    if not optimizer.run(fmax=fmax, steps=steps):
        raise MlipError(
            f"{atoms.get_chemical_formula()} did not relax to fmax {fmax:g} in {steps} steps: "
            "start closer to equilibrium, or allow more steps"
        )


def lattice_constant(
    atoms: Atoms, calculator: Calculator, *, fmax: float = 1e-3, steps: int = 300
) -> float:
    """Compute the edge of a conventional cubic cell at zero pressure, in Å.

    Args:
        atoms: conventional cubic cell (three equal edges at right angles).
        calculator: gives energy, forces and stress.
        fmax: convergence, see `relax_crystal`.
        steps: largest number of steps.

    Raises:
        InputError: the cell is not cubic.
    """
    lengths, angles = np.split(atoms.cell.cellpar(), 2)
    if np.ptp(lengths) > 1e-6 * lengths.max() or np.abs(angles - 90).max() > 1e-6:
        raise InputError(
            f"lattice_constant needs a cubic cell, got lengths {lengths} and angles {angles}: "
            "build it with ase.build.bulk(..., cubic=True)"
        )
    relaxed = relax_crystal(atoms, calculator, isotropic=True, fmax=fmax, steps=steps)
    return float(relaxed.cell.lengths().mean())


def equation_of_state(
    atoms: Atoms, calculator: Calculator, *, volume_range: float = 0.06, points: int = 9
) -> EquationOfState:
    """Fit the Birch–Murnaghan equation of state around a structure.

    The cell and the positions are scaled together; internal coordinates stay.

    Args:
        atoms: crystal near equilibrium; its own volume is the middle of the range.
        calculator: gives the energy.
        volume_range: relative change of the volume to either side.
        points: number of volumes, five or more.

    Raises:
        InputError: the minimum lies outside the range, or too few points.
    """
    if points < 5:
        raise InputError(f"an equation of state needs at least 5 points, got {points}")
    number = len(atoms)
    factors = np.linspace(1 - volume_range, 1 + volume_range, points)
    energies = np.empty(points)
    for i, factor in enumerate(factors):
        scaled = with_calculator(atoms, calculator)
        scaled.set_cell(atoms.cell * np.cbrt(factor), scale_atoms=True)
        energies[i] = scaled.get_potential_energy() / number
    volumes = factors * atoms.get_volume() / number
    if np.argmin(energies) in (0, points - 1):
        raise InputError(
            f"{atoms.get_chemical_formula()} has no energy minimum between {volumes[0]:.2f} and "
            f"{volumes[-1]:.2f} Å³/atom: relax the cell first, or widen volume_range"
        )
    fit = AseEquationOfState(volumes, energies, eos="birchmurnaghan")
    volume, energy, modulus = fit.fit(warn=False)
    return EquationOfState(
        volumes, energies, volume, energy, modulus / units.GPa, fit.eos_parameters[2]
    )


def elastic_constants(
    atoms: Atoms,
    calculator: Calculator,
    *,
    strain: float = 0.005,
    relax: bool = False,
    fmax: float = 1e-3,
    steps: int = 300,
) -> np.ndarray:
    """Compute the elastic constants by central differences of the stress.

    C_ij = (σ_i(+η_j) − σ_i(−η_j)) / 2η_j in Voigt order xx yy zz yz xz xy, with engineering shear
    strains and the symmetric deformation 1 + ε; then symmetrised. At zero stress these are the
    usual constants; a stressed crystal gives the slopes of its stress–strain relation instead.

    Args:
        atoms: crystal periodic in three directions, at equilibrium.
        calculator: gives the stress.
        strain: η, the Voigt strain of each step.
        relax: relax the ions in each strained cell; otherwise they follow the cell (clamped ions).
        fmax: convergence of that relaxation, eV/Å.
        steps: largest number of steps of that relaxation.

    Returns:
        [6, 6] in GPa.
    """
    warn_of_direct_forces(calculator, IN_ELASTICITY)
    constants = np.empty((6, 6))
    for j, (a, b) in enumerate(_VOIGT):
        stresses = []
        for step in (strain, -strain):
            deformation = np.eye(3)
            deformation[a, b] += step / 2
            deformation[b, a] += step / 2
            strained = with_calculator(atoms, calculator)
            strained.set_cell(atoms.cell.array @ deformation.T, scale_atoms=True)
            if relax:
                strained = relax_ions(strained, calculator, fmax=fmax, steps=steps)
            stresses.append(strained.get_stress(voigt=True))
        constants[:, j] = (stresses[0] - stresses[1]) / (2 * strain)
    return (constants + constants.T) / (2 * units.GPa)


def cubic_elasticity(constants: np.ndarray) -> CubicElasticity:
    """Average elastic constants [6, 6] over the entries that are equal in a cubic crystal."""
    return CubicElasticity(
        c11_GPa=float(np.mean([constants[i, i] for i in range(3)])),
        c12_GPa=float(np.mean([constants[i, j] for i, j in ((0, 1), (0, 2), (1, 2))])),
        c44_GPa=float(np.mean([constants[i, i] for i in range(3, 6)])),
    )


def vacancy_formation_energy(
    atoms: Atoms, calculator: Calculator, *, index: int = 0, fmax: float = 0.01, steps: int = 500
) -> float:
    """Compute the formation energy of a vacancy, E(N−1) − (N−1)/N·E(N), in eV.

    The ions around it relax in the fixed cell.

    Args:
        atoms: perfect supercell of one element, at equilibrium.
        calculator: gives energy and forces.
        index: the atom that is taken out.
        fmax: convergence of the relaxation, eV/Å.
        steps: largest number of steps.

    Raises:
        InputError: more than one element (the energy would depend on chemical potentials).
    """
    if len(set(atoms.numbers)) != 1:
        raise InputError(
            f"vacancy_formation_energy takes one element, got {atoms.get_chemical_formula()}"
        )
    perfect = with_calculator(atoms, calculator).get_potential_energy()
    defective = atoms.copy()
    del defective[index]
    # A perfect lattice around a vacancy is a stationary point of higher symmetry: leave it.
    defective.rattle(0.02, seed=0)
    relaxed = relax_ions(defective, calculator, fmax=fmax, steps=steps)
    return float(relaxed.get_potential_energy() - perfect * len(defective) / len(atoms))


def energy_drift(time_ps: np.ndarray, energies: np.ndarray, discard: float = 0.1) -> NveDrift:
    """Fit a line to the total energy per atom of a microcanonical run.

    Args:
        time_ps: [K] times.
        energies: [K] total energy per atom, eV.
        discard: share of the run left out at its start.

    Raises:
        InputError: fewer than three samples remain.
    """
    first = int(discard * len(time_ps))
    if len(time_ps) - first < 3:
        raise InputError(f"a drift needs at least three samples, got {len(time_ps) - first}")
    times, values = np.asarray(time_ps)[first:], 1000 * np.asarray(energies)[first:]
    slope, offset = np.polyfit(times - times[0], values - values[0], 1)
    residual = values - values[0] - slope * (times - times[0]) - offset
    return NveDrift(float(slope), float(residual.std()), np.asarray(time_ps), np.asarray(energies))


def nve_drift(
    atoms: Atoms,
    calculator: Calculator,
    *,
    temperature_K: float = 600.0,
    timestep_fs: float = 1.0,
    duration_ps: float = 1.0,
    interval: int = 5,
    seed: int = 0,
) -> NveDrift:
    """Run velocity Verlet and measure how well the total energy is conserved.

    Args:
        atoms: starting structure; its velocities are not used.
        calculator: gives energy and forces.
        temperature_K: of the Maxwell–Boltzmann velocities drawn at the start.
        timestep_fs: time step.
        duration_ps: length of the run.
        interval: steps between two samples of the energy.
        seed: of the velocities.
    """
    warn_of_direct_forces(calculator, IN_DYNAMICS["nve"])
    moving = with_calculator(atoms, calculator)
    widths = np.sqrt(units.kB * temperature_K * moving.get_masses())[:, None]  # [N, 1]
    moving.set_momenta(widths * np.random.default_rng(seed).standard_normal((len(moving), 3)))
    if not any(isinstance(constraint, FixAtoms) for constraint in moving.constraints):
        Stationary(moving)
    dynamics = VelocityVerlet(moving, timestep=timestep_fs * units.fs)
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(moving.get_total_energy() / len(moving)), interval)
    dynamics.run(round(1000 * duration_ps / timestep_fs))
    time_ps = np.arange(len(energies)) * interval * timestep_fs / 1000
    return energy_drift(time_ps, np.array(energies))


def radial_distribution(
    frames: Iterable[Atoms], *, r_max: float = 6.0, bins: int = 120
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the radial distribution function of periodic structures, averaged over frames.

    g(r) = n(r) / (N ρ 4π r² Δr) with n(r) the ordered pairs in a shell; periodic images count, so
    r_max may exceed half the cell.

    Args:
        frames: structures periodic in three directions.
        r_max: largest distance, Å.
        bins: number of shells.

    Returns:
        Centres of the shells [bins] in Å, and g [bins].

    Raises:
        InputError: no frame, or a frame that is not periodic in three directions.
    """
    edges = np.linspace(0, r_max, bins + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    total, count = np.zeros(bins), 0
    for atoms in frames:
        if not atoms.pbc.all():
            raise InputError("a radial distribution needs periodic boundaries in three directions")
        distances = neighbor_list("d", atoms, r_max)
        pairs, _ = np.histogram(distances, bins=edges)
        total += pairs * atoms.get_volume() / (len(atoms) ** 2 * shells)
        count += 1
    if count == 0:
        raise InputError("a radial distribution needs at least one frame")
    return (edges[1:] + edges[:-1]) / 2, total / count
