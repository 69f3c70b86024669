"""Molecular dynamics by ASE: settings, the integrators, and all that a restart must restore.

The loop, its files and its guards are in md.py. The integrators are ASE's own.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from mlip.errors import CheckpointError, InputError
from mlip.files import atomic_write

ENSEMBLES = ("nve", "nvt-langevin", "nvt-bussi", "npt")
CELLS = ("iso", "full")
CHECKPOINT_VERSION = 1

_CHAINS = ("_thermostat._eta", "_thermostat._p_eta", "_barostat._xi", "_barostat._p_xi")
# Attributes that each integrator carries from step to step beside positions and momenta.
_STATE: dict[type[MolecularDynamics], tuple[str, ...]] = {
    VelocityVerlet: (),
    Langevin: (),
    Bussi: ("transferred_energy",),
    IsotropicMTKNPT: ("_q", "_p", "_eps", "_p_eps", "_cell0", "_volume0", *_CHAINS),
    MTKNPT: ("_q", "_p", "_h", "_p_g", *_CHAINS),
}


@dataclass(frozen=True)
class MDSettings:
    """What to simulate; checked when built.

    Args:
        ensemble: ``nve`` (velocity Verlet), ``nvt-langevin``, ``nvt-bussi`` (stochastic velocity
            rescaling) or ``npt`` (Martyna–Tobias–Klein with Nosé–Hoover chains).
        temperature_K: of the thermostat, and of velocities drawn for a structure without any.
        timestep_fs: time step, fs.
        pressure_GPa: external pressure, npt only.
        cell: npt only: ``iso`` changes the volume, ``full`` the shape too.
        thermostat_fs: time constant of the thermostat, fs (Langevin: 1 / friction).
        barostat_fs: time constant of the barostat, fs.
        seed: of drawn velocities and of the random forces.

    Raises:
        InputError: an unknown name or a value out of range; the text says what is allowed.
    """

    ensemble: str = "nve"
    temperature_K: float | None = None
    timestep_fs: float = 1.0
    pressure_GPa: float = 0.0
    cell: str = "iso"
    thermostat_fs: float = 100.0
    barostat_fs: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise InputError(f"ensemble is {self.ensemble!r}; use one of {', '.join(ENSEMBLES)}")
        if self.cell not in CELLS:
            raise InputError(f"cell is {self.cell!r}; use one of {', '.join(CELLS)}")
        for name in ("timestep_fs", "thermostat_fs", "barostat_fs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; give a positive time in fs")
        if self.temperature_K is None:
            if self.ensemble != "nve":
                raise InputError(f"ensemble {self.ensemble!r} needs a temperature in K")
        elif not (math.isfinite(self.temperature_K) and self.temperature_K >= 0):
            raise InputError(f"temperature is {self.temperature_K} K; give 0 or more")
        if self.temperature_K == 0 and self.ensemble != "nve":
            raise InputError(f"ensemble {self.ensemble!r} needs a temperature above 0 K")
        if not math.isfinite(self.pressure_GPa):
            raise InputError(f"pressure is {self.pressure_GPa} GPa; give a finite number")
        if self.ensemble != "npt" and (self.pressure_GPa != 0 or self.cell != "iso"):
            raise InputError(
                f"pressure and cell belong to ensemble 'npt', not to {self.ensemble!r}"
            )


def prepare(structure: Atoms, settings: MDSettings, rng: np.random.Generator) -> Atoms:
    """Copy a structure, with velocities drawn from the Maxwell–Boltzmann law if it has none.

    Under a stochastic thermostat the centre of mass of a structure without constraints is held,
    and not counted among the degrees of freedom.

    Raises:
        InputError: no atoms, or a structure that the ensemble cannot treat.
    """
    atoms = structure.copy()
    if len(atoms) == 0:
        raise InputError("the structure has no atoms")
    if settings.ensemble == "npt" and not atoms.pbc.all():
        raise InputError(
            "ensemble 'npt' needs a structure periodic in three directions; this one has "
            f"pbc = {atoms.pbc.tolist()}"
        )
    if settings.ensemble == "npt" and atoms.constraints:
        raise InputError("ensemble 'npt' cannot keep constraints; remove them or use nvt")
    free = len(atoms) > 1 and not atoms.constraints
    if free and settings.ensemble in ("nvt-langevin", "nvt-bussi"):
        atoms.set_constraint(FixCom())
    if settings.temperature_K and not atoms.get_momenta().any():
        draw_velocities(atoms, settings.temperature_K, rng)
        if free:
            Stationary(atoms)
    return atoms


def draw_velocities(atoms: Atoms, temperature_K: float, rng: np.random.Generator) -> None:
    """Give atoms the momenta of a temperature, at random (Maxwell and Boltzmann)."""
    from ase.md import velocitydistribution as ase_velocities

    name = "thermalize_momenta"  # ASE before 3.29 calls it MaxwellBoltzmannDistribution
    draw = getattr(ase_velocities, name, None) or ase_velocities.MaxwellBoltzmannDistribution
    draw(atoms, temperature_K=temperature_K, rng=rng)


def build(atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> MolecularDynamics:
    """Make ASE's integrator for these atoms, which must have their calculator."""
    timestep = settings.timestep_fs * units.fs
    damping = settings.thermostat_fs * units.fs
    common: dict[str, Any] = {"atoms": atoms, "timestep": timestep}
    if settings.ensemble == "nve":
        return VelocityVerlet(**common)
    common["temperature_K"] = settings.temperature_K
    if settings.ensemble == "nvt-langevin":
        return Langevin(**common, friction=1 / damping, fixcm=False, rng=rng)
    if settings.ensemble == "nvt-bussi":
        return Bussi(**common, taut=damping, rng=rng)
    kind = IsotropicMTKNPT if settings.cell == "iso" else MTKNPT
    return kind(
        **common,
        pressure_au=settings.pressure_GPa * units.GPa,
        tdamp=damping,
        pdamp=settings.barostat_fs * units.fs,
    )


