"""EquiformerV3 against numbers of the official code."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlip.errors import CheckpointError, DataError, InputError
from mlip.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from mlip.models.equiformer_v3_official import config_from_official, model_from_official, our_name
from mlip.validation.parity_equiformer_v3 import compare_file

FILES = (
    "g01_nacl8_L2_grad",
    "g02_nacl8_L4_C32_grad",
    "g03_nacl8_L4_direct",
    "g04_ethanol_L4_grad",
    "g05_ethanol_L2_direct",
    "g06_slab_L4_grad",
    "g07_slab_L4_direct_oc20like",
    "g08_batch2_L2_grad",
    "g09_dens_nacl8_L4_direct",
    "g10_slab_L2_direct",
    "g11_POLE_perfect_nacl8_L4_grad",
    "primitives",
)


@pytest.fixture
def folder(shared):
    """Golden files of the official code."""
    return shared / "golden" / "equiformer_v3"


@pytest.fixture
def small(folder):
    """Arrays of the smallest whole model."""
    with np.load(folder / "g01_nacl8_L2_grad.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", FILES)
def test_golden_file(folder, name):
    rows = compare_file(folder / f"{name}.npz")
    assert len(rows) >= 15
    failed = [row for row in rows if not row.passed]
    assert not failed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("g01_nacl8_L2_grad", {"edges", "feat_block1", "node_energy", "pgrad_norm", "train_loss"}),
        ("g09_dens_nacl8_L4_direct", {"dens_forces (exact)", "dens_energy (published)"}),
        ("g11_POLE_perfect_nacl8_L4_grad", {"forces (exact)", "stress (published)"}),
        ("primitives", {"rot/wigner_L6M2 inverse", "attention_L4M2", "grid/L6M6_20x20_l/to_grid"}),
    ],
)
def test_what_is_compared(folder, name, expected):
    assert expected <= {row.quantity for row in compare_file(folder / f"{name}.npz")}


def test_frozen_poles_differ_from_exact_ones(folder):
    """The two settings are not compared with the same numbers where edges lie along y."""
    with np.load(folder / "g11_POLE_perfect_nacl8_L4_grad.npz") as file:
        assert np.abs(file["forces_f64"] - file["forces_exact_f64"]).max() > 1e-3


@pytest.mark.parametrize(
    "weight",
    [
        "sd/blocks.1.ga.so2_linear_1.so2_m_linear.1.fc.weight",
        "sd/blocks.0.ga.alpha_dot",
        "sd/blocks.1.ffn.grid_mlp.grid_linear_2.weight",
        "sd/edge_degree_embedding.rad_func.net.4.bias",
    ],
)
def test_a_changed_weight_is_noticed(small, tmp_path, weight):
    small[weight] = small[weight] * np.float32(1 + 1e-4)
    np.savez(tmp_path / "changed.npz", **small)
    rows = {(r.quantity, r.dtype): r for r in compare_file(tmp_path / "changed.npz")}
    assert not rows["forces (exact)", "float64"].passed
    assert not rows["pgrad_norm", "float64"].passed


def test_a_missing_edge_is_noticed(small, tmp_path):
    for name in ("edge_offsets", "edge_dist_f64", "edge_vec_f64"):
        small[name] = small[name][:-1]
    small["edge_index"] = small["edge_index"][:, :-1]
    np.savez(tmp_path / "changed.npz", **small)
    rows = {row.quantity: row for row in compare_file(tmp_path / "changed.npz")}
    assert not rows["edges"].passed


def test_script_reports_and_fails(small, repository, tmp_path):
    small["energy_f64"] = small["energy_f64"] + 1e-9
    np.savez(tmp_path / "changed.npz", **small)
    command = [sys.executable, str(repository / "scripts" / "check_parity.py"), "equiformer_v3"]
    done = subprocess.run(
        [*command, str(tmp_path / "changed.npz")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_foreign_files_are_named(tmp_path):
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    with pytest.raises(DataError, match=r"foreign\.npz"):
        compare_file(tmp_path / "foreign.npz")


def test_options_no_published_model_has_are_refused(small):
    official = json.loads(str(small["config_json"]))
    for change in ({"softcap": 5.0}, {"norm_type": "sep_layer_norm"}, {"value_drop": 0.1}):
        with pytest.raises(InputError, match=next(iter(change))):
            config_from_official(official | change, (11, 17))
    with pytest.raises(InputError, match="colour"):
        config_from_official(official | {"colour": 1}, (11, 17))


def test_weights_that_do_not_fit_are_named(small):
    official = json.loads(str(small["config_json"]))
    weights = {
        name.removeprefix("sd/"): torch.from_numpy(array)
        for name, array in small.items()
        if name.startswith("sd/")
    }
    config = config_from_official(official, (11, 17))
    assert model_from_official(weights, config).elements == (11, 17)
    with pytest.raises(CheckpointError, match="energy_head"):
        model_from_official(
            {name: w for name, w in weights.items() if "energy_block" not in name}, config
        )
    with pytest.raises(CheckpointError, match="surprise"):
        model_from_official(weights | {"surprise": torch.zeros(2)}, config)
    with pytest.raises(CheckpointError, match="100 rows"):
        model_from_official(weights, config_from_official(official, (11, 101)))


def test_parameters_come_in_the_official_order(small):
    """Averaged weights of official checkpoints are a list without names."""
    config = config_from_official(json.loads(str(small["config_json"])), (11, 17))
    with torch.random.fork_rng(devices=[]):
        ours = [name for name, _ in EquiformerV3(config).named_parameters()]
    assert ours == [our_name(str(name)) for name in small["param_names"]]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 30_278_113),
        ({"n_radial": 64}, 30_333_409),
        ({"n_radial": 64, "lmax": 6}, 48_841_313),
        ({"prediction": "direct", "denoising": True}, 34_859_044),
        ({"prediction": "direct", "denoising": True, "n_radial": 64}, 34_928_164),
        ({"prediction": "direct", "denoising": True, "n_radial": 64, "lmax": 6}, 57_077_924),
        (
            {
                "prediction": "direct",
                "direct_stress": False,
                "n_radial": 128,
                "lmax": 6,
                "layers": 8,
                "attention_hidden": 64,
            },
            91_390_274,
        ),
    ],
)
def test_published_configurations_have_their_numbers_of_parameters(changes, count):
    """Official tables have 128 rows, ours one for each of 118 elements."""
    with torch.device("meta"):
        model = EquiformerV3(EquiformerV3Config(elements=tuple(range(1, 119)), **changes))
    tables = [p for name, p in model.named_parameters() if name.endswith("embedding.weight")]
    missing = sum(10 * table.shape[1] for table in tables if table.shape[0] == 118)
    assert sum(p.numel() for p in model.parameters()) + missing == count
