"""Small EMT-labelled data sets and settings that train in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

SMALL_MODEL = {"hidden": [[4, 3], [4, 3]], "embedding": 4, "outputs": 4, "cutoff": 4.0}


def make_emt_frame(
    seed: int, *, size: tuple[int, int, int] = (1, 1, 1), gold: bool = True
) -> Atoms:
    """Rattled, strained copper, with one gold atom in every second frame."""
    random = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True) * size
    if gold and seed % 2:
        atoms.symbols[0] = "Au"
    atoms.set_cell(atoms.cell.array * (1 + 0.02 * random.normal()), scale_atoms=True)
    atoms.rattle(0.1, rng=random)
    calculator = EMT()
    energy = calculator.get_potential_energy(atoms)
    forces, stress = calculator.get_forces(atoms), calculator.get_stress(atoms)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
    return atoms


@pytest.fixture(scope="session")
def emt_frame() -> Callable[..., Atoms]:
    """Maker of labelled frames: ``emt_frame(seed, size=(1, 1, 1))``."""
    return make_emt_frame


@pytest.fixture(scope="session")
def frames_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames of 4 or 8 atoms."""
    path = tmp_path_factory.mktemp("emt") / "frames.extxyz"
    write(path, [make_emt_frame(i, size=(1 + i % 3 // 2, 1, 1)) for i in range(12)])
    return path


@pytest.fixture
def settings(frames_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a small run; keyword arguments replace whole groups."""

    def make(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "data": {"train": str(frames_file), "valid_fraction": 0.2},
            "model": SMALL_MODEL,
            "batch": {"max_edges": 900},
            "epochs": 2,
            "out": str(tmp_path / "run"),
            "device": "cpu",
        }
        return {**base, **changes}

    return make
