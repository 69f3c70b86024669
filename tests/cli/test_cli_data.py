"""The commands convert and data: options reach their functions, messages and exit codes fit."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.datasets import open_dataset


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def data(tmp_path):
    """Forty dimers, one of them without a finite energy."""
    frames = []
    for i in range(40):
        atoms = Atoms(["Cu", "O" if i % 2 else "H"], [[0, 0, 0], [0, 0, 1.5 + i / 100]])
        atoms.info["sid"] = i // 4
        forces = np.zeros((2, 3))
        forces[0, 0] = i
        energy = np.nan if i == 39 else -float(i)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    path = tmp_path / "data.traj"
    write(path, frames)
    return path


@pytest.fixture
def store(data, tmp_path):
    run("convert", data, tmp_path / "data.lmdb", code=1)
    return tmp_path / "data.lmdb"


def sids(path):
    return [s.info["sid"] for s in open_dataset(path)]


def test_convert_with_shards_workers_and_quarantine(data, tmp_path):
    bad, out = tmp_path / "bad.tsv", tmp_path / "out"
    result = run(
        "convert", data, out, "--shard-size", 20, "--workers", 1, "--quarantine", bad, code=1
    )
    assert "40 frames read, 39 written, 1 dropped" in result.stdout
    assert "frame 39" in bad.read_text()
    assert [s["structures"] for s in json.loads((out / "manifest.json").read_text())["shards"]] == [
        20,
        19,
    ]
    failed = run("convert", data, tmp_path / "o.lmdb", "--policy", "raise", code=2)
    assert failed.stderr.startswith("error: ")
    assert "frame 39" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_convert_asks_for_what_oc20_files_do_not_say(shared, tmp_path):
    folder = shared / "samples" / "is2re_pyg2"
    asked = run("convert", folder, tmp_path / "o.lmdb", code=2)
    assert "--energy-convention adsorption" in asked.stderr
    said = ["--energy-convention", "adsorption"]
    asked = run("convert", folder, tmp_path / "o.lmdb", *said, code=2)
    assert "--is2re initial" in asked.stderr
    wrong = run("convert", folder, tmp_path / "o.lmdb", "--is2re", "last", *said, code=2)
    assert "expected initial or relaxed" in wrong.stderr
    done = run("convert", folder, tmp_path / "o.lmdb", "--is2re", "relaxed", *said)
    assert "energies: adsorption" in done.stdout


def test_merge_split_subset_filter_and_index(store, tmp_path):
    run("data", "merge", store, tmp_path / "data.traj", tmp_path / "m.lmdb", code=1)
    assert len(open_dataset(tmp_path / "m.lmdb")) == 78
    out = run("data", "split", store, tmp_path / "p", "--by", "sid", "--fractions", "0.5,0.3,0.2")
    assert "train: 19 structures" in out.stdout
    parts = [set(sids(tmp_path / "p" / f"{name}.lmdb")) for name in ("train", "valid", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10
    (tmp_path / "numbers.txt").write_text("3\n30\n")
    run("data", "subset", store, tmp_path / "s.lmdb", "--indices", tmp_path / "numbers.txt")
    assert sids(tmp_path / "s.lmdb") == [0, 7]
    filters = ["--elements", "Cu,O", "--max-forces", "20", "--has", "energy", "--where", "sid=3"]
    result = run("data", "filter", store, tmp_path / "f.extxyz", *filters)
    assert sids(tmp_path / "f.extxyz") == [3, 3]
    assert "left out on purpose: other elements 20" in result.stdout
    counted = run("data", "index", store, "--cutoff", "1.605")
    assert "39 structures, 78 atoms (at most 2 in one), 22 edges within 1.605 Å" in counted.stdout


def test_data_errors_are_one_line(store, tmp_path):
    for arguments, message in (
        (("split", store, tmp_path / "p", "--fractions", "a,b"), "expected numbers such as"),
        (("split", store, tmp_path / "p", "--fractions", "0.5,0.4"), "add up to 1"),
        (("split", store, tmp_path / "p", "--by", "mp_id"), "info has no 'mp_id'; it has sid"),
        (("filter", store, tmp_path / "f.lmdb", "--where", "sid"), "expected KEY=VALUE"),
        (("subset", store, tmp_path / "s.lmdb"), "give one of number, fraction and indices"),
        (("merge", store, tmp_path / "m.lmdb"), "at least two files"),
    ):
        result = run("data", *arguments, code=2)
        assert message in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_help_of_the_group_is_light():
    output = run("data", "--help").output
    for name in ("merge", "split", "subset", "filter", "index", "demo"):
        assert name in output
    code = (
        "import sys; from mlip.cli.app import app\n"
        "try: app(['data', 'split', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ase', 'numpy', 'lmdb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
