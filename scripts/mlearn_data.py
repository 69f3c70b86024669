"""Correct the stress labels of the mlearn sets, so that energies and stresses agree.

    python scripts/mlearn_data.py FOLDER OUT

FOLDER holds mlearn_Li/train.extxyz.xz, mlearn_Li/test.extxyz.xz and so on: the official splits of
Zuo et al., J. Phys. Chem. A 124, 731 (2020), github.com/materialsvirtuallab/mlearn (BSD-3), as
extended XYZ with energy (eV), forces (eV/Å) and stress (eV/Å³, tension positive). OUT gets the same
files with two changes:

1. Where energies and stresses disagree, the pressure follows the energies. Along a strain ε from
   one frame to a close one, ΔE must be V σ:ε. A plane-wave calculation with a fixed energy cutoff
   breaks this by the Pulay stress: isotropic, and to first order c·n/V with one constant c for each
   atom (Francis and Payne, J. Phys. Condens. Matter 2, 4395 (1990)). c is the median over pairs of
   frames of the training set that differ by strain alone, and is taken out above 0.02 eV.
2. Two-atom frames of Li lose their stress: its shear components are wrong in the source (they give
   C44 = −0.3 GPa where the energies give 11 GPa).
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import combinations
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

ELEMENTS = ("Li", "Si", "Cu", "Ni", "Ge", "Mo")
LARGEST_STRAIN = 0.03  # of a pair of frames; the error of the mean stress is of third order in it
SAME_SITES = 0.02  # fractional; frames whose sites differ more are not strained copies
SMALLEST_TRACE = 0.005  # of a pair that tells about the pressure
NEGLIGIBLE_EV = 0.02


def strained_copies(frames: list[Atoms]) -> list[Atoms]:
    """Find the frames that are the same crystal under different strains: the largest such group."""
    groups: list[tuple[np.ndarray, list[Atoms]]] = []
    for atoms in frames:
        sites = atoms.get_scaled_positions(wrap=False)
        sites = sites - sites[0]
        for other, members in groups:
            if len(other) == len(sites):
                shift = sites - other
                if np.abs(shift - np.round(shift)).max() < SAME_SITES:
                    members.append(atoms)
                    break
        else:
            groups.append((sites, [atoms]))
    return max((members for _, members in groups), key=len)


def work_and_energy(first: Atoms, second: Atoms) -> tuple[float, float, float] | None:
    """Give tr ε, the work of the mean stress and ΔE of a pair (eV per atom); None if far apart.

    The strain is the logarithm of the stretch P in C₂ = C₁·P·R (rows are lattice vectors); the
    stress of the second frame is turned back by R.
    """
    deformation = np.linalg.solve(first.cell.array, second.cell.array)
    left, stretch, right = np.linalg.svd(deformation)
    if not 1e-4 < np.abs(stretch - 1).max() < LARGEST_STRAIN:
        return None
    strain = left @ np.diag(np.log(stretch)) @ left.T
    rotation = left @ right
    stress_1 = first.get_stress(voigt=False) * first.get_volume()
    stress_2 = rotation @ second.get_stress(voigt=False) @ rotation.T * second.get_volume()
    sites = second.get_scaled_positions(wrap=False) - first.get_scaled_positions(wrap=False)
    sites -= np.round(sites)
    moved = sum((a.get_forces() * (sites @ a.cell.array)).sum() for a in (first, second)) / 2
    work = ((stress_1 + stress_2) * strain).sum() / 2 - moved
    energy = second.get_potential_energy() - first.get_potential_energy()
    return float(np.trace(strain)), work / len(first), energy / len(first)


def pulay_constant(frames: list[Atoms]) -> tuple[float, int]:
    """Give the median c of work − ΔE = c·tr ε over pairs of strained copies, and their number."""
    found = [work_and_energy(*pair) for pair in combinations(strained_copies(frames), 2)]
    pairs = [pair for pair in found if pair is not None and abs(pair[0]) > SMALLEST_TRACE]
    trace, work, energy = np.array(pairs).T
    return float(np.median((work - energy) / trace)), len(pairs)


def corrected(atoms: Atoms, c: float) -> Atoms:
    """Copy a frame with its labels, the stress without c/V for each atom."""
    copy = atoms.copy()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if not (len(atoms) == 2 and atoms.symbols[0] == "Li"):
        pressure = c * len(atoms) / atoms.get_volume()
        labels["stress"] = atoms.get_stress() - pressure * np.array([1, 1, 1, 0, 0, 0])
    copy.calc = SinglePointCalculator(copy, **labels)
    return copy


def main() -> None:
    """Parse the command line, print the constants and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print("| element | pairs | c (eV) | GPa | taken out |")
    print("|---|--:|--:|--:|---|")
    for element in ELEMENTS:
        source, target = (f / f"mlearn_{element}" for f in (arguments.folder, arguments.out))
        target.mkdir(parents=True, exist_ok=True)
        parts = {p: ase.io.read(source / f"{p}.extxyz.xz", ":") for p in ("train", "test")}
        c, pairs = pulay_constant(parts["train"])
        volumes = Counter(round(a.get_volume() / len(a), 1) for a in parts["train"])
        pressure = c / volumes.most_common(1)[0][0] * 160.21766208
        used = abs(c) > NEGLIGIBLE_EV
        print(f"| {element} | {pairs} | {c:.4f} | {pressure:.2f} | {'yes' if used else 'no'} |")
        for part, frames in parts.items():
            changed = [corrected(atoms, c if used else 0.0) for atoms in frames]
            ase.io.write(target / f"{part}.extxyz.xz", changed, format="extxyz")


if __name__ == "__main__":
    main()
