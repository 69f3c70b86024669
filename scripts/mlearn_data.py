"""Prepare the training data of the shipped potential: the mlearn sets, with stresses that agree.

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

The training frames come once more, cut in two: mlearn_Li/bulk.extxyz.xz and so on, and
surfaces.extxyz.xz of all elements, which are few and learned as a set of their own.

With FOLDER/MoNbTaW/train.extxyz.xz (Li et al., npj Comput. Mater. 6, 70 (2020),
github.com/materialsvirtuallab/maml, BSD-3) OUT also gets its 200 frames of molecular dynamics of
pure Mo, forces alone: energies and pressures of the two sets differ by up to 3 meV/atom and 2 GPa.
None is near a frame of mlearn's test set (0.16 Å or more, root mean square over the atoms).
"""

from __future__ import annotations

import argparse
import io
import lzma
from itertools import combinations
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

ELEMENTS = ("Li", "Si", "Cu", "Ni", "Ge", "Mo")
SURFACES = "surfaces.extxyz.xz"
MOLYBDENUM = "Mo_dynamics.extxyz.xz"
LARGEST_STRAIN = 0.03  # of a pair of frames; the error of the mean stress is of third order in it
SAME_SITES = 0.02  # fractional; frames whose sites differ more are not strained copies
SMALLEST_TRACE = 0.005  # of a pair that tells about the pressure
NEGLIGIBLE_EV = 0.02
LARGEST_BULK_VOLUME = 1.25  # of an atom, in units of the median; surfaces have twice
GPA = 160.21766208  # one eV/Å³


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


def prepare(source: Path, target: Path) -> list[Atoms]:
    """Write the frames of an element; print a row of the table; give the surfaces."""
    target.mkdir(parents=True, exist_ok=True)
    parts = {part: ase.io.read(source / f"{part}.extxyz.xz", ":") for part in ("train", "test")}
    c, pairs = pulay_constant(parts["train"])
    used = abs(c) > NEGLIGIBLE_EV
    for part, frames in parts.items():
        parts[part] = [corrected(atoms, c if used else 0.0) for atoms in frames]
        ase.io.write(target / f"{part}.extxyz.xz", parts[part], format="extxyz")
    volumes = np.array([atoms.get_volume() / len(atoms) for atoms in parts["train"]])
    of_bulk = float(np.median(volumes))
    vacuum = (volumes > LARGEST_BULK_VOLUME * of_bulk).tolist()
    bulk = [atoms for atoms, half in zip(parts["train"], vacuum, strict=True) if not half]
    ase.io.write(target / "bulk.extxyz.xz", bulk, format="extxyz")
    row = (source.name, pairs, f"{c:.4f}", f"{c / of_bulk * GPA:.2f}", "yes" if used else "no")
    print("| " + " | ".join(map(str, row)) + f" | {sum(vacuum)} |")
    return [atoms for atoms, half in zip(parts["train"], vacuum, strict=True) if half]


def dynamics_of_molybdenum(source: Path) -> list[Atoms]:
    """Frames of molecular dynamics of Mo in the alloy set, with forces alone."""
    frames = []
    with lzma.open(source, "rt") as file:
        text = io.StringIO(file.read())  # ASE seeks, which takes minutes in a compressed file
    for atoms in ase.io.read(text, ":", format="extxyz"):
        if atoms.info["config_type"] == "Mo_AIMD":
            copy = atoms.copy()
            copy.calc = SinglePointCalculator(copy, forces=atoms.get_forces())
            frames.append(copy)
    return frames


def main() -> None:
    """Parse the command line, print the constants and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print("| set | pairs | c (eV) | GPa | taken out | surfaces |")
    print("|---|--:|--:|--:|---|--:|")
    surfaces = []
    for element in ELEMENTS:
        name = f"mlearn_{element}"
        surfaces += prepare(arguments.folder / name, arguments.out / name)
    ase.io.write(arguments.out / SURFACES, surfaces, format="extxyz")
    alloys = arguments.folder / "MoNbTaW" / "train.extxyz.xz"
    if alloys.exists():
        ase.io.write(arguments.out / MOLYBDENUM, dynamics_of_molybdenum(alloys), format="extxyz")


if __name__ == "__main__":
    main()
