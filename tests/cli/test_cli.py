"""Commands as users run them: files written, tables printed, exit codes, errors of one line."""

from __future__ import annotations

import csv
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from typer.testing import CliRunner

import mlip
from mlip.cli.app import COMMANDS, app, main
from mlip.simulation.calculator import Calculator
from mlip.simulation.md import run_md
from mlip.simulation.relax import relax


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + str(result.exception)
    assert not isinstance(result.exception, Exception), result.exception
    return result


def shell(*args):
    return subprocess.run(
        [sys.executable, "-m", "mlip", *map(str, args)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_relax(model, structures, tmp_path):
    out = tmp_path / "result.extxyz"
    arguments = ("relax", structures, "-p", model, "--out", out, "--dtype", "float64")
    result = run(*arguments, "--fmax", 0.02, "--optimizer", "lbfgs")
    assert "2 of 2 converged" in result.output
    assert "device cpu, dtype float64" in result.output
    frames = read(out, ":")
    calculator = Calculator(model, dtype="float64")
    for frame, start in zip(frames, read(structures, ":"), strict=True):
        expected = relax(start, calculator, fmax=0.02, optimizer="lbfgs")
        assert frame.positions == pytest.approx(expected.atoms.positions, abs=1e-6)
        assert frame.info["status"] == "converged"
    stamp = out.read_bytes()
    run(*arguments, "--fmax", 0.02, "--optimizer", "lbfgs", "--resume")
    assert out.read_bytes() == stamp
    failed = run(*arguments, "--fmax", 0.03, "--optimizer", "lbfgs", "--resume", code=2)
    assert "fmax was 0.02 and is 0.03" in failed.output


def test_relax_exit_code_counts_those_that_did_not_converge(model, structures, tmp_path):
    result = run("relax", structures, "-p", model, "--steps", 1, "--fmax", 1e-6, code=1)
    assert "0 of 2 converged" in result.output
    out = tmp_path / "in-relaxed.extxyz"
    assert [frame.info["status"] for frame in read(out, ":")] == ["max_steps"] * 2


def test_relax_with_fixed_atoms_and_cell(model, structures, tmp_path):
    out = tmp_path / "o.extxyz"
    run("relax", structures, "-p", model, "--out", out, "--fix", "Si,1-2", "--steps", 5, code=1)
    start, end = read(structures, 0), read(out, 0)
    still = [i for i in range(4) if np.allclose(start.positions[i], end.positions[i], atol=1e-7)]
    assert still == [1, 2]
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert rows[1]["status"] == "error"
    assert "names no atom" in rows[1]["message"]
    run("relax", structures, "-p", model, "--out", out, "--cell", "iso", "--pressure", 1.0,
        "--steps", 2, code=1)  # fmt: skip
    assert read(out, 0).cell.volume != pytest.approx(start.cell.volume)


def test_md_and_resume(model, structures, tmp_path):
    prefix = tmp_path / "run"
    common = ("md", structures, "-p", model, "--out", prefix, "--ensemble", "nvt-bussi",
              "--temperature", 300, "--interval", 5, "--log-interval", 5,
              "--repeat", 1, 1, 2)  # fmt: skip
    assert "completed" in run(*common, "--steps", 10).output
    refused = run(*common, "--steps", 20, code=2)
    assert "--resume" in refused.output
    result = run(*common, "--time", 0.02, "--resume")
    assert "drift" in result.output
    frames = read(prefix.with_name("run.extxyz"), ":")
    assert [frame.info["step"] for frame in frames] == [0, 5, 10, 15, 20]
    atoms = read(structures, -1).repeat((1, 1, 2))
    expected = run_md(
        atoms, Calculator(model), ensemble="nvt-bussi", temperature_K=300, steps=20
    ).atoms
    assert frames[-1].positions == pytest.approx(expected.positions, abs=1e-7)
    assert prefix.with_name("run.csv").exists()
    assert prefix.with_name("run.checkpoint").exists()


def test_md_that_diverges_has_its_own_exit_code(model, tmp_path):
    write(tmp_path / "hot.extxyz", bulk("Cu", "fcc", a=3.6))
    result = run("md", tmp_path / "hot.extxyz", "-p", model, "--temperature", 1e6, "--steps", 200,
                 "--timestep", 5, "--repeat", 2, 2, 1, code=1)  # fmt: skip
    assert "diverged" in result.output


def test_md_survives_a_kill(model, structures, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["md", structures, "-p", model, "--ensemble", "nvt-langevin", "--temperature", 300,
              "--steps", 400, "--interval", 7, "--log-interval", 3,
              "--checkpoint-interval", 20]  # fmt: skip
    run(*common, "--out", whole)
    command = [sys.executable, "-m", "mlip", *map(str, common), "--out", str(parts)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = parts.with_name("parts.csv")
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 25:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.read_text().count("\n") < 130
    run(*common, "--out", parts, "--resume")
    for ending in (".extxyz", ".csv"):
        assert parts.with_name("parts" + ending).read_bytes() == (
            whole.with_name("whole" + ending).read_bytes()
        )


def test_predict(model, structures, tmp_path):
    write(tmp_path / "more.extxyz", Atoms("U"))
    out = tmp_path / "p.extxyz"
    result = run("predict", structures, tmp_path / "more.extxyz", out, "-p", model, code=1)
    assert "2 structures predicted" in result.output
    assert "1 failed" in result.output
    energies = [frame.get_potential_energy() for frame in read(out, ":")]
    calculator = Calculator(model)
    expected = [calculator.get_property("energy", atoms) for atoms in read(structures, ":")]
    assert energies == pytest.approx(expected, abs=1e-4)
    run("predict", structures, tmp_path / "q.extxyz", "-p", model)
    assert "is an input" in run("predict", structures, structures, "-p", model, code=2).output


def test_evaluate(model, structures, tmp_path):
    frames = read(structures, ":")
    for k, atoms in enumerate(frames):
        calculator = Calculator(model)
        energy = calculator.get_property("energy", atoms) + 0.2 * len(atoms)
        forces = calculator.get_property("forces", atoms) + 0.3
        atoms.info["config_type"] = f"kind{k}"
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    write(tmp_path / "labelled.extxyz", frames)
    out = tmp_path / "evaluation"
    result = run("evaluate", tmp_path / "labelled.extxyz", "-p", model, "--out", out)
    for text in ("200.0 / 200.0", "300.0 / 300.0", "kind0", "kind1", "Cu", "Si"):
        assert text in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["overall"]["forces"]["mae"] == pytest.approx(0.3, abs=1e-5)
    assert (out / "parity.png").exists()
    write(tmp_path / "labelled.extxyz", Atoms("U"), append=True)
    failed = run("evaluate", tmp_path / "labelled.extxyz", "-p", model, "--out", out, code=1)
    assert "does not know U" in failed.output


def test_info(model):
    card = run("info", model).output
    for text in ("facet", "Si, Cu", "licence: none, a test", "eV/Å³", "format_version"):
        assert text in card
    facts = json.loads(run("info", model, "--json").output)
    assert facts["cutoff"] == 4.0
    environment = run("info").output
    backends = json.loads(run("info", "--backends", "--json").output)
    assert "convolution" in backends["numba"]
    assert backends["cuda"].startswith(("cannot run: ", "float32 and float64: "))
    own = json.loads(run("info", "mlearn-facet", "--backends", "--json").output)
    found = own["operators"].items()
    assert any(name.startswith("convolution") and "CPU kernel" in what for name, what in found)
    for text in (mlip.__version__, "torch", "gpus", "ase"):
        assert text in environment
    assert "no shipped potential" in run("info", "nonsense", code=2).output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("relax", "missing.cif"), "no such file"),
        (("relax", "IN", "-p", "nonsense"), "no such file"),
        (("relax", "IN", "--cell", "banana"), "fixed, iso, shape, full"),
        (("md", "IN", "--ensemble", "nvt-bussi", "--steps", "5"), "needs a temperature"),
        (("md", "IN", "--dtype", "float16", "--steps", "5"), "float32"),
        (("md", "IN", "--steps", "5", "--repeat", "0", "1", "1"), "1 or more"),
        (("evaluate", "IN"), "no structure has energy"),
        (("evaluate", "IN", "--device", "warp"), "this machine has cpu"),
        (("relax", "IN", "--device", "cuda:99"), "this machine has cpu"),
    ],
)
def test_errors_are_one_line(model, structures, tmp_path, arguments, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(structures) if a == "IN" else a for a in arguments]
    if "-p" not in arguments:
        arguments += ["-p", str(model)]
    result = run(*arguments, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert text in lines[0]
    assert "Traceback" not in result.output


def test_a_real_process(model, structures, tmp_path):
    good = shell("relax", structures, "-p", model, "--fmax", "0.05", "--out", tmp_path / "o.extxyz")
    assert good.returncode == 0, good.stderr
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(model).read_bytes()[:500])
    bad = shell("relax", structures, "-p", broken)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith(f"error: {broken}")
    assert bad.stderr.count("\n") == 1


def test_help_is_fast_and_complete():
    result = run("--help")
    for name, text in COMMANDS.items():
        assert name in result.output
        assert text[:30] in result.output
    assert mlip.__version__ in run("--version").output
    code = (
        "import sys; from mlip.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ase', 'numpy', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_commands_get_a_suggestion():
    assert "relax" in run("rleax", code=2).output


@pytest.mark.parametrize("name", ["relax", "md", "predict", "evaluate", "info"])
def test_every_command_has_help(name):
    output = run(name, "--help").output
    assert "Usage" in output
    assert "Options" in output


def test_import_pulls_in_nothing_heavy():
    heavy = ("torch_geometric", "matplotlib", "lightning", "pymatgen", "ase")
    code = f"import sys, mlip; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_simulations_need_no_extras():
    code = (
        "import sys, mlip; mlip.Calculator; mlip.relax; mlip.run_md; mlip.predict; mlip.evaluate\n"
        "print([n for n in ('matplotlib', 'lightning', 'pymatgen') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_program_keeps_the_memory_it_frees(monkeypatch):
    calls = []
    monkeypatch.setattr("mlip.cli.app.keep_freed_memory", lambda: calls.append("keep"))
    monkeypatch.setattr("mlip.cli.app.app", lambda: calls.append("run"))
    logger = logging.getLogger("mlip")  # its handler and level are put back
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    main()
    assert calls == ["keep", "run"]


def test_train_finishes_runs_alone(monkeypatch, structures, tmp_path):
    calls = []
    monkeypatch.setattr(
        "mlip.training.run.resume", lambda folder, **options: calls.append((folder, options))
    )
    run("train", "--resume", tmp_path)
    run("train", "--resume", tmp_path, "--finish")
    assert calls == [(tmp_path, {"finish": False}), (tmp_path, {"finish": True})]
    refused = shell("train", structures, "--finish")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
