"""Prepare the mlearn sets for training: labels that agree, frames sorted by kind.

    python scripts/mlearn_data.py FOLDER OUT [--molybdenum MoNbTaW/train.extxyz.xz]

FOLDER holds mlearn_Li/train.extxyz.xz, mlearn_Li/test.extxyz.xz and so on: the official splits of
Zuo et al., J. Phys. Chem. A 124, 731 (2020), github.com/materialsvirtuallab/mlearn (BSD-3), as
extended XYZ with energy (eV), forces (eV/Å) and stress (eV/Å³, tension positive). OUT gets the same
files with two changes to the labels:

1. Where energies and stresses disagree, the pressure follows the energies. Along a strain ε from
   one frame to a close one, ΔE must be V σ:ε. A plane-wave calculation with a fixed energy cutoff
   breaks this by the Pulay stress: isotropic, and to first order c·n/V with one constant c for each
   atom (Francis and Payne, J. Phys. Condens. Matter 2, 4395 (1990)). c is the median over pairs of
   frames of the training set that differ by strain alone, and is taken out above 0.02 eV.
2. Sheared two-atom frames of Li lose their stress: its shear components are wrong in the source
   (they give C44 = −0.3 GPa where the energies give 11 GPa).

and the training frames once more, in files of each element that can be given weights:

- Li_bulk.extxyz.xz and so on: molecular dynamics, with and without vacancies;
- Li_strained.extxyz.xz: strained crystals, each as its primitive cell (most are perfect crystals of
  64 or 108 atoms: the same labels for a hundredth of the time), forces averaged over equal atoms;
- Li_surfaces.extxyz.xz;
- Mo_densities.extxyz.xz, if asked for: the molecular dynamics of pure Mo in the set of Li et al.,
  npj Comput. Mater. 6, 70 (2020), at three densities where mlearn has one. Its energies have the
  same zero. Its surfaces are left out: two of them are test frames of mlearn.
"""

from __future__ import annotations

import argparse
import io
import lzma
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import ase.io
import numpy as np
import spglib
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import get_distances

from mlip.files import atomic_write

ELEMENTS = ("Li", "Si", "Cu", "Ni", "Ge", "Mo")
LARGEST_STRAIN = 0.03  # of a pair of frames; the error of the mean stress is of third order in it
SAME_SITES = 0.02  # fractional; frames whose sites differ more are not strained copies
SMALLEST_TRACE = 0.005  # of a pair that tells about the pressure
CLOSE = 0.022  # strain of a pair along which energies of this set should be smooth
NEGLIGIBLE_EV = 0.02
RIGHT_ANGLE = 0.01  # degrees; a cell with angles farther from 90 is sheared
EQUAL_SITES = (
    2e-3  # Å; a shift that moves every atom onto another to within this is a lattice vector
)
KINDS = {"Elastic": "strained", "Surface": "surfaces", "AIMD-NVT": "bulk", "Vacancy": "bulk"}


def read_frames(path: Path) -> list[Atoms]:
    """Read all frames at once: ASE goes back and forth, which xz answers by starting anew."""
    with lzma.open(path, "rt") as file:
        return ase.io.read(io.StringIO(file.read()), ":", format="extxyz")


def write_frames(path: Path, frames: Sequence[Atoms]) -> None:
    """Write extended XYZ, compressed; whole or not at all."""
    with atomic_write(path) as file, lzma.open(file, "wt", encoding="utf-8") as text:
        ase.io.write(text, frames, format="extxyz")


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


def work_and_energy(
    first: Atoms, second: Atoms, largest: float = LARGEST_STRAIN
) -> tuple[float, float, float] | None:
    """Give tr ε, the work of the mean stress and ΔE of a pair (eV per atom); None if far apart.

    The strain is the logarithm of the stretch P in C₂ = C₁·P·R (rows are lattice vectors); the
    stress of the second frame is turned back by R.
    """
    deformation = np.linalg.solve(first.cell.array, second.cell.array)
    left, stretch, right = np.linalg.svd(deformation)
    if not 1e-4 < np.abs(stretch - 1).max() < largest:
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