def conserved_energy(dynamics: MolecularDynamics) -> float:
    """Return what the exact dynamics would conserve, eV; NaN for Langevin, which has no such."""
    atoms = dynamics.atoms
    if isinstance(dynamics, IsotropicMTKNPT | MTKNPT):
        return float(dynamics.get_conserved_energy())
    if isinstance(dynamics, Langevin):
        return math.nan
    total = atoms.get_potential_energy() + atoms.get_kinetic_energy()
    return float(total - getattr(dynamics, "transferred_energy", 0.0))


def save_checkpoint(
    path: Path,
    dynamics: MolecularDynamics,
    settings: MDSettings,
    rng: np.random.Generator,
    record: Mapping[str, Any],
) -> None:
    """Write all that continues the run exactly; the checkpoint before this one is kept.

    Args:
        path: file; the earlier one is renamed, with ``.previous`` added.
        dynamics: integrator after a whole step.
        settings: of the run.
        rng: generator that the integrator draws from.
        record: JSON-able facts that come back from :func:`load_checkpoint`.
    """
    atoms = dynamics.atoms
    arrays = {
        "numbers": atoms.numbers.astype(np.int64),
        "positions": atoms.positions,
        "momenta": atoms.get_momenta(),
        "cell": np.array(atoms.cell),
    }
    for name in _STATE[type(dynamics)]:
        arrays[f"state.{name}"] = np.asarray(operator.attrgetter(name)(dynamics), dtype=np.float64)
    header = {
        "format": "mlip-md-checkpoint",
        "format_version": CHECKPOINT_VERSION,
        "step": dynamics.nsteps,
        "settings": asdict(settings),
        "rng": rng.bit_generator.state,
        "record": dict(record),
    }
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    data = serialize(contiguous, metadata={"mlip": json.dumps(header)})
    if path.exists():
        path.replace(previous_checkpoint(path))
    with atomic_write(path) as file:
        file.write(data)


def previous_checkpoint(path: Path) -> Path:
    """Name of the checkpoint before the last."""
    return path.with_name(path.name + ".previous")


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file: header and arrays as written by :func:`save_checkpoint`."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def check_calculator(self, name: str) -> None:
        """Raise InputError if the run was made with another calculator."""
        before = self.header["record"].get("calculator")
        if before != name:
            raise InputError(
                f"cannot resume: the run was made with {before}, and this is {name}; use the same "
                "potential and precision"
            )

    def restore_atoms(self, atoms: Atoms) -> None:
        """Set positions, momenta and cell.

        Raises:
            InputError: the structure has other atoms than the run.
        """
        if not np.array_equal(atoms.numbers, self.arrays["numbers"]):
            raise InputError(
                "cannot resume: the structure has other atoms than the checkpoint; give the "
                "structure that the run was started with"
            )
        atoms.set_cell(self.arrays["cell"], apply_constraint=False)
        atoms.set_positions(self.arrays["positions"], apply_constraint=False)
        atoms.set_momenta(self.arrays["momenta"], apply_constraint=False)

    def restore_dynamics(self, dynamics: MolecularDynamics, rng: np.random.Generator) -> None:
        """Set step, thermostat, barostat and random numbers."""
        for name in _STATE[type(dynamics)]:
            value = self.arrays[f"state.{name}"]
            owner, _, attribute = name.rpartition(".")
            target = operator.attrgetter(owner)(dynamics) if owner else dynamics
            setattr(target, attribute, value[()] if value.ndim == 0 else value.copy())
        rng.bit_generator.state = copy.deepcopy(self.header["rng"])
        dynamics.nsteps = int(self.header["step"])


def load_checkpoint(path: Path, settings: MDSettings) -> Checkpoint:
    """Read the newest sound checkpoint: ``path``, or else the one before it.

    Raises:
        CheckpointError: neither can be read.
        InputError: the run had other settings.
    """
    problems = []
    for candidate in (path, previous_checkpoint(path)):
        try:
            checkpoint = _read(candidate)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            _check_settings(candidate, checkpoint.header["settings"], asdict(settings))
            return checkpoint
    raise CheckpointError("; ".join(problems) + ": start again without --resume")


def _read(path: str | os.PathLike[str]) -> Checkpoint:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["mlip"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = header["format"], header["format_version"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({error})") from error
    if known != ("mlip-md-checkpoint", CHECKPOINT_VERSION):
        raise CheckpointError(f"{path}: of another version or kind ({known[0]} {known[1]})")
    return Checkpoint(header, arrays)


def _check_settings(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if old.get(key) != value:
            raise InputError(
                f"{path}: cannot resume, {key} was {old.get(key)!r} and is {value!r} now; use the "
                "same settings, or start again without --resume"
            )
