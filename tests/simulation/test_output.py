"""Frames with results replace old results, and read back whatever their info holds."""

from __future__ import annotations

import io

import numpy as np
import pytest
from ase import Atoms
from ase.io import read

from mlip.simulation.output import extxyz_text, with_results


def test_old_results_give_way_to_new_ones():
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]])
    atoms.info.update(energy="old", stress=np.ones(6), name="kept", blank="")
    atoms.set_array("forces", np.ones((2, 3)))
    atoms.set_array("energies", np.ones(2))
    results = {"energy": -1.5, "forces": np.full((2, 3), 0.25), "unknown": 3}
    frame = with_results(atoms, results, index=7)
    assert atoms.info["energy"] == "old"
    assert atoms.calc is None
    again = read(io.StringIO(extxyz_text(frame)), format="extxyz")
    assert again.get_potential_energy() == -1.5
    assert again.get_forces() == pytest.approx(results["forces"])
    assert set(again.calc.results) == {"energy", "forces"}
    assert again.info == {"name": "kept", "index": 7}
    assert set(again.arrays) == {"numbers", "positions"}
