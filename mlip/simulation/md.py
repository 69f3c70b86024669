"""Run molecular dynamics with a log, a trajectory, guards and restarts that continue exactly.

Integrators, thermostats and barostats are ASE's, chosen in dynamics.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics

from mlip.errors import InputError
from mlip.graph import as_atoms
from mlip.simulation.calculator import as_calculator, describe
from mlip.simulation.conservation import (
    IN_DYNAMICS,
    is_conservative,
    require_stress,
    warn_of_direct_forces,
)
from mlip.simulation.dynamics import (
    Checkpoint,
    MDSettings,
    build,
    conserved_energy,
    load_checkpoint,
    prepare,
    previous_checkpoint,
    save_checkpoint,
)
from mlip.simulation.guards import VOLUME_FACTOR, FusionGuard, not_finite
from mlip.simulation.md_files import LogFile, TrajectoryFile
from mlip.simulation.output import with_results

# Steps between two searches for atoms that have fused.
FUSION_INTERVAL = 10
# The default limit of the temperature: so many times the target, and never below the second.
RUNAWAY_FACTOR = 10.0
RUNAWAY_FLOOR = 10_000.0  # K
# Fraction of a run left out of the drift: it equilibrates.
DRIFT_SKIP = 0.1


class MDRow(NamedTuple):
    """One line of the log; energies of the whole structure."""

    step: int
    time_ps: float
    potential_eV: float
    kinetic_eV: float
    total_eV: float
    conserved_eV: float
    temperature_K: float
    pressure_GPa: float
    volume_A3: float


@dataclass(frozen=True)
class MDResult:
    """Outcome of a run.

    Attributes:
        atoms: final structure with velocities and results.
        status: ``completed``, or ``diverged`` (then ``atoms`` is what the guards refused).
        message: what went wrong, or "".
        steps: steps done, those before a restart included.
        rows: the log; after a restart without log file, from the restart on.
        conservative: whether the forces were derivatives of the energy; if not, a drift tells of
            the potential and not of the time step.
    """

    atoms: Atoms
    status: str
    message: str
    steps: int
    rows: tuple[MDRow, ...]
    conservative: bool = True

    @property
    def times_ps(self) -> np.ndarray:
        """Times of the log, ps."""
        return np.array([row.time_ps for row in self.rows])

    @property
    def temperatures(self) -> np.ndarray:
        """Instantaneous temperatures of the log, K."""
        return np.array([row.temperature_K for row in self.rows])

    @property
    def energies(self) -> np.ndarray:
        """Total (potential and kinetic) energies of the log, eV."""
        return np.array([row.total_eV for row in self.rows])

    @property
    def drift_meV_per_atom_per_ps(self) -> float:
        """Slope of the conserved energy by least squares, the first tenth of the log left out.

        NaN for Langevin dynamics, which conserves nothing, and for fewer than three points.
        """
        conserved = np.array([row.conserved_eV for row in self.rows])
        start = int(len(conserved) * DRIFT_SKIP)
        times, values = self.times_ps[start:], conserved[start:]
        if len(values) < 3 or not np.isfinite(values).all():
            return math.nan
        slope = np.polyfit(times - times.mean(), values - values.mean(), 1)[0]
        return float(1000 * slope / len(self.atoms))


def run_md(
    structure: Any,
    calculator: Any,
    *,
    ensemble: str = "nve",
    temperature_K: float | None = None,
    timestep_fs: float = 1.0,
    steps: int | None = None,
    time_ps: float | None = None,
    pressure_GPa: float = 0.0,
    cell: str = "iso",
    thermostat_fs: float = 100.0,
    barostat_fs: float = 1000.0,
    seed: int = 0,
    trajectory: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    trajectory_interval: int = 100,
    log_interval: int = 10,
    checkpoint_interval: int = 1000,
    resume: bool = False,
    max_temperature_K: float | None = None,
    on_log: Callable[[MDRow], None] | None = None,
) -> MDResult:
    """Simulate one structure; the structure passed in is not changed.

    Velocities of the structure are kept; without, they are drawn at ``temperature_K``.

    Args:
        structure: ASE atoms (constraints are kept) or a pymatgen structure.
        calculator: ASE calculator, potential, path of a potential or name of a shipped one.
        ensemble: see :class:`~mlip.simulation.dynamics.MDSettings`, like the settings below.
        temperature_K: target, and temperature of drawn velocities.
        timestep_fs: time step.
        steps: length of the whole run, earlier parts of it included; or give ``time_ps``.
        time_ps: length of the whole run.
        pressure_GPa: external pressure (npt).
        cell: what the cell does (npt).
        thermostat_fs: time constant of the thermostat.
        barostat_fs: time constant of the barostat.
        seed: of drawn velocities and random forces.
        trajectory: ``.extxyz`` or ``.traj`` with energies, forces, stress and momenta.
        log: CSV file, one :class:`MDRow` a line.
        checkpoint: file from which the run can go on; the one before it is kept too.
        trajectory_interval: steps between frames.
        log_interval: steps between lines of the log.
        checkpoint_interval: steps between checkpoints.
        resume: go on from ``checkpoint``: same bits as a run that was never interrupted.
        max_temperature_K: the run stops above it; default 10 times the target, at least 10 000.
        on_log: called with each line of the log.

    Raises:
        InputError: bad settings or structure, or a resumed run with other settings.
        CheckpointError: no sound checkpoint to resume from.

    Warns:
        NonConservativeWarning: the forces are not derivatives of the energy.
    """
    settings = MDSettings(
        ensemble, temperature_K, timestep_fs, pressure_GPa, cell, thermostat_fs, barostat_fs, seed
    )
    target = _target_step(steps, time_ps, timestep_fs)
    intervals = (trajectory_interval, log_interval, checkpoint_interval)
    if min(intervals) < 1:
        raise InputError(f"intervals are {intervals} steps; each must be 1 or more")
    if resume and checkpoint is None:
        raise InputError("resume needs the checkpoint file of the run")
    rng = np.random.default_rng(seed)
    original = as_atoms(structure)
    atoms = prepare(original, settings, rng)
    atoms.calc = as_calculator(calculator)
    if ensemble == "npt":
        require_stress(atoms.calc, "ensemble 'npt'")
    warn_of_direct_forces(atoms.calc, IN_DYNAMICS[ensemble])
    saved = load_checkpoint(Path(checkpoint), settings) if resume and checkpoint else None
    if saved is not None:
        saved.check_calculator(describe(atoms.calc))
        saved.restore_atoms(atoms)
    dynamics = build(atoms, settings, rng)
    files = _Files(original, trajectory, log, checkpoint, intervals, saved)
    files.calculator = describe(atoms.calc)
    run = _Run(dynamics, settings, rng, files, on_log, max_temperature_K)
    if saved is not None:
        saved.restore_dynamics(dynamics, rng)
    return run.to(target, resumed=saved is not None)


class _Files:
    """Log, trajectory and checkpoint of a run, kept in step with one another."""

    def __init__(
        self,
        original: Atoms,
        trajectory: str | os.PathLike[str] | None,
        log: str | os.PathLike[str] | None,
        checkpoint: str | os.PathLike[str] | None,
        intervals: tuple[int, int, int],
        saved: Checkpoint | None,
    ) -> None:
        self.original = original
        self.trajectory_interval, self.log_interval, self.checkpoint_interval = intervals
        self.trajectory = None if trajectory is None else TrajectoryFile(Path(trajectory))
        self.log = None if log is None else LogFile(Path(log), MDRow._fields)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.calculator = ""
        record = {} if saved is None else saved.header["record"]
        for name in ("trajectory", "log"):
            file = getattr(self, name)
            if file is not None:
                file.cut(record.get(name, 0))
        if saved is None and self.checkpoint is not None:
            for old in (self.checkpoint, previous_checkpoint(self.checkpoint)):
                old.unlink(missing_ok=True)

    def frame(self, atoms: Atoms, step: int, time_ps: float) -> Atoms:
        """Copy the atoms with their results and the constraints that the user set."""
        frame = with_results(atoms, atoms.calc.results, step=step, time_ps=time_ps)
        frame.set_constraint(self.original.constraints)
        return frame

    def lengths(self) -> dict[str, int]:
        """Say how far the files have come, for the checkpoint."""
        files = {"trajectory": self.trajectory, "log": self.log}
        return {name: file.length() for name, file in files.items() if file is not None}


class _Run:
    """The loop: a step, the guards, then what is due of log, trajectory and checkpoint."""

    def __init__(
        self,
        dynamics: MolecularDynamics,
        settings: MDSettings,
        rng: np.random.Generator,
        files: _Files,
        on_log: Callable[[MDRow], None] | None,
        max_temperature: float | None,
    ) -> None:
        self.dynamics, self.atoms = dynamics, dynamics.atoms
        self.settings, self.rng, self.files, self.on_log = settings, rng, files, on_log
        self.rows: list[MDRow] = [] if files.log is None else _rows(files.log.read())
        scale = settings.temperature_K or self.atoms.get_temperature()
        self.hottest = max_temperature or max(RUNAWAY_FACTOR * scale, RUNAWAY_FLOOR)
        self.guard = FusionGuard(self.atoms)
        self.volume = self.atoms.cell.volume

    def to(self, target: int, resumed: bool) -> MDResult:
        """Run until the step ``target`` or the first unsound step."""
        started = self.dynamics.nsteps
        problem: str | None = None
        for problem in self._steps(max(0, target - started)):
            if problem is not None:
                break
            if resumed and self.dynamics.nsteps == started:
                continue  # recorded before the restart
            self._record(last=self.dynamics.nsteps >= target)
        if problem is not None:
            return self._result("diverged", f"{problem} at step {self.dynamics.nsteps}")
        return self._result("completed", "")

    def _steps(self, count: int) -> Iterator[str | None]:
        """Yield after each step what is wrong, if anything; numbers can also break within one."""
        begun = False
        try:
            for _ in self.dynamics.irun(count):
                begun = True
                yield self._problem()
        except (InputError, np.linalg.LinAlgError) as error:
            if not begun:
                raise
            yield f"the dynamics broke down ({error})"

    def _problem(self) -> str | None:
        atoms, step = self.atoms, self.dynamics.nsteps
        energy, forces = atoms.get_potential_energy(), atoms.get_forces(md=True)
        problem = not_finite(energy, forces, atoms)
        if problem is not None:
            return problem
        temperature = atoms.get_temperature()
        if not temperature <= self.hottest:
            return f"the temperature ran away to {temperature:.0f} K (limit {self.hottest:.0f} K)"
        ratio = atoms.cell.volume / self.volume if self.volume else 1.0
        if not 1 / VOLUME_FACTOR < ratio < VOLUME_FACTOR:
            return f"the volume changed by a factor of {ratio:.3g}"
        return self.guard.problem(atoms) if step % FUSION_INTERVAL == 0 else None

    def _record(self, last: bool) -> None:
        step, files = self.dynamics.nsteps, self.files
        if step % files.log_interval == 0 or last:
            row = self._row()
            self.rows.append(row)
            if files.log is not None:
                files.log.append(row)
            if self.on_log is not None:
                self.on_log(row)
        if files.trajectory is not None and (step % files.trajectory_interval == 0 or last):
            files.trajectory.append(files.frame(self.atoms, step, self._time_ps()))
        if files.checkpoint is not None and (step % files.checkpoint_interval == 0 or last):
            record = {**files.lengths(), "calculator": files.calculator}
            save_checkpoint(files.checkpoint, self.dynamics, self.settings, self.rng, record)

    def _time_ps(self) -> float:
        return self.dynamics.nsteps * self.settings.timestep_fs / 1000

    def _row(self) -> MDRow:
        atoms = self.atoms
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        pressure = math.nan
        if atoms.pbc.all() and "stress" in atoms.calc.results:
            stress = atoms.get_stress(include_ideal_gas=True, apply_constraint=False)
            pressure = -float(stress[:3].mean()) / units.GPa
        return MDRow(
            self.dynamics.nsteps, self._time_ps(), float(potential), float(kinetic),
            float(potential + kinetic), conserved_energy(self.dynamics),
            float(atoms.get_temperature()), pressure, float(atoms.cell.volume),
        )  # fmt: skip

    def _result(self, status: str, message: str) -> MDResult:
        frame = self.files.frame(self.atoms, self.dynamics.nsteps, self._time_ps())
        steps, rows = self.dynamics.nsteps, tuple(self.rows)
        return MDResult(frame, status, message, steps, rows, is_conservative(self.atoms.calc))


def _target_step(steps: int | None, time_ps: float | None, timestep_fs: float) -> int:
    if (steps is None) == (time_ps is None):
        raise InputError("give the length of the run either in steps or as time in ps")
    if steps is None:
        assert time_ps is not None
        if not math.isfinite(time_ps):
            raise InputError(f"time is {time_ps} ps; give a finite number")
        steps = round(1000 * time_ps / timestep_fs)
    if steps < 0:
        raise InputError(f"the run has {steps} steps; give 0 or more")
    return steps


def _rows(values: Sequence[Sequence[str]]) -> list[MDRow]:
    return [MDRow(int(line[0]), *map(float, line[1:])) for line in values]
