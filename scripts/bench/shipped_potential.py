"""Measure the shipped potential: errors on the official test sets, drift of the total energy.

    python scripts/bench/shipped_potential.py FOLDER [--potential mlearn-facet] [--threads 1]

FOLDER holds mlearn_Li/test.extxyz.xz and so on, with the pressures that scripts/mlearn_data.py
corrects (energies and forces are the official ones). Prints the tables of the model card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ase.build import bulk
from ase.data import chemical_symbols

from mlip.potential import load_potential
from mlip.simulation.calculator import Calculator
from mlip.simulation.evaluate import evaluate
from mlip.validation.properties import nve_drift


def print_errors(folder: Path, name: str) -> None:
    """Print the mean absolute errors on each test set."""
    potential = load_potential(name)
    elements = [chemical_symbols[number] for number in potential.elements]
    columns = []
    for element in elements:
        data = folder / f"mlearn_{element}" / "test.extxyz.xz"
        columns.append(evaluate(data, potential, plots=False).overall)
    print("| mean absolute error | " + " | ".join(elements) + " |")
    print("|---|" + "--:|" * len(elements))
    for label, quantity, factor, digits in (
        ("energy (meV/atom)", "energy", 1000, 2),
        ("forces (eV/Å)", "forces", 1, 4),
        ("stress (GPa)", "stress", 1, 3),
    ):
        values = [f"{c[quantity].mae * factor:.{digits}f}" for c in columns]
        print(f"| {label} | " + " | ".join(values) + " |")


def print_drift(name: str, duration_ps: float) -> None:
    """Print drift and fluctuation of the total energy of copper at 600 K."""
    print(f"\nNVE, 108 copper atoms, 600 K, {duration_ps:g} ps")
    print("| precision | time step (fs) | slope (meV/atom/ps) | fluctuation (meV/atom) |")
    print("|---|--:|--:|--:|")
    atoms = bulk("Cu", a=3.63, cubic=True).repeat(3)
    for dtype, timestep_fs in (("float32", 1.0), ("float64", 1.0), ("float64", 2.0)):
        found = nve_drift(
            atoms,
            Calculator(name, dtype=dtype),
            temperature_K=600,
            timestep_fs=timestep_fs,
            duration_ps=duration_ps,
        )
        print(f"| {dtype} | {timestep_fs:g} | {found.slope:.1e} | {found.fluctuation:.1e} |")


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--potential", default="mlearn-facet")
    parser.add_argument("--duration", type=float, default=2.0, help="of the NVE runs, ps")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_errors(arguments.folder, arguments.potential)
    print_drift(arguments.potential, arguments.duration)


if __name__ == "__main__":
    main()
