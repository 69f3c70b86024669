"""Make more training frames of an element: labels are the mean of several potentials.

    python scripts/teacher_frames.py FRAMES ... --teachers FIRST SECOND ... --out OUT.extxyz.xz

For an element with so few frames that a potential learns them by heart. Potentials that were
trained apart, with other sizes, cutoffs or seeds, are wrong in different places, so their mean is
better than each; one that is trained on FRAMES and on what the mean says between them comes close
to it (distillation of an ensemble, Hinton et al., arXiv 1503.02531).

Every frame of FRAMES starts molecular dynamics without thermostat, by the first teacher, at the
temperature of equipartition: its potential energy above the lowest of its file, for each atom, is
3/2 kT. Where the teachers differ by more than --disagreement none of them knows: such frames are
left out, and those on which one fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from mlearn_data import read_frames, write_frames
from rich.progress import track

import mlip
from mlip.potential import Potential, load_potential
from mlip.simulation.dynamics import draw_velocities
from mlip.simulation.predict import predict_batch

COLDEST, HOTTEST = 100.0, 6000.0  # K
LABELS = ("energy", "forces", "stress")


def temperatures(frames: Sequence[Atoms]) -> np.ndarray:
    """Give the temperature of each frame by equipartition, K: [len(frames)]."""
    energies = np.array([atoms.get_potential_energy() / len(atoms) for atoms in frames])
    return np.clip(2 / 3 * (energies - energies.min()) / units.kB, COLDEST, HOTTEST)


def snapshots(
    atoms: Atoms,
    calculator: ASECalculator,
    temperature_K: float,
    rng: np.random.Generator,
    *,
    count: int,
    interval: int,
    timestep_fs: float,
) -> list[Atoms]:
    """Give copies of a moving structure, ``interval`` steps apart, without its start."""
    moving = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    moving.calc = calculator
    draw_velocities(moving, temperature_K, rng)
    dynamics = VelocityVerlet(moving, timestep=timestep_fs * units.fs)
    found = []
    for _ in range(count):
        dynamics.run(interval)
        found.append(Atoms(moving.numbers, moving.positions, cell=moving.cell, pbc=moving.pbc))
    return found


def label(frames: Sequence[Atoms], teachers: Sequence[Potential]) -> np.ndarray:
    """Give frames the mean energy, forces and stress of the teachers.

    Returns:
        [len(frames)] how far teachers are from their mean: root mean square over atoms and teachers
        of the length of the difference of forces, eV/Å; infinite, without labels, where one fails.
    """
    answers = [predict_batch(frames, teacher) for teacher in teachers]
    spreads = np.full(len(frames), np.inf)
    for i, atoms in enumerate(frames):
        found = [of_teacher[i] for of_teacher in answers]
        if any(answer.error for answer in found):
            continue
        forces = np.array([answer.forces for answer in found])
        spreads[i] = np.sqrt(forces.var(axis=0).sum(axis=-1).mean())
        results = [answer.results() for answer in found]
        labels = [name for name in LABELS if all(name in each for each in results)]
        means = {name: np.mean([each[name] for each in results], axis=0) for name in labels}
        atoms.calc = SinglePointCalculator(atoms, **means)
    return spreads


def main() -> None:
    """Parse the command line, run the dynamics and write the frames."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("frames", nargs="+", type=Path, help="extxyz.xz files with energies")
    parser.add_argument("--teachers", nargs="+", required=True, help="potentials, by name or path")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3, help="new frames for each old one")
    parser.add_argument("--interval", type=int, default=50, help="steps between them")
    parser.add_argument("--timestep", type=float, default=2.0, help="fs")
    parser.add_argument("--disagreement", type=float, default=0.5, help="eV/Å")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    calculator = mlip.Calculator(arguments.teachers[0])
    frames: list[Atoms] = []
    for path in arguments.frames:
        starts = read_frames(path)
        pairs = list(zip(starts, temperatures(starts), strict=True))
        for atoms, kelvin in track(pairs, description=path.name):
            frames += snapshots(
                atoms, calculator, kelvin, rng, count=arguments.count,
                interval=arguments.interval, timestep_fs=arguments.timestep,
            )  # fmt: skip
    spreads = label(frames, [load_potential(name) for name in arguments.teachers])
    kept = [
        atoms
        for atoms, spread in zip(frames, spreads, strict=True)
        if spread <= arguments.disagreement
    ]
    write_frames(arguments.out, kept)
    print(
        f"{len(kept)} of {len(frames)} frames; spread of forces (eV/Å): median "
        f"{np.median(spreads):.3f}, largest {spreads.max():.3f}"
    )


if __name__ == "__main__":
    main()
