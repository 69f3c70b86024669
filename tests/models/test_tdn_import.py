"""Official TDN checkpoints, put together from golden weights, become potentials."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from typer.testing import CliRunner

from mlip.cli.app import app
from mlip.errors import CheckpointError, InputError
from mlip.models.official_files import read_checkpoint_file, recognise
from mlip.models.tdn_import import PUBCHEMQCR, import_tdn
from mlip.ops.tensor_products.factors import NAMES
from mlip.potential import Potential
from tests.finite_differences import evaluate

ELEMENTS = (1, 2, 6, 7, 8, 18)  # in the recorded structures


@pytest.fixture(scope="module")
def golden(shared):
    """Arrays of a recorded model."""
    with np.load(shared / "golden" / "tdn" / "model_L2_isolated.npz") as file:
        return dict(file)


def state(golden, wrap=str):
    return {wrap(k[3:]): torch.tensor(a) for k, a in golden.items() if k.startswith("sd/")}


def wrapped(name):
    """As compiled blocks in a parallel run have it."""
    return "module." + name.replace("blocks.1.", "blocks.1._orig_mod.")


def save(golden, path, *, without=(), wrap=str, bare=False, **more):
    weights = {k: v for k, v in state(golden, wrap).items() if not k.endswith(tuple(without))}
    extra = {"epoch": 7, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-4}]}}
    torch.save(weights if bare else {"model_state_dict": weights, **extra, **more}, path)
    return path


def check(potential, golden, kind):
    """Compare energies and forces of all structures with the recorded ones.

    Weights are float32, and so is the sum of an element's weights and the bias of all.
    """
    potential.to_dtype(torch.float64)
    kept = np.zeros((len(golden["z"]), 3))
    kept[golden["mask"]] = golden[f"forces_{kind}"]
    for i, energy in enumerate(golden["energy"]):
        own = golden["batch"] == i
        result = evaluate(potential, Atoms(golden["z"][own].ravel(), golden["pos"][own]))
        assert result.energy == pytest.approx(energy, abs=1e-7)
        np.testing.assert_allclose(result.forces, kept[own], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("wrap", "bare"), [(str, True), (wrapped, True), (str, False), (wrapped, False)]
)
def test_every_kind_of_file(golden, tmp_path, wrap, bare):
    path = save(golden, tmp_path / "a.pth", wrap=wrap, bare=bare)
    assert recognise(read_checkpoint_file(path), path) == "tdn"
    check(import_tdn(path, cutoff=3.0, elements=ELEMENTS), golden, "direct")


def test_command_writes_an_ordinary_potential(golden, tmp_path, monkeypatch):
    path, out = save(golden, tmp_path / "a.pth"), tmp_path / "tdn.safetensors"
    load, read = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda name, **given: read.append(name) or load(name, **given)
    )
    command = ["convert-model", str(path), str(out), "--cutoff", "3", "--gradient"]
    done = CliRunner().invoke(app, [*command, "--elements", "Ar,He,O,N,C,H"])
    assert done.exit_code == 0, done.output
    assert read == [path]
    assert "not a total energy" in done.output
    assert "cutoff 3 Å and average numbers of PubChemQCR-S" in done.output
    potential = Potential.load(out)
    assert potential.elements == ELEMENTS
    assert potential.conservative
    check(potential, golden, "gradient")
    assert potential.metadata["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert potential.metadata["source"]["epoch"] == 7
    assert "--overwrite" in CliRunner().invoke(app, command).output


def test_factors_of_a_cache_file(golden, tmp_path):
    weights = state(golden)
    given = {name: weights[f"edge_embed.tp.cp_tp.{name}"] for name in NAMES}
    torch.save(given, tmp_path / "cp_init.pt")
    bare = save(golden, tmp_path / "a.pth", without=NAMES)
    with pytest.raises(InputError, match="--factors"):
        import_tdn(bare)
    options = {"cutoff": 3.0, "elements": ELEMENTS, "factors": tmp_path / "cp_init.pt"}
    check(import_tdn(bare, **options), golden, "direct")
    with pytest.raises(InputError, match="leave --factors out"):
        import_tdn(save(golden, tmp_path / "b.pth"), factors=tmp_path / "cp_init.pt")


def test_what_the_file_does_not_hold(golden, tmp_path):
    path = save(golden, tmp_path / "a.pth")
    small, full = (import_tdn(path, trained_on=name) for name in ("PubChemQCR-S", "PubChemQCR"))
    assert (small.model.config.average_atoms, full.model.config.average_atoms) == (36.6, 30.0)
    assert small.elements == PUBCHEMQCR
    assert len(PUBCHEMQCR) == 25
    assert json.dumps(small.metadata)
    for wrong, message in (
        ({"trained_on": "QM9"}, "QM9"),
        ({"cutoff": 0.0}, "cutoff"),
        ({"elements": [1, 92]}, "atomic number 92"),
    ):
        with pytest.raises((InputError, CheckpointError), match=message):
            import_tdn(path, **wrong)


class Marker:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda g, p: save(g, p, extra=Marker(p.with_name("ran"))), [], "could run code"),
        (lambda g, p: save(g, p, without=["attn.alpha_dot"]), [], "not the weights"),
        (lambda g, p: save(g, p, without=["head.0.linear.weight"]), [], "missing: head_hidden"),
        (lambda _, p: torch.save({"a": torch.zeros(1)}, p), [], "not of a model that can be"),
        (lambda _, p: p.write_bytes(b"no"), [], "a.pth"),
        (save, ["--published", "--weights", "raw"], "no use for --weights, --published"),
        (save, ["--elements", "Xx"], "Xx"),
    ],
)
def test_what_cannot_be_converted_is_refused(golden, tmp_path, write, options, message):
    path, out = tmp_path / "a.pth", tmp_path / "out.safetensors"
    write(golden, path)
    done = CliRunner().invoke(app, ["convert-model", str(path), str(out), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
