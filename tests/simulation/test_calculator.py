"""The calculator keeps ASE's contract: properties, units, caching, copies, no side effects."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.constraints import FixAtoms
from ase.filters import ExpCellFilter, FrechetCellFilter, StrainFilter, UnitCellFilter
from ase.optimize import BFGS

from mlip.errors import (
    CheckpointError,
    InputError,
    UnknownElementError,
)
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator, as_calculator, describe


def test_forces_and_stress_are_derivatives_of_the_energy(morse, copper):
    copper.calc = Calculator(morse)
    forces, stress = copper.get_forces(), copper.get_stress()
    assert np.abs(forces).max() > 0.1
    assert np.abs(forces - calculate_numerical_forces(copper, eps=1e-4)).max() < 1e-6
    assert np.abs(stress - calculate_numerical_stress(copper, eps=1e-5)).max() < 1e-7


def test_results_match_the_potential(morse, copper):
    from mlip.graph import atoms_to_graph

    copper.calc = Calculator(morse)
    truth = morse(atoms_to_graph(copper, morse.cutoff))
    assert copper.get_potential_energy() == float(truth.energy)
    assert copper.calc.get_property("free_energy", copper) == float(truth.energy)
    assert copper.get_potential_energies().sum() == pytest.approx(float(truth.energy), abs=1e-12)
    voigt = truth.stress[0].numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    assert np.array_equal(copper.get_stress(), voigt)


@pytest.mark.parametrize("pbc", [False, (True, True, False), (False, False, True)])
def test_stress_needs_three_periodic_directions(morse, copper, pbc):
    copper.pbc = pbc
    copper.calc = Calculator(morse)
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        copper.get_stress()
    assert copper.get_forces().shape == (8, 3)
    assert "stress" not in copper.calc.results


def test_energy_alone_needs_no_backward_pass(morse, copper, monkeypatch):
    calculator = Calculator(morse)
    copper.calc = calculator

    def refuse(*_, **__):
        raise AssertionError("differentiated for an energy")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", refuse)
        energy = copper.get_potential_energy()
    assert set(calculator.results) == {"energy", "free_energy", "energies"}
    copper.get_forces()
    assert copper.get_potential_energy() == energy
    assert {"forces", "stress"} <= set(calculator.results)


def test_forces_and_stress_cost_one_evaluation(morse, copper, monkeypatch):
    calls = []
    original = Potential.forward
    monkeypatch.setattr(Potential, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    copper.calc = Calculator(morse)
    copper.get_stress()
    copper.get_forces()
    copper.get_potential_energy()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "cell_filter", [FrechetCellFilter, ExpCellFilter, UnitCellFilter, StrainFilter]
)
def test_every_cell_filter_works(morse, copper, cell_filter):
    copper.calc = Calculator(morse)
    before = copper.get_potential_energy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BFGS(cell_filter(copper), logfile=None).run(fmax=0.01, steps=5)
    assert copper.get_potential_energy() < before


def test_atoms_are_not_changed(morse, copper):
    copper.positions += 7.0  # outside of the cell
    copper.info["note"] = "kept"
    before = copy.deepcopy(copper)
    calculator = Calculator(morse)
    calculator.get_property("stress", copper)
    assert copper == before
    assert copper.info == before.info
    assert copper.calc is None
    calculator.atoms.positions += 1.0
    assert copper == before


def test_the_calculator_has_a_copy_of_what_it_calculated(morse, copper):
    copper.info["note"], copper.calc = "kept", Calculator(morse)
    copper.set_constraint(FixAtoms([0]))
    copper.set_tags(range(len(copper)))
    copper.get_forces()
    expected, other = copper.copy(), copy.deepcopy(copper.calc)
    copper.positions[1] += 0.1
    copper.arrays["tags"][:] = 7
    copper.cell[0, 0] += 0.1
    copper.pbc[2] = False
    copper.info["note"] = "changed"
    copper.constraints[0].index[0] = 1
    for found in (copper.calc.atoms, other.atoms):
        assert found == expected
        assert found.info == {"note": "kept"}
        assert found.constraints[0].index.tolist() == [0]
        assert found.get_tags().tolist() == list(range(len(copper)))
        assert found.calc is None


def test_global_state_is_not_changed(morse, facet, copper):
    def state():
        return (
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_rng_state().tolist(), random.getstate(), dict(os.environ),
            str(np.random.get_state()),  # noqa: NPY002
            list(warnings.filters), logging.root.level,
            list(logging.root.handlers), logging.getLogger("mlip").level,
            torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    before = state()
    for potential in (morse, facet):
        copper.calc = Calculator(potential)
        copper.get_stress()
        copper.calc.reset()
        copper.get_potential_energy()
    copper.symbols[0] = "U"
    with pytest.raises(UnknownElementError):
        copper.get_potential_energy()
    assert state() == before


def test_inside_no_grad_forces_are_the_same(morse, copper):
    expected = Calculator(morse).get_property("forces", copper)
    with torch.no_grad():
        assert np.array_equal(Calculator(morse).get_property("forces", copper), expected)


def test_unknown_elements_are_named_before_anything_is_computed(morse, copper, monkeypatch):
    def refuse(*_):
        raise AssertionError("searched neighbours")

    monkeypatch.setattr("mlip.simulation.verlet_list.atoms_to_graph", refuse)
    copper.symbols[2:4] = ["U", "Og"]
    with pytest.raises(UnknownElementError, match=r"U, Og.*Cu"):
        Calculator(morse).get_property("energy", copper)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda atoms: atoms.positions.fill(np.nan), "finite"),
        (lambda atoms: atoms.set_cell(np.zeros((3, 3))), "cell|volume"),
        (lambda atoms: atoms.__delitem__(slice(None)), "no atoms"),
    ],
)
@pytest.mark.parametrize("skin", [0.0, 1.0])
def test_bad_structures_are_refused(morse, copper, change, text, skin):
    calculator = Calculator(morse, skin=skin)
    calculator.get_property("energy", copper)
    change(copper)
    with pytest.raises(InputError, match=text):
        calculator.get_property("energy", copper)


def test_single_atom_and_far_pair(morse):
    alone = Atoms("Cu")
    assert Calculator(morse).get_property("energy", alone) == 0.0
    assert np.array_equal(Calculator(morse).get_property("forces", alone), np.zeros((1, 3)))
    pair = Atoms("Cu2", [[0, 0, 0], [0, 0, 50.0]])
    assert np.array_equal(Calculator(morse).get_property("forces", pair), np.zeros((2, 3)))


def test_isotropic_tension_is_positive(morse):
    stretched = bulk("Cu", "fcc", a=4.0)
    assert (Calculator(morse).get_property("stress", stretched)[:3] > 0.01).all()


def test_pickle_by_path_keeps_settings_not_weights(facet, copper, tmp_path):
    facet.save(tmp_path / "model.safetensors")
    calculator = Calculator(tmp_path / "model.safetensors", dtype="float64", skin=0.5)
    copper.calc = calculator
    forces = copper.get_forces()
    data = pickle.dumps(calculator)
    assert len(data) < 2000
    assert b"torch" not in data.replace(b"mlip.simulation", b"")
    again = pickle.loads(data)
    assert again.parameters == calculator.parameters
    assert np.array_equal(again.get_property("forces", copper), forces)


def test_pickle_of_a_potential_without_file(facet, copper):
    calculator = Calculator(facet)
    forces = calculator.get_property("forces", copper)
    again = pickle.loads(pickle.dumps(calculator))
    assert np.array_equal(again.get_property("forces", copper), forces)
    assert again.parameters["dtype"] == "float32"


def test_pickle_notices_changed_weights(facet, tmp_path):
    facet.save(tmp_path / "model.safetensors")
    data = pickle.dumps(Calculator(tmp_path / "model.safetensors"))
    other = copy.deepcopy(facet)
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    other.save(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed"):
        pickle.loads(data)


def test_deep_copy_shares_weights_and_nothing_else(morse, copper):
    copper.calc = Calculator(morse, skin=0.3)
    energy = copper.get_potential_energy()
    other = copy.deepcopy(copper)
    assert other.calc is not copper.calc
    assert other.calc.potential is copper.calc.potential
    other.positions[0] += 0.1
    assert other.get_potential_energy() != energy
    assert copper.calc.results["energy"] == energy


def test_dtype_and_device_are_honoured_or_refused(facet, copper, tmp_path):
    facet.save(tmp_path / "model.safetensors")
    assert Calculator(tmp_path / "model.safetensors").potential.dtype == torch.float32
    double = Calculator(facet, dtype="float64")
    assert double.potential.dtype == torch.float64
    assert facet.dtype == torch.float32
    single = Calculator(facet).get_property("energy", copper)
    assert 0 < abs(double.get_property("energy", copper) - single) < 1e-3
    for dtype in ("float16", "banana"):
        with pytest.raises(InputError, match="float32"):
            Calculator(facet, dtype=dtype)
    for source in (facet, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match="this machine has cpu"):
            Calculator(source, device="cuda:99")


def test_says_once_what_it_is(morse, copper, caplog):
    with caplog.at_level(logging.INFO, "mlip"):
        calculator = Calculator(morse)
        calculator.get_property("forces", copper)
        copper.positions[0] += 0.1
        calculator.get_property("forces", copper)
    lines = [r.getMessage() for r in caplog.records if r.module == "calculator"]
    assert len(lines) == 1
    for word in (morse.model_hash(), "cpu", "float64", "torch"):
        assert word in lines[0]


def test_pymatgen_structures_are_accepted(morse, copper):
    pytest.importorskip("pymatgen")
    from pymatgen.io.ase import AseAtomsAdaptor

    structure = AseAtomsAdaptor.get_structure(copper)
    calculator = Calculator(morse)
    expected = Calculator(morse).get_property("stress", copper)
    assert calculator.get_property("stress", structure) == pytest.approx(expected, abs=1e-12)


def test_as_calculator(morse, facet, tmp_path):
    emt = EMT()
    assert as_calculator(emt) is emt
    assert as_calculator(morse).potential is morse
    facet.save(tmp_path / "model.safetensors")
    assert as_calculator(str(tmp_path / "model.safetensors")).potential.dtype == torch.float32
    with pytest.raises(InputError, match="int cannot compute"):
        as_calculator(3)
    with pytest.raises(CheckpointError, match="no such file"):
        as_calculator("no-such-model")


def test_description_tells_potentials_and_precisions_apart(facet):
    other = copy.deepcopy(facet)
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    names = {describe(Calculator(facet)), describe(Calculator(other))}
    names |= {describe(Calculator(facet, dtype="float64")), describe(EMT())}
    assert len(names) == 4


@pytest.mark.parametrize("change", ["nothing", "position", "cell", "number", "pbc", "charge"])
def test_changes_are_those_that_ase_finds(morse, copper, change):
    calculator = Calculator(morse)
    copper.calc = calculator
    copper.get_potential_energy()
    if change == "position":
        copper.positions[0, 0] = np.nextafter(copper.positions[0, 0], 9.0) + 1e-9
    if change == "cell":
        copper.set_cell(copper.cell * 1.01)
    if change == "number":
        copper.numbers[0] = 28
    if change == "pbc":
        copper.pbc = (True, True, False)
    if change == "charge":
        copper.set_initial_charges(np.ones(len(copper)))
    expected = AseCalculator.check_state(calculator, copper)
    assert calculator.check_state(copper) == expected
    assert (expected == []) == (change == "nothing")


def test_where_nothing_changed_ase_is_not_asked(morse, copper, monkeypatch):
    """Its comparison of all arrays costs more than that of the numbers that count."""
    calculator = Calculator(morse)
    calculator.get_property("energy", copper)
    monkeypatch.setattr(AseCalculator, "check_state", lambda *_: pytest.fail("asked"))
    assert calculator.check_state(copper) == []
