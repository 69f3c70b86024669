"""Whole runs: overfitting, determinism, export, errors that name structures, the command."""

from __future__ import annotations

import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from rich.console import Console

from mlip.cli.train import train as train_command
from mlip.errors import InputError, MlipError, UnknownElementError
from mlip.graph import atoms_to_graph
from mlip.potential import Potential
from mlip.training.config import build_config
from mlip.training.report import read_metrics
from mlip.training.run import train
from mlip.training.state import below, read_newest_state

QUIET = Console(quiet=True)
Settings = Callable[..., dict[str, Any]]


def predict(path: Path, atoms: Atoms, dtype: str = "float64"):
    potential = Potential.load(path, dtype=dtype)
    return potential(atoms_to_graph(atoms, potential.cutoff))


def test_two_frames_are_learned_by_heart(
    settings: Settings, emt_frame: Callable[..., Atoms], tmp_path: Path
) -> None:
    frames = [emt_frame(0), emt_frame(1)]  # forces of about 1 eV/Å
    write(tmp_path / "two.extxyz", frames)
    path = str(tmp_path / "two.extxyz")
    config = settings(
        data={"train": path, "valid": path},
        model={"hidden": [[8, 4], [8, 4]], "embedding": 8, "outputs": 8, "cutoff": 4.0},
        batch={"max_edges": 100_000},
        epochs=400,
        precision="float64",
        optimizer={"lr": 0.02},
        schedule={"warmup_steps": 20, "lr_min_fraction": 0.001},
        loss={"energy_weight": 10.0},
        ema_decay=0.9,
    )
    result = train(build_config(config), console=QUIET)
    assert result.metrics["valid_energy_mae_meV_per_atom"] < 0.1
    assert result.metrics["valid_forces_mae_meV_per_A"] < 6.0
    assert result.metrics["valid_stress_mae_GPa"] < 0.15
    for atoms in frames:  # the exported file, against ASE, not against our own metrics
        found = predict(result.path, atoms)
        energy = float(found.energy) - atoms.get_potential_energy()
        assert abs(energy) / len(atoms) < 1e-4
        np.testing.assert_allclose(found.forces, atoms.get_forces(), atol=0.02)
        np.testing.assert_allclose(found.stress[0], atoms.get_stress(voigt=False), atol=3e-3)


def test_same_seed_same_bits_and_other_seed_other_run(settings: Settings, tmp_path: Path) -> None:
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random.seed(seed + len(logs))
        torch.rand(len(logs) + 1)  # the run must not depend on the global generator
        out = str(tmp_path / name)
        train(build_config(settings(out=out, seed=seed)), console=QUIET)
        logs.append((tmp_path / name / "steps.csv").read_bytes())
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_global_state_is_left_alone(settings: Settings) -> None:
    import logging
    import warnings

    def state() -> tuple:
        return (
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_rng_state().tolist(), random.getstate(),
            list(warnings.filters), logging.getLogger("lightning.pytorch").level,
        )  # fmt: skip

    import lightning.pytorch  # noqa: F401  what its import does is not ours

    before = state()
    train(build_config(settings(epochs=1)), console=QUIET)
    assert state() == before


def test_averaged_weights_are_exported(settings: Settings) -> None:
    result = train(build_config(settings(epochs=3, ema_decay=0.99)), console=QUIET)
    position, tensors = read_newest_state(result.folder)
    assert position.best_epoch == 3
    exported = Potential.load(result.path).state_dict()
    average, last = below("average", tensors), below("model", tensors)
    assert all(torch.equal(exported[name], tensor) for name, tensor in average.items())
    assert any(not torch.equal(exported[name], last[name]) for name in average)
    row = read_metrics(result.folder)[-1]
    for name, value in result.metrics.items():
        assert row[name] == pytest.approx(value, rel=1e-6), name


def test_a_run_goes_on_from_a_potential(settings: Settings, tmp_path: Path) -> None:
    first = train(build_config(settings(precision="float64")), console=QUIET)
    start = Potential.load(first.path, dtype="float64")
    changes = {"initial": str(first.path), "model": {}, "precision": "float64", "epochs": 1}
    still = settings(**changes, optimizer={"lr": 1e-12}, out=str(tmp_path / "still"))
    second = Potential.load(train(build_config(still), console=QUIET).path, dtype="float64")
    assert second.model.config == start.model.config
    assert second.reference_energies == start.reference_energies
    assert second.scale == start.scale
    for name, tensor in start.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor, atol=1e-8, rtol=0)


def test_energy_shift_of_all_labels_changes_no_forces(
    settings: Settings, frames_file: Path, tmp_path: Path
) -> None:
    frames = read(frames_file, ":")
    shifts = {"Cu": -1000.0, "Au": -7777.0}
    for atoms in frames:
        atoms.calc.results["energy"] += sum(shifts[s] for s in atoms.get_chemical_symbols())
    write(tmp_path / "shifted.extxyz", frames)
    found = []
    for name, path in (("plain", frames_file), ("shifted", tmp_path / "shifted.extxyz")):
        data = {"train": str(path), "valid_fraction": 0.2}
        config = settings(data=data, out=str(tmp_path / name), precision="float64")
        result = train(build_config(config), console=QUIET)
        found.append(predict(result.path, frames[1]))
    np.testing.assert_allclose(found[1].forces, found[0].forces, atol=1e-6)
    shift = sum(shifts[s] for s in frames[1].get_chemical_symbols())
    assert float(found[1].energy - found[0].energy) == pytest.approx(
        shift, rel=1e-8
    )  # of the ridge


