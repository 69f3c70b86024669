"""Relax structures with ASE's optimisers and cell filter: one, or any number with a status each.

The optimisers, the filter and the convergence criterion are ASE's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE, LBFGS
from ase.optimize.optimize import Optimizer

from mlip.errors import InputError, MlipError
from mlip.graph import as_atoms
from mlip.simulation.calculator import as_calculator, describe
from mlip.simulation.conservation import (
    IN_RELAXATION,
    require_stress,
    warn_of_direct_forces,
)
from mlip.simulation.guards import VOLUME_FACTOR, FusionGuard, not_finite
from mlip.simulation.inputs import NamedStructure
from mlip.simulation.output import ResumableFiles, clear_write_errors, extxyz_text, with_results
from mlip.simulation.relax_summary import RelaxRow, csv_line, read_rows

OPTIMIZERS: dict[str, type[Optimizer]] = {"fire": FIRE, "lbfgs": LBFGS}
# What the cell may do, as settings of ASE's filter; fixed has none.
CELLS: dict[str, dict[str, bool]] = {
    "fixed": {},
    "iso": {"hydrostatic_strain": True},
    "shape": {"constant_volume": True},
    "full": {},
}

StepCallback = Callable[[int, float, float], None]


@dataclass(frozen=True)
class RelaxResult:
    """Outcome of one relaxation.

    Attributes:
        atoms: final structure with its results; the last sound one if it diverged.
        status: ``converged``, ``max_steps``, ``diverged`` or ``error``.
        energy: eV, without the pressure term.
        max_force: largest force on an atom that may move, eV/Å.
        max_stress: largest component of stress plus pressure that the cell mode relaxes, eV/Å³;
            NaN for a fixed cell.
        steps: optimiser steps taken.
        message: what went wrong, or "".
    """

    atoms: Atoms
    status: str
    energy: float = math.nan
    max_force: float = math.nan
    max_stress: float = math.nan
    steps: int = 0
    message: str = ""

    @property
    def converged(self) -> bool:
        """Tell whether the criterion was met."""
        return self.status == "converged"


@dataclass(frozen=True)
class RelaxSettings:
    """How to relax; checked when built.

    Args:
        optimizer: ``fire`` or ``lbfgs``.
        cell: ``fixed``; ``iso`` (volume only); ``shape`` (volume kept); ``full``.
        pressure_GPa: external pressure, for ``iso`` and ``full``.
        fmax: converged when no force on an atom and no row of the cell's force (ASE's
            definition, stress times volume per atom) is larger, eV/Å.
        steps: at most so many optimiser steps.

    Raises:
        InputError: an unknown name or a value out of range; the text lists what is allowed.
    """

    optimizer: str = "fire"
    cell: str = "fixed"
    pressure_GPa: float = 0.0
    fmax: float = 0.01
    steps: int = 500

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("cell", CELLS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}"
                )
        if not (math.isfinite(self.fmax) and self.fmax > 0):
            raise InputError(f"fmax is {self.fmax} eV/Å; give a positive number")
        if self.steps < 0:
            raise InputError(f"steps is {self.steps}; give 0 or more")
        if not math.isfinite(self.pressure_GPa):
            raise InputError(f"pressure is {self.pressure_GPa} GPa; give a finite number")
        if self.pressure_GPa != 0 and self.cell in ("fixed", "shape"):
            raise InputError(
                f"pressure has no effect with cell {self.cell!r} (constant volume); "
                "use cell 'iso' or 'full'"
            )


def relax(
    structure: Any,
    calculator: Any,
    *,
    optimizer: str = "fire",
    cell: str = "fixed",
    pressure_GPa: float = 0.0,
    fmax: float = 0.01,
    steps: int = 500,
    trajectory: str | os.PathLike[str] | None = None,
    on_step: StepCallback | None = None,
) -> RelaxResult:
    """Relax one structure; the structure passed in is not changed.

    Args:
        structure: ASE atoms (their constraints are kept) or a pymatgen structure.
        calculator: ASE calculator, potential, path of a potential or name of a shipped one.
        optimizer: see :class:`RelaxSettings`, like the next four.
        cell: what the cell may do.
        pressure_GPa: external pressure.
        fmax: convergence criterion, eV/Å.
        steps: limit of steps.
        trajectory: file of all steps, ``.traj`` or ``.extxyz``; replaced if it exists.
        on_step: called after each step with step, energy (eV) and largest force (eV/Å).

    Raises:
        InputError: bad settings, or a structure that cannot be computed.

    Warns:
        NonConservativeWarning: the forces are not derivatives of the energy.
    """
    settings = RelaxSettings(optimizer, cell, pressure_GPa, fmax, steps)
    chosen = as_calculator(calculator)
    warn_of_direct_forces(chosen, IN_RELAXATION)
    return _relax(structure, chosen, settings, trajectory, on_step)


def _relax(
    structure: Any,
    calculator: Any,
    settings: RelaxSettings,
    trajectory: str | os.PathLike[str] | None,
    on_step: StepCallback | None,
) -> RelaxResult:
    """Do what :func:`relax` says, with a ready calculator."""
    atoms = as_atoms(structure).copy()
    _check_structure(atoms, settings)
    if settings.cell != "fixed":
        require_stress(calculator, f"cell {settings.cell!r}")
    atoms.calc = calculator
    target = _with_cell(atoms, settings)
    run = _Relaxation(atoms, target, settings, on_step)
    options = {} if trajectory is None else _trajectory_options(Path(trajectory))
    with OPTIMIZERS[settings.optimizer](target, logfile=None, **options) as dynamics:
        if trajectory is not None and not options:
            dynamics.attach(_extxyz_writer(atoms, Path(trajectory)))
        return run.result(dynamics)


class _Relaxation:
    """Drive one optimiser, watching each step and remembering the last sound one."""

    def __init__(
        self,
        atoms: Atoms,
        target: Atoms | FrechetCellFilter,
        settings: RelaxSettings,
        on_step: StepCallback | None,
    ) -> None:
        self.atoms = atoms
        self.target = target
        self.settings = settings
        self.on_step = on_step
        self.guard = FusionGuard(atoms)
        self.volume = atoms.cell.volume
        self.sound: RelaxResult | None = None

    def result(self, dynamics: Optimizer) -> RelaxResult:
        """Run to convergence, the limit of steps, or the first unsound step."""
        status = "max_steps"
        for converged in dynamics.irun(fmax=self.settings.fmax, steps=self.settings.steps):
            problem = self._problem()
            if problem is not None:
                return self._diverged(problem, dynamics.nsteps)
            self.sound = self._snapshot(dynamics.nsteps)
            if self.on_step is not None:
                self.on_step(dynamics.nsteps, self.sound.energy, self.sound.max_force)
            if converged:
                status = "converged"
        assert self.sound is not None
        message = "" if status == "converged" else f"not converged in {self.settings.steps} steps"
        return _replace(self.sound, status=status, message=message)

    def _problem(self) -> str | None:
        energy, forces = self.atoms.get_potential_energy(), self.atoms.get_forces()
        problem = not_finite(energy, forces, self.atoms) or self.guard.problem(self.atoms)
        if problem is None and self.target is not self.atoms:
            if not np.isfinite(self.target.stress).all():
                return "the stress is not finite"
            ratio = self.atoms.cell.volume / self.volume
            if not 1 / VOLUME_FACTOR < ratio < VOLUME_FACTOR:
                return f"the volume changed by a factor of {ratio:.3g}"
        return problem

    def _snapshot(self, steps: int) -> RelaxResult:
        results = {name: _copied(value) for name, value in _results(self.atoms).items()}
        cell_relaxes = self.target is not self.atoms
        return RelaxResult(
            atoms=with_results(self.atoms, results),
            status="",
            energy=float(self.atoms.get_potential_energy()),
            max_force=float(np.linalg.norm(self.atoms.get_forces(), axis=1).max()),
            max_stress=float(np.abs(self.target.stress).max()) if cell_relaxes else math.nan,
            steps=steps,
        )

    def _diverged(self, problem: str, steps: int) -> RelaxResult:
        message = f"{problem} at step {steps}"
        if self.sound is None:
            return RelaxResult(self.atoms, "diverged", steps=steps, message=message)
        return _replace(self.sound, status="diverged", steps=steps, message=message)


def relax_many(
    structures: Iterable[Any],
    calculator: Any,
    output: str | os.PathLike[str],
    *,
    settings: RelaxSettings | None = None,
    facts: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_structure: Callable[[RelaxRow], None] | None = None,
    on_step: StepCallback | None = None,
) -> list[RelaxRow]:
    """Relax structures one after the other; a bad one gets a status and the others go on.

    Args:
        structures: atoms, or pairs of a name and atoms (or the error met in reading them).
        calculator: as for :func:`relax`.
        output: extxyz file of the final structures, with index, name, status and message of each;
            a summary in ``.csv`` and the record of the run in ``.json`` lie beside it. Structures
            without any result are in the summary alone.
        settings: how to relax.
        facts: more that a resumed run must have in common, for the record; JSON-able.
        resume: skip what an earlier, killed run with the same settings has finished.
        on_structure: called with the line of each structure, those of the earlier run included.
        on_step: as for :func:`relax`.

    Raises:
        InputError: other settings or other structures than those of the run to be resumed.
        MlipError: the files cannot be written.
    """
    chosen = settings or RelaxSettings()
    calculator = as_calculator(calculator)
    warn_of_direct_forces(calculator, IN_RELAXATION)
    path = Path(output)
    summary = path.with_suffix(".csv")
    record = {**asdict(chosen), **(facts or {}), "calculator": describe(calculator)}
    rows: list[RelaxRow] = []
    files = ResumableFiles([path, summary], path.with_suffix(".json"), record, resume)
    with files:
        if files.done or files.finished:
            rows = read_rows(summary if files.finished else Path(f"{summary}.part"))
        elif not files.finished:
            files.append("", csv_line(RelaxRow.columns()))
        for index, (name, item) in enumerate(_named(structures)):
            if index < len(rows):
                _check_same(rows[index], item, path)
            elif files.finished:
                raise InputError(f"{path}: finished earlier with {len(rows)} structures, now more")
            else:
                row, frame = _relax_one(index, name, item, calculator, chosen, on_step)
                rows.append(row)
                files.append(frame, csv_line(asdict(row).values()))
                files.commit(len(rows))
            if on_structure is not None:
                on_structure(rows[index])
        files.finish()
    return rows


def _relax_one(
    index: int,
    name: str,
    item: Any,
    calculator: Any,
    settings: RelaxSettings,
    on_step: StepCallback | None,
) -> tuple[RelaxRow, str]:
    """Return the summary line and the frame of one structure, whatever happens."""
    try:
        if isinstance(item, Exception):
            raise item
        result = _relax(item, calculator, settings, None, on_step)
    except Exception as error:  # one bad structure must not end the others
        text = str(error) if isinstance(error, MlipError) else f"{type(error).__name__}: {error}"
        atoms = Atoms() if isinstance(item, Exception) else as_atoms(item)
        result = RelaxResult(atoms, "error", message=" ".join(text.split()))
    row = RelaxRow(
        index, name, _formula(result.atoms), len(result.atoms), result.status,
        result.energy, result.max_force, result.max_stress / units.GPa, result.steps,
        result.message,
    )  # fmt: skip
    if not math.isfinite(result.energy):
        return row, ""
    facts = {"index": index, "name": name, "status": result.status, "message": result.message}
    return row, extxyz_text(with_results(result.atoms, _results(result.atoms), **facts))


def _named(structures: Iterable[Any]) -> Iterator[NamedStructure]:
    for k, item in enumerate(structures):
        yield item if isinstance(item, tuple) else (f"structure {k}", item)


def _check_same(row: RelaxRow, item: Any, path: Path) -> None:
    formula = "" if isinstance(item, Exception) else _formula(as_atoms(item))
    if formula != row.formula:
        raise InputError(
            f"{path}: cannot resume, structure {row.index} was {row.formula or 'unreadable'} and "
            f"is {formula or 'unreadable'} now; give the same structures in the same order"
        )


def _formula(atoms: Atoms) -> str:
    return str(atoms.get_chemical_formula())


def _check_structure(atoms: Atoms, settings: RelaxSettings) -> None:
    if len(atoms) == 0:
        raise InputError("the structure has no atoms")
    if not np.isfinite(atoms.positions).all():
        raise InputError("a position of the structure is not finite")
    if settings.cell != "fixed" and not atoms.pbc.all():
        raise InputError(
            f"cell {settings.cell!r} needs a structure periodic in three directions; this one has "
            f"pbc = {atoms.pbc.tolist()}: use cell 'fixed'"
        )


def _with_cell(atoms: Atoms, settings: RelaxSettings) -> Atoms | FrechetCellFilter:
    if settings.cell == "fixed":
        return atoms
    pressure = settings.pressure_GPa * units.GPa
    return FrechetCellFilter(atoms, scalar_pressure=pressure, **CELLS[settings.cell])


def _trajectory_options(path: Path) -> dict[str, Any]:
    """Let ASE write .traj files; the other format gets a writer of its own."""
    if path.suffix == ".traj":
        return {"trajectory": str(path)}
    if path.suffix not in (".extxyz", ".xyz"):
        raise InputError(f"{path}: a trajectory is .traj or .extxyz")
    path.unlink(missing_ok=True)
    return {}


def _extxyz_writer(atoms: Atoms, path: Path) -> Callable[[], None]:
    def write() -> None:
        with clear_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(extxyz_text(with_results(atoms, _results(atoms))))

    return write


def _results(atoms: Atoms) -> Mapping[str, Any]:
    """Return what the calculator has for these very atoms after computing energy and forces."""
    atoms.get_forces()
    return {"energy": atoms.get_potential_energy(), **atoms.calc.results}


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def _replace(result: RelaxResult, **changes: Any) -> RelaxResult:
    return RelaxResult(**{**{f.name: getattr(result, f.name) for f in fields(result)}, **changes})
