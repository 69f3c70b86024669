"""An OC20-like data set from nothing: adsorbates on fcc metals, labelled by EMT, as raw files.

EMT (effective-medium theory, part of ASE) stands in for density functional theory. The files have
the layout of raw OC20: N.extxyz, and N.txt with system, frame and reference energy of each frame.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ase.build
import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.extxyz import write_extxyz
from ase.optimize import BFGS

from mlip.files import atomic_write

METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
SITES = {"fcc111": ("ontop", "bridge", "fcc", "hcp"), "fcc100": ("ontop", "bridge", "hollow")}
SLABS = ((2, 2, 3), (3, 3, 2))  # atoms along x and y, layers
# Symbols from the binding atom upwards, and the bond length, Å.
ADSORBATES = {
    "H": 0.0, "C": 0.0, "N": 0.0, "O": 0.0,
    "CH": 1.09, "CO": 1.15, "NH": 1.02, "NO": 1.17, "OH": 0.97,
}  # fmt: skip
VACUUM = 7.0  # Å on either side
SUBSURFACE, SURFACE, ADSORBATE = 0, 1, 2  # tags as OC20 has them
FIRST_SID = 1000

Report = Callable[[int, int], None]


class Frame(NamedTuple):
    """One labelled frame: its system, its number there, and what makes its adsorption energy.

    reference_energy: energies of the relaxed clean slab and of the free adsorbate, eV.
    """

    atoms: Atoms
    sid: int
    fid: int
    reference_energy: float


class Recipe(NamedTuple):
    """What one system is made of."""

    metal: str
    face: str
    size: tuple[int, int, int]
    adsorbate: str
    site: str


def write_raw_files(
    folder: Path, *, systems: int, frames: int, files: int, seed: int, report: Report | None = None
) -> int:
    """Write frames of all systems, shuffled over raw OC20 files, and give their number.

    Args:
        folder: gets ``0.extxyz``, ``0.txt``, ``1.extxyz`` and so on.
        systems: number of adsorbate–slab systems.
        frames: of each system: most from its relaxation, the rest rattled.
        files: number of pairs of files.
        seed: the same seed gives the same files.
        report: called after each system with systems done and to do.
    """
    made: list[Frame] = []
    for k, recipe in enumerate(choose_recipes(systems, seed)):
        made += system_frames(recipe, FIRST_SID + k, frames, np.random.default_rng([seed, k]))
        if report is not None:
            report(k + 1, systems)
    order = np.random.default_rng(seed).permutation(len(made))
    for number, part in enumerate(np.array_split(order, files)):
        _write_pair(folder / str(number), [made[i] for i in part])
    return len(made)


def choose_recipes(count: int, seed: int) -> list[Recipe]:
    """Draw different systems at random."""
    every = [
        Recipe(metal, face, size, adsorbate, site)
        for metal, face, size, adsorbate in itertools.product(METALS, SITES, SLABS, ADSORBATES)
        for site in SITES[face]
    ]
    chosen = np.random.default_rng(seed).choice(len(every), size=count, replace=False)
    return [every[i] for i in chosen]


def system_frames(recipe: Recipe, sid: int, count: int, rng: np.random.Generator) -> list[Frame]:
    """Make labelled frames of one system: its relaxation thinned out, and rattled copies."""
    slab = build_slab(recipe)
    clean = slab.copy()
    clean.calc = EMT()
    BFGS(clean, logfile=None).run(fmax=0.05, steps=50)
    molecule = build_adsorbate(recipe.adsorbate)
    molecule.calc = EMT()
    reference = clean.get_potential_energy() + molecule.get_potential_energy()

    start = add_adsorbate(slab, recipe, height=rng.uniform(1.2, 2.0))
    rattle(start, 0.05, rng)
    path = relax(start)
    rattled = max(1, count // 3)
    places = np.linspace(0, len(path) - 1, min(count - rattled, len(path))).round().astype(int)
    chosen = [path[i] for i in places]
    while len(chosen) < count:
        chosen.append(path[-1].copy())
        rattle(chosen[-1], rng.uniform(0.05, 0.2), rng)
    return [Frame(labelled(atoms), sid, fid, reference) for fid, atoms in enumerate(chosen)]


def build_slab(recipe: Recipe) -> Atoms:
    """Build a clean slab with OC20's tags and its sub-surface layers fixed."""
    slab = getattr(ase.build, recipe.face)(
        recipe.metal, recipe.size, vacuum=VACUUM, periodic=True
    )
    layer = slab.get_tags()  # ASE counts layers from the top, starting with one
    slab.set_tags(np.where(layer == 1, SURFACE, SUBSURFACE))
    slab.set_constraint(FixAtoms(mask=layer > 1))
    return slab


def build_adsorbate(name: str) -> Atoms:
    """Build an adsorbate that stands on its binding atom, tagged as OC20 does."""
    bond = ADSORBATES[name]
    heights = [(0.0, 0.0, bond * i) for i in range(2 if bond else 1)]
    return Atoms(name, positions=heights, tags=[ADSORBATE] * len(heights))


def add_adsorbate(slab: Atoms, recipe: Recipe, height: float) -> Atoms:
    """Put the adsorbate on its site, ``height`` Å above the surface."""
    atoms = slab.copy()
    ase.build.add_adsorbate(atoms, build_adsorbate(recipe.adsorbate), height, recipe.site)
    atoms.info.clear()
    return atoms


def rattle(atoms: Atoms, amplitude: float, rng: np.random.Generator) -> None:
    """Move the free atoms at random, with standard deviation ``amplitude`` Å."""
    free = atoms.get_tags() != SUBSURFACE
    atoms.positions[free] += rng.normal(0, amplitude, (int(free.sum()), 3))


def relax(atoms: Atoms) -> list[Atoms]:
    """Relax the free atoms and give the structure after each step, the first included."""
    atoms.calc = EMT()
    optimizer = BFGS(atoms, logfile=None, maxstep=0.1)
    return [atoms.copy() for _ in optimizer.irun(fmax=0.03, steps=40)]


def labelled(atoms: Atoms) -> Atoms:
    """Give a copy with EMT energy and raw forces (those on fixed atoms included)."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, free_energy=energy, forces=forces)
    return atoms


def _write_pair(stem: Path, frames: list[Frame]) -> None:
    text, lines = io.StringIO(), []
    columns = ["symbols", "positions", "move_mask", "tags", "forces"]
    for frame in frames:
        write_extxyz(text, [frame.atoms], columns=columns)
        lines.append(f"random{frame.sid},frame{frame.fid},{frame.reference_energy:.8f}\n")
    with atomic_write(stem.with_suffix(".txt"), "w") as file:
        file.writelines(lines)
    with atomic_write(stem.with_suffix(".extxyz"), "w") as file:
        file.write(text.getvalue())
