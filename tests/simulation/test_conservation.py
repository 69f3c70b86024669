"""Direct forces: users are told once what follows from them, and nothing is computed twice."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.errors import InputError, NonConservativeWarning
from mlip.potential import Potential
from mlip.simulation.calculator import Calculator
from mlip.simulation.md import run_md
from mlip.simulation.predict import predict_batch
from mlip.simulation.relax import RelaxSettings, relax, relax_many
from mlip.validation.properties import elastic_constants, nve_drift


def told(action: Callable[[], object]) -> list[str]:
    """Run and collect the texts of all warnings of this kind, repetitions included."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if w.category is NonConservativeWarning]


ENSEMBLES = {
    "nve": "TOTAL ENERGY IS NOT CONSERVED",
    "nvt-langevin": "not those of a Boltzmann",
    "nvt-bussi": "not those of a Boltzmann",
    "npt": "not those of a Boltzmann",
}


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("built", [False, True])
def test_dynamics_tell_once(direct, copper, ensemble, built):
    calculator = Calculator(direct) if built else direct
    settings = {"ensemble": ensemble, "temperature_K": 50, "steps": 3, "timestep_fs": 0.1}
    (text,) = told(lambda: run_md(copper, calculator, **settings))
    assert ENSEMBLES[ensemble] in text
    assert "gradient mode" in text


def test_every_run_tells_again(direct, copper):
    calculator = Calculator(direct)
    run = {"temperature_K": 50, "steps": 1, "timestep_fs": 0.1}
    assert len(told(lambda: [run_md(copper, calculator, **run) for _ in range(2)])) == 2


def test_relaxations_tell_once(direct, copper, tmp_path):
    (text,) = told(lambda: relax(copper, direct, steps=3))
    assert "no minimum of the energy" in text
    output, settings = tmp_path / "out.extxyz", RelaxSettings(steps=2)
    many = told(lambda: relax_many([copper, copper], direct, output, settings=settings))
    assert many == [text]


def test_properties_tell_once(direct, copper):
    for measure, word in (
        (lambda: elastic_constants(copper, Calculator(direct)), "elastic"),
        (lambda: nve_drift(copper, Calculator(direct), duration_ps=0.02), "NVE"),
    ):
        (text,) = told(measure)
        assert word in text


def test_calculator_tells_at_the_first_forces(direct, copper):
    copper.calc = Calculator(direct)
    assert told(copper.get_potential_energy) == []
    (text,) = told(copper.get_forces)
    for word in ("drifts", "relaxation", "Hessian", "gradient mode"):
        assert word in text
    dynamics = VelocityVerlet(copper, 0.1)
    assert told(lambda: dynamics.run(3)) == []
    for other in (copy.deepcopy(copper.calc), pickle.loads(pickle.dumps(copper.calc))):
        copper.calc = other
        assert told(copper.get_stress) == []
    copper.calc = Calculator(direct)
    assert len(told(copper.get_stress)) == 1


def test_the_warning_points_at_the_code_of_the_user(direct, copper):
    with pytest.warns(NonConservativeWarning) as caught:
        run_md(copper, direct, temperature_K=50, steps=0)
    assert caught[0].filename == __file__


def test_gradients_are_told_nothing(morse, copper, tmp_path):
    def everything() -> None:
        calculator = Calculator(morse)
        relax(copper, calculator, steps=2)
        relax_many([copper], calculator, tmp_path / "out.extxyz")
        for ensemble in ENSEMBLES:
            run_md(copper, calculator, ensemble=ensemble, temperature_K=50, steps=1)
        elastic_constants(copper, calculator)
        run_md(copper, EMT(), temperature_K=50, steps=1)

    assert told(everything) == []


