"""The published setting of Facet against numbers of the official code."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from mlip.errors import CheckpointError, DataError, InputError
from mlip.models.facet_jax import facet_from_jax
from mlip.validation.parity_facet import compare_file

FILES = (
    "facet_l2",
    "facet_l2_knn10",
    "facet_l3_batch",
    "facet_s_full",
    "layernorm_gauss_mean",
    "sevennet_gate",
    "parts",
)


@pytest.mark.parametrize("name", FILES)
def test_golden_file(shared, name):
    rows = compare_file(shared / "golden" / "facet" / f"{name}.npz")
    assert len(rows) >= 6
    failed = [row for row in rows if not row.passed]
    assert not failed


def test_intermediates_are_compared(shared):
    rows = compare_file(shared / "golden" / "facet" / "facet_l2.npz")
    assert {"mace/layer_1/self_connection", "head"} <= {row.quantity for row in rows}


def test_script_fails_on_a_changed_weight(shared, repository, tmp_path):
    with np.load(shared / "golden" / "facet" / "facet_l2.npz") as file:
        arrays = dict(file)
    name = "w:params/mace/layer_1/interaction/resid_adapter/w[1,1] 4x1e,4x1e"
    arrays[name] = arrays[name] * np.float32(1 + 1e-5)
    np.savez(tmp_path / "changed.npz", **arrays)
    command = [sys.executable, str(repository / "scripts" / "check_parity.py"), "facet"]
    done = subprocess.run(
        [*command, str(tmp_path / "changed.npz")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_untrained_radial_parameters_come_from_the_configuration(shared):
    with np.load(shared / "golden" / "facet" / "facet_l2.npz") as file:
        weights = {name[2:]: file[name] for name in file.files if name.startswith("w:")}
        official = json.loads(str(file["config_json"]))
    for name in ("rmax", "basis/freq"):
        del weights[f"params/edge_embedding/{name}"]
    model = facet_from_jax(weights, official, (8, 22, 38), 4.8)
    assert model.cutoff == official["edge_embed"]["r_max"]
    assert model.radial_basis.frequencies.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_foreign_files_are_named(tmp_path):
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    with pytest.raises(DataError, match=r"foreign\.npz"):
        compare_file(tmp_path / "foreign.npz")


def test_import_names_what_does_not_fit(shared):
    with np.load(shared / "golden" / "facet" / "facet_l2.npz") as file:
        weights = {name[2:]: file[name] for name in file.files if name.startswith("w:")}
        official = json.loads(str(file["config_json"]))
    head = weights.pop("params/head/Dense_0/kernel")
    with pytest.raises(CheckpointError, match="head"):
        facet_from_jax(weights, official, (8, 22, 38), 4.8)
    weights["params/head/Dense_0/kernel"] = head
    weights["params/new/part"] = head
    with pytest.raises(CheckpointError, match="params/new/part"):
        facet_from_jax(weights, official, (8, 22, 38), 4.8)
    del weights["params/new/part"]
    official["rescale"]["kind"] = "other"
    with pytest.raises(InputError, match="other"):
        facet_from_jax(weights, official, (8, 22, 38), 4.8)
