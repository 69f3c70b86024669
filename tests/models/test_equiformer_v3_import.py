"""Official checkpoints, put together in their layout from golden weights, become potentials."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.errors import CheckpointError, InputError
from mlip.graph import atoms_to_graph
from mlip.models.equiformer_v3_import import import_potential
from mlip.potential import Potential

SCALE = 0.8124567446457275
REFERENCES = torch.linspace(-9, -1, 119)
BUFFERS = {
    "distance_expansion.offset": torch.zeros(10),
    "so3_rotation.wigner_inv_rescale": torch.ones(1, 9, 9),
    "blocks.0.ga.so3_rotation.wigner_index_to_m_array": torch.ones(9, 9),
    "blocks.0.ga.act.so3_grid.to_grid_mat": torch.ones(80, 14),
    "blocks.0.norm_1.balance_degree_weight": torch.ones(1, 9),
    "norm.expand_index": torch.zeros(9, dtype=torch.int64),
}


class Golden:
    """Recorded model and a checkpoint of it as the official trainer would write one."""

    def __init__(self, path, prefix="module."):
        with np.load(path) as file:
            self.arrays = dict(file)
        config = json.loads(str(self.arrays["config_json"]))
        kind = config.pop("cls")
        self.model = {"name": "equiformer_v3" + ("_dens" if kind == "dens" else ""), **config}
        self.weights = {
            name[3:]: torch.tensor(value)
            for name, value in self.arrays.items()
            if name.startswith("sd/")
        }
        raw = {name: value + 0.1 for name, value in self.weights.items()}
        scales = {"mean": torch.tensor(0.0), "rmsd": torch.tensor(SCALE, dtype=torch.float64)}
        self.checkpoint = {
            "epoch": 3,
            "step": 70,
            "state_dict": {prefix + name: value for name, value in {**raw, **BUFFERS}.items()},
            "normalizers": {target: dict(scales) for target in ("energy", "forces", "stress")},
            "elementrefs": {"energy": {"element_references": REFERENCES.clone()}},
            "config": {"model": self.model, "optim": {"lr_initial": 2e-4}},
            "ema": {"decay": 0.999, "shadow_params": self.ordered()},
            "optimizer": {"state": {}},
            "best": np.float64(1.5),
        }

    def ordered(self):
        """Weights in the order of the official parameters, in which the file was written."""
        names = [str(name) for name in self.arrays.get("param_names", [])] or list(self.weights)
        return [self.weights[name] for name in names]

    def atoms(self):
        """The one structure of the file."""
        return Atoms(
            numbers=self.arrays["numbers"],
            positions=self.arrays["positions"],
            cell=self.arrays["cell"][0],
            pbc=self.arrays["pbc"][0],
        )

    def save(self, path):
        torch.save(self.checkpoint, path)
        return path


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "equiformer_v3" / "g01_nacl8_L2_grad.npz")


@pytest.fixture
def golden_direct(shared):
    return Golden(shared / "golden" / "equiformer_v3" / "g09_dens_nacl8_L4_direct.npz")


def check(potential, golden, *, scale=SCALE, references=True, stress_scale=None):
    """Compare with the recorded outputs in physical units."""
    potential.to_dtype(torch.float64)
    atoms = golden.atoms()
    result = potential(atoms_to_graph(atoms, potential.cutoff))
    zero = float(REFERENCES.double()[atoms.numbers].sum()) if references else 0.0
    assert float(result.energy[0]) == pytest.approx(
        scale * golden.arrays["energy_f64"][0] + zero, abs=1e-9
    )
    forces = scale * golden.arrays["forces_f64"]
    assert np.abs(result.forces.numpy() - forces).max() < 1e-9
    stress = (stress_scale or scale) * golden.arrays["stress_f64"].reshape(-1, 3, 3)
    assert np.abs(result.stress.detach().numpy() - stress).max() < 1e-6


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_averaged_weights_normalisers_and_references(golden, tmp_path, prefix):
    golden.checkpoint["state_dict"] = {
        prefix + name.removeprefix("module."): value
        for name, value in golden.checkpoint["state_dict"].items()
    }
    check(import_potential(golden.save(tmp_path / "a.pt")), golden)


def test_order_of_averages_is_recorded(golden):
    assert "param_names" in golden.arrays


def test_raw_weights(golden, tmp_path):
    path = golden.save(tmp_path / "a.pt")
    raw = import_potential(path, weights="raw")
    averaged = dict(import_potential(path).model.named_parameters())
    for name, weight in raw.model.named_parameters():
        assert torch.allclose(weight, averaged[name] + 0.1)
    del golden.checkpoint["ema"]
    only = import_potential(golden.save(tmp_path / "b.pt"))
    assert only.metadata["source"]["weights"] == "raw"


def test_direct_model_with_scales_of_its_own(golden_direct, tmp_path):
    normalizers = golden_direct.checkpoint["normalizers"]
    normalizers["energy"] = {"mean": 0.0, "std": 24.9}
    normalizers["stress"] = {"mean": 0.0, "rmsd": 0.3}
    potential = import_potential(golden_direct.save(tmp_path / "a.pt"))
    potential.to_dtype(torch.float64)
    result = potential(atoms_to_graph(golden_direct.atoms(), potential.cutoff))
    arrays = golden_direct.arrays
    zero = float(REFERENCES.double()[arrays["numbers"]].sum())
    assert float(result.energy[0]) == pytest.approx(24.9 * arrays["energy_f64"][0] + zero, abs=1e-8)
    assert np.abs(result.forces.detach().numpy() - SCALE * arrays["forces_f64"]).max() < 1e-9
    stress = 0.3 * arrays["stress_f64"].reshape(-1, 3, 3)
    assert np.abs(result.stress.detach().numpy() - stress).max() < 1e-6  # weights of float32


def test_bare_state_dict_with_training_file(golden, tmp_path):
    torch.save(golden.weights, tmp_path / "bare.pt")
    normalizer = {name: {"mean": 0.0, "stdev": SCALE} for name in ("energy", "forces", "stress")}
    training = {
        "model": golden.model,
        "dataset": {"train": {"transforms": {"normalizer": normalizer}}},
    }
    (tmp_path / "training.yml").write_text(yaml.safe_dump(training))
    np.savez(tmp_path / "references.npz", coeff=REFERENCES.numpy())
    with pytest.raises(InputError, match=r"holds no configuration.*--config"):
        import_potential(tmp_path / "bare.pt")
    potential = import_potential(
        tmp_path / "bare.pt",
        config=tmp_path / "training.yml",
        references=tmp_path / "references.npz",
    )
    check(potential, golden)


def test_elements(golden, tmp_path):
    table = torch.zeros(119)
    table[[11, 17, 26]] = torch.tensor([-1.0, -2.0, -3.0])
    table[40] = 1.3e11
    golden.checkpoint["elementrefs"] = {"energy": {"element_references": table}}
    path = golden.save(tmp_path / "a.pt")
    assert import_potential(path).elements == (11, 17, 26)
    assert import_potential(path, elements=[17, 11]).elements == (11, 17)
    with pytest.raises(InputError, match=r"nothing is known of Zr"):
        import_potential(path, elements=[11, 40])


def test_command_writes_an_ordinary_potential(golden, tmp_path, monkeypatch):
    path, out = golden.save(tmp_path / "a.pt"), tmp_path / "v3.safetensors"
    load, read = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda name, **given: read.append(name) or load(name, **given)
    )
    result = CliRunner().invoke(app, ["convert-model", str(path), str(out), "--elements", "Na,Cl"])
    assert result.exit_code == 0, result.output
    assert read == [path]
    potential = Potential.load(out)
    assert potential.elements == (11, 17)
    check(potential, golden)
    card = potential.metadata
    assert card["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["source"]["step"] == 70
    again = CliRunner().invoke(app, ["convert-model", str(path), str(out)])
    assert again.exit_code == 2
    assert "--overwrite" in again.output


class Marker:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_does_not_run(golden, tmp_path):
    golden.checkpoint["extra"] = Marker(tmp_path / "ran")
    path, out = golden.save(tmp_path / "bad.pt"), tmp_path / "v3.safetensors"
    result = CliRunner().invoke(app, ["convert-model", str(path), str(out)])
    assert result.exit_code == 2
    assert "could run code" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pt"]


@pytest.mark.parametrize("keep", [0, 10, 2000, -100])
def test_damaged_file(golden, tmp_path, keep):
    path = golden.save(tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        import_potential(path)


def _rename(golden):
    golden.model["name"] = "escn"


def _drop_weight(golden):
    for weights in (golden.checkpoint["state_dict"], golden.weights):
        weights.pop("module.blocks.1.ga.alpha_dot", None)


def _more_channels(golden):
    golden.model["num_channels"] = 20


def _fewer_averages(golden):
    golden.checkpoint["ema"]["shadow_params"].pop()


def _other_order(golden):
    golden.checkpoint["ema"]["shadow_params"].reverse()


def _not_its_gradient(golden):
    golden.checkpoint["normalizers"]["forces"] = {"mean": 0.0, "rmsd": 0.5}


def _mean(golden):
    golden.checkpoint["normalizers"]["energy"]["mean"] = torch.tensor(-3.0)


def _option(golden):
    golden.model["ffn_activation"] = "gate"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rename, "the model is 'escn'; only equiformer_v3"),
        (_drop_weight, r"missing: blocks\.1\.attention\.alpha_dot"),
        (_more_channels, "of another shape: .*for"),
        (_fewer_averages, "averaged weights and .* parameters; .*--weights raw"),
        (_other_order, "not in the order of the parameters"),
        (_not_its_gradient, "not the derivatives of that energy"),
        (_mean, "energy has mean -3"),
        (_option, "ffn_activation is 'gate'"),
    ],
)
def test_what_does_not_fit_is_refused(golden, tmp_path, damage, message):
    damage(golden)
    with pytest.raises((CheckpointError, InputError), match=message):
        import_potential(golden.save(tmp_path / "a.pt"))


def test_other_content(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"no 'state_dict' or .* \(weights\)"):
        import_potential(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        import_potential(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        import_potential(tmp_path / "c.pt")
