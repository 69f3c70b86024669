"""What the demo does with a potential: relax structures, run dynamics, measure crystals.

Each stage takes a calculator and a folder, writes its files there and returns plain values for the
summary. A structure that fails is recorded with its reason and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from mlip.demo.crystals import Crystal, Relaxation, supercell
from mlip.errors import MlipError
from mlip.simulation.md import MDResult, MDRow, run_md
from mlip.simulation.relax import relax
from mlip.validation import plots, properties

TEMPERATURE_K = 600.0
TIMESTEP_FS = 2.0
LOG_INTERVAL = 5  # steps
FRAME_INTERVAL = 10  # steps
EQUILIBRATION = 0.25  # share of the thermostatted run left out of the averages

# Called with the work done, the whole work and a short remark.
Report = Callable[[int, int, str], None]


def relax_structures(
    structures: list[Relaxation], calculator: Any, folder: Path, report: Report, *, steps: int
) -> list[dict[str, Any]]:
    """Relax each structure; the steps of each go to an extxyz file of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (name, atoms, cell) in enumerate(structures):
        report(i, len(structures), name)
        path = folder / f"{name}.extxyz"
        result = relax(
            atoms,
            calculator,
            optimizer="fire" if cell == "fixed" else "lbfgs",
            cell=cell,
            fmax=0.01,
            steps=steps,
            trajectory=path,
        )
        start = ase.io.read(path, index=0)
        rows.append(
            {
                "name": name,
                "atoms": len(atoms),
                "cell": cell,
                "status": result.status,
                "message": result.message,
                "steps": result.steps,
                "energy_start": start.get_potential_energy() / len(atoms),
                "energy": result.energy / len(atoms),
                "max_force": result.max_force,
                "volume": result.atoms.get_volume() / len(atoms),
            }
        )
    report(len(structures), len(structures), "")
    return rows


def measure_crystals(
    crystals: dict[str, Crystal], calculator: Any, report: Report, *, points: int, steps: int
) -> tuple[dict[str, dict[str, Any]], dict[str, properties.EquationOfState]]:
    """Compute lattice constant, equation of state and elastic constants of each crystal.

    Returns:
        Values beside those of DFT by symbol, and the energy–volume curves of those that have one.
    """
    rows: dict[str, dict[str, Any]] = {}
    curves = {}
    for i, (symbol, crystal) in enumerate(crystals.items()):
        report(i, len(crystals), f"{symbol} {crystal.lattice}")
        rows[symbol] = {"lattice": crystal.lattice, "dft": _dft(crystal)}
        try:
            start = crystal.cell(1.01)
            relaxed = properties.relax_crystal(start, calculator, isotropic=True, steps=steps)
            curves[symbol] = properties.equation_of_state(
                relaxed, calculator, volume_range=0.1, points=points
            )
            constants = properties.elastic_constants(relaxed, calculator)
        except MlipError as error:
            rows[symbol]["error"] = str(error)
            continue
        cubic = properties.cubic_elasticity(constants)
        rows[symbol]["potential"] = {
            "a": float(relaxed.cell.lengths().mean()),
            "C11": cubic.c11_GPa,
            "C12": cubic.c12_GPa,
            "C44": cubic.c44_GPa,
            "B": curves[symbol].bulk_modulus_GPa,
        }
    report(len(crystals), len(crystals), "")
    return rows, curves


def _dft(crystal: Crystal) -> dict[str, float]:
    return {name: getattr(crystal, name) for name in ("a", "C11", "C12", "C44", "B")}


def simulate(
    crystal: Crystal,
    a: float,
    calculator: Any,
    folder: Path,
    report: Report,
    *,
    nvt_ps: float,
    nve_ps: float,
) -> tuple[dict[str, Any], list[plots.MdSegment], tuple[np.ndarray, dict[str, np.ndarray]] | None]:
    """Run NVT and then NVE dynamics of a supercell.

    Args:
        crystal: what to simulate.
        a: edge of its conventional cell, Å.
        calculator: ASE calculator.
        folder: of the trajectories and logs.
        report: called as the run goes on.
        nvt_ps: length with thermostat.
        nve_ps: length without.

    Returns:
        Values for the summary, stretches to plot, and distances with the radial distribution
        functions by name (None if the run diverged).
    """
    folder.mkdir(parents=True, exist_ok=True)
    atoms = supercell(crystal, a)
    total = round(1000 * (nvt_ps + nve_ps) / TIMESTEP_FS)
    nvt = _run("nvt-bussi", atoms, calculator, folder / "nvt", nvt_ps, (report, 0, total))
    label = f"NVT {TEMPERATURE_K:.0f} K"
    segments = [_segment(label, nvt, 0.0)]
    values = {"formula": atoms.get_chemical_formula(), "timestep_fs": TIMESTEP_FS, "a": a}
    values["nvt"] = _averages(nvt, nvt_ps, EQUILIBRATION)
    if nvt.status != "completed":
        return values, segments, None
    done = nvt.steps
    nve = _run("nve", nvt.atoms, calculator, folder / "nve", nve_ps, (report, done, total))
    segments.append(_segment("NVE", nve, nvt_ps))
    values["nve"] = _averages(nve, nve_ps, 0.0)
    values["nve"]["drift_meV_per_atom_per_ps"] = nve.drift_meV_per_atom_per_ps
    if nve.status != "completed":
        return values, segments, None
    return values, segments, _distributions(folder, label)


def _run(
    ensemble: str,
    atoms: Atoms,
    calculator: Any,
    path: Path,
    time_ps: float,
    progress: tuple[Report, int, int],
) -> MDResult:
    report, done, total = progress

    def on_log(row: MDRow) -> None:
        report(done + row.step, total, f"{ensemble[:3].upper()} {row.temperature_K:.0f} K")

    return run_md(
        atoms,
        calculator,
        ensemble=ensemble,
        temperature_K=TEMPERATURE_K,
        timestep_fs=TIMESTEP_FS,
        time_ps=time_ps,
        trajectory=path.with_suffix(".extxyz"),
        log=path.with_suffix(".csv"),
        log_interval=LOG_INTERVAL,
        trajectory_interval=FRAME_INTERVAL,
        on_log=on_log,
    )


def _segment(label: str, result: MDResult, start_ps: float) -> plots.MdSegment:
    potential = np.array([row.potential_eV for row in result.rows])
    number = len(result.atoms)
    return plots.MdSegment(
        label,
        start_ps + result.times_ps,
        potential / number,
        result.energies / number,
        result.temperatures,
    )


def _averages(result: MDResult, time_ps: float, discard: float) -> dict[str, Any]:
    temperatures = result.temperatures[int(discard * len(result.rows)) :]
    return {
        "time_ps": time_ps,
        "status": result.status,
        "message": result.message,
        "temperature_K": float(temperatures.mean()),
        "temperature_std_K": float(temperatures.std()),
    }


def _distributions(folder: Path, label: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Average g(r) over the trajectories, read back from their files."""
    thermal = ase.io.read(folder / "nvt.extxyz", index=":")
    r, nvt = properties.radial_distribution(thermal[int(EQUILIBRATION * len(thermal)) :])
    _, nve = properties.radial_distribution(ase.io.read(folder / "nve.extxyz", index=":"))
    return r, {label: nvt, "NVE": nve}
