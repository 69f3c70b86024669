"""A run killed with SIGKILL at any moment and resumed writes the log of one never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mlip.errors import CheckpointError, InputError
from mlip.files import atomic_write
from mlip.potential import Potential
from mlip.training.config import build_config, write_config
from mlip.training.report import read_metrics
from mlip.training.run import POTENTIAL_FILE, resume, train
from mlip.training.state import Position, below, read_newest_state, state_files

QUIET = Console(quiet=True)
BEGIN = (
    "import torch, sys; torch.set_num_threads(1)\n"
    "from mlip.training.run import train, resume\n"
    "from mlip.training.config import load_config\n"
)
START = BEGIN + "train(load_config(sys.argv[1]))"
RESUME = BEGIN + "resume(sys.argv[1])"


def kill_after(steps: int, code: str, argument: Path, run: Path, repository: Path) -> None:
    """Run a program and SIGKILL it once the log of `run` holds that many steps."""
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(argument)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    log, deadline = run / "steps.csv", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") <= steps:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def without_time(folder: Path) -> list[dict[str, float]]:
    return [
        {k: repr(v) for k, v in row.items() if k != "elapsed_s"} for row in read_metrics(folder)
    ]


def test_killed_twice_and_resumed_is_bit_for_bit_the_same(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, repository: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = {"checkpoint": {"steps": 3}, "epochs": 12, "batch": {}}
    result = train(build_config(settings(out=str(whole), **common)), console=QUIET)
    write_config(build_config(settings(out=str(killed), **common)), tmp_path / "in.yaml")
    kill_after(10, START, tmp_path / "in.yaml", killed, repository)
    position, _ = read_newest_state(killed)
    assert position.step > 0, "the kill was meant to come inside an epoch"
    kill_after(position.global_step + 8, RESUME, killed, killed, repository)
    resumed = resume(killed, console=QUIET)

    assert (whole / "steps.csv").read_text().count("\n") > 12 * 4, "epochs were meant to be longer"
    assert (killed / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    assert without_time(killed) == without_time(whole)
    hashes = [Potential.load(r.path).model_hash() for r in (result, resumed)]
    assert hashes[0] == hashes[1]


def test_resume_of_a_finished_run_repeats_its_result(
    settings: Callable[..., dict[str, Any]],
) -> None:
    result = train(build_config(settings()), console=QUIET)
    again = resume(result.folder, console=QUIET)
    assert again.metrics == result.metrics
    with pytest.raises(InputError, match=r"already holds.*--resume"):
        train(build_config(settings()), console=QUIET)


def test_a_run_can_be_finished_before_its_end_and_go_on(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = settings(out=str(tmp_path / "run"), checkpoint={"steps": 1}, epochs=4)
    result = train(build_config(config), console=QUIET)
    folder, whole = result.folder, Potential.load(result.path)
    older, newest = state_files(folder)
    newest.unlink()
    result.path.unlink()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    early = resume(folder, finish=True, console=QUIET)
    position, tensors = read_newest_state(folder)
    assert position.best_epoch >= 1
    potential = Potential.load(early.path)
    assert potential.metadata["best_epoch"] == position.best_epoch
    name, weight = next(iter(below("best", tensors).items()))
    assert torch.equal(potential.state_dict()[name], weight.to(potential.state_dict()[name].dtype))
    assert early.metrics["valid_loss"] == pytest.approx(position.best_loss, rel=1e-3)
    left = {path.name: path.read_bytes() for path in folder.iterdir() if path != early.path}
    assert left == files
    assert Potential.load(resume(folder, console=QUIET).path).model_hash() == whole.model_hash()
    older.unlink()
    for path in state_files(folder):
        path.unlink()
    with pytest.raises(InputError, match="no state yet"):
        resume(folder, finish=True, console=QUIET)


def test_resume_needs_a_run_with_the_same_data(
    settings: Callable[..., dict[str, Any]], frames_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds no training run"):
        resume(tmp_path)
    copy = tmp_path / "copy.extxyz"
    copy.write_bytes(frames_file.read_bytes())
    config = settings(data={"train": str(copy)}, epochs=1)
    result = train(build_config(config), console=QUIET)
    copy.write_text(copy.read_text().replace("0.1", "0.2", 1))
    with pytest.raises(InputError, match="have changed"):
        resume(result.folder, console=QUIET)


def test_damaged_newest_state_falls_back_to_the_one_before(
    settings: Callable[..., dict[str, Any]],
) -> None:
    config = settings(checkpoint={"steps": 1})
    result = train(build_config(config), console=QUIET)
    log = (result.folder / "steps.csv").read_bytes()
    older, newest = state_files(result.folder)
    newest.write_bytes(newest.read_bytes()[:1000])
    (result.folder / POTENTIAL_FILE).unlink()
    resume(result.folder, console=QUIET)
    assert (result.folder / "steps.csv").read_bytes() == log
    for path in state_files(result.folder):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        resume(result.folder, console=QUIET)
    assert older.name < newest.name


def test_foreign_state_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    assert read_newest_state(tmp_path) is None
    with atomic_write(tmp_path / "state-0000000001.safetensors") as file:
        file.write(save({}, metadata={"mlip": "{}"}))
    with pytest.raises(CheckpointError, match="not the state of a training run"):
        read_newest_state(tmp_path)
    assert Position().global_step == 0