def test_runs_and_calculators_say_what_they_are(morse, direct, copper):
    assert run_md(copper, morse, steps=1).conservative
    assert run_md(copper, EMT(), steps=1).conservative
    with pytest.warns(NonConservativeWarning):
        assert not run_md(copper, direct, steps=1).conservative
    assert Calculator(morse).conservative
    assert not Calculator(direct).conservative
    assert "direct forces" in Calculator(direct).description
    assert "direct" not in Calculator(morse).description


@pytest.mark.filterwarnings("ignore::mlip.errors.NonConservativeWarning")
def test_direct_forces_after_the_energy_cost_nothing(direct, copper, monkeypatch):
    """No backward pass to save: one evaluation gives all, and the same numbers in any order."""
    calls = []
    original = Potential.forward
    monkeypatch.setattr(Potential, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    copper.calc = Calculator(direct)
    energy = copper.get_potential_energy()
    forces, stress = copper.get_forces(), copper.get_stress()
    assert len(calls) == 1
    copper.calc = Calculator(direct)
    assert np.array_equal(copper.get_stress(), stress)
    assert np.array_equal(copper.get_forces(), forces)
    assert copper.get_potential_energy() == energy
    assert np.abs(forces).max() > 0


@pytest.mark.filterwarnings("ignore::mlip.errors.NonConservativeWarning")
def test_no_stress_is_no_number(direct_without_stress, copper):
    calculator = Calculator(direct_without_stress)
    copper.calc = calculator
    assert not calculator.has_stress
    assert copper.get_forces().shape == (8, 3)
    assert "stress" not in calculator.results
    with pytest.raises(PropertyNotImplementedError, match="no stress head"):
        copper.get_stress()
    with pytest.raises(InputError, match="ensemble 'npt' needs a stress"):
        run_md(copper, calculator, ensemble="npt", temperature_K=50, steps=1)
    with pytest.raises(InputError, match="cell 'full' needs a stress"):
        relax(copper, calculator, cell="full", steps=1)
    assert np.isnan(relax(copper, calculator, steps=1).max_stress)
    assert np.isnan(run_md(copper, calculator, steps=1).rows[-1].pressure_GPa)


def test_no_stress_is_no_failed_prediction(direct_without_stress, direct, copper):
    """A missing stress is none; it does not spoil energy and forces."""
    (found,) = predict_batch([copper], direct_without_stress)
    assert found.error is None
    assert found.stress is None
    assert found.forces.shape == (8, 3)
    (other,) = predict_batch([copper], direct)
    assert other.stress.shape == (3, 3)


@pytest.mark.parametrize(
    "command",
    [
        ("md", "--temperature", "50", "--steps", "2", "--timestep", "0.1"),
        ("relax", "--steps", "2"),
    ],
)
def test_commands_tell_once_in_one_line(direct, copper, tmp_path, command):
    name, *options = command
    copper.write(tmp_path / "cu.extxyz")
    direct.save(tmp_path / "direct.safetensors")
    common = ["-p", str(tmp_path / "direct.safetensors"), "--out", str(tmp_path / "out.extxyz")]
    result = CliRunner().invoke(app, [name, str(tmp_path / "cu.extxyz"), *common, *options])
    warned = [line for line in result.output.splitlines() if "warning:" in line]
    assert len(warned) == 1, result.output
    assert "not derivatives of its energy" in " ".join(result.output.split())
    assert ".py" not in result.output
    assert "direct forces (not conservative)" in result.output
    assert "warnings.warn" not in result.output


def test_predict_names_direct_forces(direct, copper, tmp_path):
    copper.write(tmp_path / "cu.extxyz")
    direct.save(tmp_path / "direct.safetensors")
    arguments = [
        tmp_path / "cu.extxyz",
        tmp_path / "o.extxyz",
        "-p",
        tmp_path / "direct.safetensors",
    ]
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "direct forces (not conservative)" in result.output


def test_a_single_atom_has_zero_direct_forces(direct):
    with pytest.warns(NonConservativeWarning):
        assert not Calculator(direct).get_property("forces", Atoms("Cu")).any()
