"""Fixtures of the data tests: labelled structures, and code run in a process that may die."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from mlip.datasets.structure import Structure


@pytest.fixture
def emt_frames() -> list[Atoms]:
    """Rattled crystals and molecules with EMT labels, two of them with fixed atoms and tags."""
    frames: list[Atoms] = []
    for i in range(6):
        if i % 3 == 2:
            atoms = molecule("C2H6" if i == 2 else "H2O")
        else:
            atoms = bulk(["Cu", "Al"][i % 2], cubic=True) * (2, 1, 1)
        atoms.rattle(0.05, seed=i)
        atoms.set_tags(np.arange(len(atoms)) % 3)
        atoms.info["config_type"] = f"group{i % 2}"
        if i in {1, 3}:
            atoms.set_constraint(FixAtoms([0, 1, 2]))
        atoms.calc = EMT()
        labels = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(apply_constraint=False),
        }
        if atoms.pbc.all():
            labels["stress"] = atoms.get_stress(apply_constraint=False)
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


@pytest.fixture
def random_structure() -> Callable[[int], Structure]:
    """Give the structure of a number: always the same, of 1 to 20 atoms."""

    def make(number: int) -> Structure:
        random = np.random.default_rng(number)
        n = int(random.integers(1, 21))
        return Structure(
            numbers=random.integers(1, 119, n),
            positions=random.normal(size=(n, 3)) * 5,
            cell=np.eye(3) * 10 + random.normal(size=(3, 3)),
            pbc=[True, True, True],
            energy=random.normal() * 100,
            forces=random.normal(size=(n, 3)),
            stress=random.normal(size=6),
            info={"number": number},
        )

    return make


def _report(connection: Any, function: Callable[[], Any]) -> None:
    try:
        connection.send(("ok", function()))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


@pytest.fixture
def in_child() -> Callable[[Callable[[], Any]], tuple[str, Any]]:
    """Run a function in a forked process: ("ok", result), ("error", text) or ("died", signal)."""

    def run(function: Callable[[], Any]) -> tuple[str, Any]:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(sender, function))
        process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            answer = None
        process.join()
        return answer if answer is not None else ("died", -(process.exitcode or 0))

    return run


FIELDS = tuple(Structure.__dataclass_fields__)


@pytest.fixture
def assert_identical() -> Callable[[Structure, Structure], None]:
    """Compare two structures field by field, bit by bit."""

    def compare(a: Structure, b: Structure) -> None:
        for name in FIELDS:
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None), name
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype, name
                assert x.shape == y.shape, name
                assert x.tobytes() == y.tobytes(), name
            elif isinstance(x, float):
                assert np.float64(x).tobytes() == np.float64(y).tobytes(), name
            else:
                assert x == y, name

    return compare