def largest_jump(frames: list[Atoms], c: float) -> float:
    """Give the largest |work − ΔE − c·tr ε| of close strained crystals, eV per atom.

    No smooth potential follows labels that jump, as they do where a calculation changes its grid.
    """
    crystals = strained_copies([atoms for atoms in frames if kind(atoms) == "strained"])
    found = [work_and_energy(*pair, CLOSE) for pair in combinations(crystals, 2)]
    return max(abs(pair[1] - pair[2] - c * pair[0]) for pair in found if pair is not None)


def corrected(atoms: Atoms, c: float) -> Atoms:
    """Copy a frame with its labels, the stress without c/V for each atom."""
    copy = atoms.copy()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    sheared = np.abs(atoms.cell.angles() - 90).max() > RIGHT_ANGLE
    if not (len(atoms) == 2 and atoms.symbols[0] == "Li" and sheared):
        pressure = c * len(atoms) / atoms.get_volume()
        labels["stress"] = atoms.get_stress() - pressure * np.array([1, 1, 1, 0, 0, 0])
    copy.calc = SinglePointCalculator(copy, **labels)
    return copy


def kind(atoms: Atoms) -> str:
    """Give the file that a training frame belongs to, from the group its source states."""
    return KINDS[atoms.info.get("config_type") or atoms.info["config_type_inferred"]]


def primitive(atoms: Atoms) -> Atoms:
    """Give the primitive cell of a crystal, not turned, with the labels that belong to it.

    Forces are averaged over atoms that a lattice vector connects.
    """
    crystal = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    found = spglib.standardize_cell(
        crystal, to_primitive=True, no_idealize=True, symprec=EQUAL_SITES
    )
    if found is None or len(found[2]) == len(atoms):
        return atoms
    cell, sites, numbers = found
    small = Atoms(numbers, scaled_positions=sites, cell=cell, pbc=True)
    _, distances = get_distances(atoms.positions, small.positions, cell=cell, pbc=True)
    nearest = distances.argmin(axis=1)
    ratio = len(atoms) // len(small)
    if (np.bincount(nearest, minlength=len(small)) != ratio).any():
        return atoms
    forces = np.zeros((len(small), 3))
    np.add.at(forces, nearest, atoms.get_forces() / ratio)
    labels = {k: v for k, v in atoms.calc.results.items() if k == "stress"}
    energy = atoms.get_potential_energy() / ratio
    small.calc = SinglePointCalculator(small, energy=energy, forces=forces, **labels)
    return small


def main() -> None:
    """Parse the command line, print the constants and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--molybdenum", type=Path, help="the set of Mo-Nb-Ta-W")
    arguments = parser.parse_args()
    kinds: dict[tuple[str, str], list[Atoms]] = {}
    print("| element | pairs | c (eV) | GPa | taken out | largest jump (meV/atom) |")
    print("|---|--:|--:|--:|---|--:|")
    for element in ELEMENTS:
        source, target = (f / f"mlearn_{element}" for f in (arguments.folder, arguments.out))
        parts = {p: read_frames(source / f"{p}.extxyz.xz") for p in ("train", "test")}
        c, pairs = pulay_constant(parts["train"])
        volumes = Counter(round(a.get_volume() / len(a), 1) for a in parts["train"])
        pressure = c / volumes.most_common(1)[0][0] * 160.21766208
        used = abs(c) > NEGLIGIBLE_EV
        jump = largest_jump(parts["train"], c if used else 0.0)
        print(
            f"| {element} | {pairs} | {c:.4f} | {pressure:.2f} | {'yes' if used else 'no'} "
            f"| {jump * 1000:.2f} |"
        )
        for part, frames in parts.items():
            changed = [corrected(atoms, c if used else 0.0) for atoms in frames]
            write_frames(target / f"{part}.extxyz.xz", changed)
            for atoms in changed if part == "train" else ():
                small = primitive(atoms) if kind(atoms) == "strained" else atoms
                kinds.setdefault((element, kind(atoms)), []).append(small)
    if arguments.molybdenum:
        alloys = read_frames(arguments.molybdenum)
        kinds["Mo", "densities"] = [a for a in alloys if a.info["config_type"] == "Mo_AIMD"]
    for names, frames in kinds.items():
        write_frames(arguments.out / f"{'_'.join(names)}.extxyz.xz", frames)


if __name__ == "__main__":
    main()
