"""Labels are found wherever files keep them; contradictions are refused."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian

from mlip.datasets.labels import LabelKeys, extract
from mlip.datasets.structure import Structure
from mlip.errors import DataError


def crystal(**results: object) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


FORCES = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize("key", ["energy", "REF_energy", "ref_energy", "DFT_energy", "dft_energy"])
def test_energy_is_found_in_info(key: str) -> None:
    atoms = crystal()
    atoms.info[key] = np.float64(-2.5)
    found = extract(atoms)
    assert found.structure.energy == -2.5
    assert found.used == {"energy": f"{key} (info)"}
    assert found.structure.info == {}


@pytest.mark.parametrize("key", ["forces", "force", "REF_forces", "dft_force"])
def test_forces_are_found_in_arrays(key: str) -> None:
    atoms = crystal(energy=1.0)
    atoms.arrays[key] = FORCES.copy()
    found = extract(atoms)
    np.testing.assert_array_equal(found.structure.forces, FORCES)
    assert found.used == {"energy": "energy (calculator)", "forces": f"{key} (arrays)"}


def test_virial_becomes_stress_with_the_right_sign() -> None:
    """Truth: EMT's energy as a function of strain, by central differences."""
    atoms = bulk("Cu", a=3.5, cubic=True)
    atoms.rattle(0.05, seed=1)
    virial = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            energies = []
            for step in (1e-5, -1e-5):
                strain = np.zeros((3, 3))
                strain[i, j] += step / 2
                strain[j, i] += step / 2
                strained = atoms.copy()
                strained.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
                strained.calc = EMT()
                energies.append(strained.get_potential_energy())
            virial[i, j] = -(energies[0] - energies[1]) / 2e-5
    labelled = atoms.copy()
    labelled.info["REF_virial"] = virial
    atoms.calc = EMT()
    expected = atoms.get_stress(voigt=False)
    assert expected[0, 0] < -0.01  # compressed: far from zero
    np.testing.assert_allclose(extract(labelled).structure.stress, expected, atol=1e-8)


def test_virial_and_stress_that_contradict_each_other_are_refused() -> None:
    atoms = crystal(stress=np.full(6, 0.1))
    full = np.full((3, 3), 0.1)
    atoms.info["virial"] = -full * atoms.get_volume()
    np.testing.assert_allclose(extract(atoms).structure.stress, full)
    atoms.info["virial"] = full * atoms.get_volume()
    with pytest.raises(DataError, match=r"conflicting stress: stress \(calculator\) and virial"):
        extract(atoms)
    assert extract(atoms, LabelKeys(virial="virial")).structure.stress[0, 0] == pytest.approx(-0.1)


def test_virial_without_a_cell_is_refused() -> None:
    atoms = Atoms("H", info={"virial": np.eye(3)})
    with pytest.raises(DataError, match=r"virial \(info\).*no volume"):
        extract(atoms)


def test_conflicting_energies_name_both_keys_and_the_remedy() -> None:
    atoms = crystal(energy=-1.0)
    atoms.info["REF_energy"] = -2.0
    with pytest.raises(
        DataError,
        match=r"file 3: conflicting energy: energy \(calculator\) and REF_energy \(info\)"
        r" differ by 1 eV.*--energy-key",
    ):
        extract(atoms, where="file 3")
    chosen = extract(atoms, LabelKeys(energy="REF_energy"))
    assert chosen.structure.energy == -2.0
    assert "energy (calculator)" in chosen.not_kept
    assert extract(atoms, LabelKeys(energy="energy")).structure.energy == -1.0


def test_one_number_printed_twice_is_no_conflict() -> None:
    atoms = crystal(energy=-426.346938861234, forces=FORCES)
    atoms.info["REF_energy"] = -426.34693886
    atoms.arrays["REF_forces"] = FORCES + 1e-8
    found = extract(atoms)
    assert found.structure.energy == -426.346938861234
    assert found.not_kept == ()


def test_conflicting_forces_are_refused() -> None:
    atoms = crystal(forces=FORCES)
    atoms.arrays["dft_forces"] = FORCES + np.diag([0, 0, 0.5, 0])[:, :3]
    with pytest.raises(DataError, match=r"conflicting forces.*0.5 eV/Å"):
        extract(atoms)


def test_named_keys_are_the_only_ones_used() -> None:
    atoms = crystal(energy=-1.0, forces=FORCES)
    atoms.info["corrected"] = -3.0
    keys = LabelKeys(energy="corrected", forces="mine")
    assert extract(atoms, keys).structure.energy == -3.0
    assert extract(atoms, keys).structure.forces is None
    again = Structure.from_atoms(extract(atoms, keys).structure.to_atoms())
    assert again.energy == -3.0


def test_free_energy_is_used_only_by_name() -> None:
    atoms = crystal(energy=-1.0, free_energy=-1.1)
    assert extract(atoms).structure.energy == -1.0
    assert extract(atoms, LabelKeys("free_energy")).structure.energy == -1.1
    assert extract(crystal(free_energy=-1.1)).structure.energy is None


def test_forces_of_fixed_atoms_stay_raw() -> None:
    atoms = crystal(forces=FORCES + 1)
    atoms.set_constraint(FixAtoms([0, 2]))
    assert not atoms.get_forces()[0].any()
    structure = Structure.from_atoms(atoms)
    np.testing.assert_array_equal(structure.forces, FORCES + 1)
    assert structure.fixed.tolist() == [True, False, True, False]
    again = Structure.from_atoms(structure.to_atoms())
    np.testing.assert_array_equal(again.forces, FORCES + 1)


def test_what_the_record_cannot_hold_is_named() -> None:
    atoms = crystal(energy=1.0, magmoms=np.ones(4))
    atoms.set_constraint(FixCartesian(0))
    atoms.info["spacegroup"] = object()
    atoms.set_momenta(np.ones((4, 3)), apply_constraint=False)
    assert set(extract(atoms).not_kept) == {
        "info spacegroup", "constraint FixCartesian", "magmoms (calculator)", "momenta (arrays)"
    }  # fmt: skip


def test_charge_and_spin_leave_info() -> None:
    atoms = crystal(energy=1.0)
    atoms.info.update(charge=-1, spin=2, note="x", values=np.arange(3))
    structure = Structure.from_atoms(atoms)
    assert (structure.charge, structure.spin) == (-1.0, 2.0)
    assert structure.info == {"note": "x", "values": [0, 1, 2]}


def test_results_of_an_earlier_geometry_are_refused() -> None:
    atoms = crystal()
    atoms.calc = EMT()
    atoms.get_forces()
    assert Structure.from_atoms(atoms).forces is not None
    atoms.positions[0] += 0.1
    with pytest.raises(DataError, match="positions changed after the calculator ran"):
        Structure.from_atoms(atoms)


def test_a_live_calculator_is_not_run() -> None:
    atoms = crystal()
    atoms.calc = EMT()
    assert not Structure.from_atoms(atoms).labelled