def test_given_reference_energies_are_kept(settings: Settings) -> None:
    references = {"Cu": -0.5, "Au": -0.25}
    result = train(build_config(settings(reference_energies=references, epochs=1)), console=QUIET)
    assert Potential.load(result.path).reference_energies == {29: -0.5, 79: -0.25}


def test_diverging_run_stops_and_names_structures(settings: Settings) -> None:
    wild = settings(optimizer={"lr": 1e30}, schedule={"warmup_steps": 0}, epochs=5)
    with pytest.raises(
        MlipError, match=r"the loss is (nan|inf) at step[\s\S]*frames\.extxyz.*energy"
    ):
        train(build_config(wild), console=QUIET)


def test_partial_labels_train_and_forces_only_too(
    settings: Settings, frames_file: Path, tmp_path: Path
) -> None:
    frames = read(frames_file, ":8")
    for atoms in frames:
        for key in ("energy", "stress", "free_energy"):
            atoms.calc.results.pop(key, None)
    molecule = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]])
    molecule.calc = SinglePointCalculator(molecule, energy=1.0)
    write(tmp_path / "forces.extxyz", frames)
    write(tmp_path / "mixed.extxyz", [*frames, molecule, molecule])
    zero = {
        "forces": [
            "reference energies (fitted), no energies:",
            "  Cu       0.000000 eV   no energies",
            "  Au       0.000000 eV   no energies",
        ],
        "mixed": [
            "reference energies (fitted), residual RMSE 0.0000 eV/atom:",
            "  Cu       0.500000 eV   residual RMSE 0.0000 eV/atom",
            "  Au       0.500000 eV   no energies",
        ],
    }
    for name, lines in zero.items():
        path = str(tmp_path / f"{name}.extxyz")
        config = settings(data={"train": path, "valid": path}, out=str(tmp_path / name))
        printed = Console(file=StringIO(), width=200)
        result = train(build_config(config), console=printed)
        assert "\n".join(lines) in printed.file.getvalue()
        assert np.isfinite(result.metrics["valid_loss"])
        assert np.isfinite(result.metrics["valid_forces_mae_meV_per_A"])
        assert np.isnan(result.metrics["valid_stress_mae_GPa"])


def test_bad_data_and_settings_are_refused_before_training(
    settings: Settings, frames_file: Path, tmp_path: Path
) -> None:
    silver = read(frames_file, "0")
    silver.symbols[0] = "Ag"
    write(tmp_path / "silver.extxyz", silver)
    bare = read(frames_file, ":3")
    for atoms in bare:
        atoms.calc = None
    write(tmp_path / "bare.extxyz", bare)
    train_file = str(frames_file)
    for changes, error, said in (
        ({"data": {"train": train_file, "valid": str(tmp_path / "silver.extxyz")}},
         UnknownElementError, r"data\.valid.*47.*silver"),
        ({"data": {"train": str(tmp_path / "bare.extxyz")}}, InputError, "none of"),
        ({"data": {"train": str(tmp_path / "silver.extxyz")}}, InputError, "at least 2"),
        ({"data": {"train": str(tmp_path / "none.extxyz")}}, InputError, "none.extxyz"),
        ({"data": {"train": train_file, "keys": {"force": "f"}}}, InputError, "'force'"),
        ({"model": {"name": "facet", "cutof": 4.0}}, InputError, "'cutof'.*'cutoff'"),
        ({"model": {"name": "facett"}}, InputError, "facett"),
        ({"device": "tpu"}, InputError, "tpu"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            train(build_config(settings(**changes)), console=QUIET)
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_limits_end_the_run_with_the_schedule(settings: Settings) -> None:
    config = settings(epochs=None, max_steps=7, batch={})
    config["schedule"] = {"warmup_steps": 0, "lr_min_fraction": 0.0}
    result = train(build_config(config), console=QUIET)
    steps = (result.folder / "steps.csv").read_text().splitlines()[1:]
    assert len(steps) == 7
    rates = [float(line.split(",")[2]) for line in steps]
    expected = [5e-3 * 0.5 * (1 + np.cos(np.pi * k / 7)) for k in range(7)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert result.metrics["valid_loss"] > 0


def test_time_limit_ends_the_run(settings: Settings) -> None:
    result = train(build_config(settings(epochs=None, max_time_minutes=0.02)), console=QUIET)
    rows = read_metrics(result.folder)
    assert 1.2 <= rows[-1]["elapsed_s"] < 10
    assert rows[-1]["lr"] < 0.3 * max(row["lr"] for row in rows)


def test_command_trains_from_data_alone(
    frames_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train_command(frames_file, ["epochs=1", "tensorboard=true", "device=cpu"], out, None)
    printed = capsys.readouterr().out
    assert "reference energies (fitted)" in printed
    assert "epoch" in printed
    for name in ("config.yaml", "metrics.csv", "steps.csv", "potential.safetensors"):
        assert (out / name).is_file()
    assert list(out.glob("events.out.tfevents*"))
    metadata = Potential.load(out / "potential.safetensors").metadata
    assert metadata["training_data"]["train"][0]["name"] == frames_file.name
    assert metadata["metrics"]["valid_loss"] > 0
    train_command(None, None, None, out)
    with pytest.raises(InputError, match="--resume"):
        train_command(frames_file, None, None, out)
    with pytest.raises(InputError, match="own settings"):
        train_command(None, ["epochs=2"], None, out)


def test_importing_the_package_leaves_lightning_alone(repository: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, mlip, mlip.training.run, mlip.cli.train; "
        "sys.exit(any(m in sys.modules for m in ('lightning', 'tensorboard', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
