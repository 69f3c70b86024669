"""Two processes under torchrun (CPU, gloo) give the gradients and the metrics of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.io import read, write
from safetensors.torch import load_file

from mlip.graph import atoms_to_graph
from mlip.training.config import build_config, write_config
from mlip.training.report import read_metrics
from mlip.training.run import POTENTIAL_FILE

PROGRAM = str(Path(__file__).with_name("train_and_dump.py"))


@pytest.fixture
def uneven_file(frames_file: Path, tmp_path: Path) -> Path:
    """Five frames of different size, one without forces, one without stress."""
    frames = read(frames_file, ":5")
    frames[1].calc.results.pop("forces")
    frames[3].calc.results.pop("stress")
    write(tmp_path / "uneven.extxyz", frames)
    return tmp_path / "uneven.extxyz"


def run(launcher: list[str], folder: Path, config: dict[str, Any], repository: Path) -> None:
    folder.mkdir()
    write_config(build_config({**config, "out": str(folder / "run")}), folder / "in.yaml")
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, PROGRAM, str(folder / "in.yaml")]
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]


def test_two_processes_equal_one(
    settings: Callable[..., dict[str, Any]],
    frames_file: Path,
    uneven_file: Path,
    tmp_path: Path,
    repository: Path,
) -> None:
    graphs = [atoms_to_graph(atoms, 4.0) for atoms in read(uneven_file, ":")]
    edges = sum(graph.edge_index.shape[1] for graph in graphs)
    data = {"train": str(uneven_file), "valid": [str(uneven_file), str(frames_file)]}
    # training is one batch, which two processes split; validation is two or more batches
    config = settings(data=data, batch={"max_edges": edges}, epochs=3, precision="float64")
    config["model"] = {**config["model"], "average_neighbors": 20.0}
    run([], tmp_path / "one", config, repository)
    port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", *port]
    run(launcher, tmp_path / "two", config, repository)

    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    for rank in range(2):
        two = load_file(tmp_path / "two" / f"gradients-{rank}.safetensors")
        for name, gradient in one.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(two[name], gradient, rtol=0, atol=1e-12 * scale + 1e-14)

    rows = [read_metrics(tmp_path / name / "run") for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [1, 2, 3]
    for single, double in zip(*rows, strict=True):
        for name in single:
            if name != "elapsed_s":
                assert double[name] == pytest.approx(single[name], rel=1e-7), name
    weights = [load_file(tmp_path / name / "run" / POTENTIAL_FILE) for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-6, atol=1e-8)
