"""TDN: numbers and weights of the official code, exact against low-rank products."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip.errors import CheckpointError, DataError, InputError
from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.models.tdn import TDN, TDNConfig
from mlip.models.tdn_official import config_from_official, model_from_official, read_official
from mlip.ops.tensor_products import find_factors
from mlip.ops.tensor_products.factors import NAMES
from mlip.potential import Potential
from mlip.validation.parity import Omission
from mlip.validation.parity_tdn import compare_file
from tests.finite_differences import evaluate, rotation

MODELS = ("model_L1_mol", "model_L2_isolated", "model_L3_mol", "model_L1_periodic_derived")
PRODUCTS = (
    *(f"tp_L{size}_uvu" for size in ("1_R5", "1_R7", "1_R8", "2_R14", "2_R28", "2_R32", "2_R81")),
    *(f"tp_L{size}_uvu" for size in ("3_R21", "3_R63", "4_R28", "4_R112")),
    *(f"tp_L2_R28_{mode}" for mode in ("uvw", "uvv", "uuw", "uuu")),
)
SMALL = {
    "layers": 2,
    "channels": 8,  # one vector of the kernels in float64
    "heads": 2,
    "n_radial": 5,
    "radial_hidden": (8,),
    "cutoff": 4.0,
}

PUBLISHED = {
    "product": "low_rank",
    "rank": 12,
    "norm": "degree",
    "published": True,
    "attention_dropout": 0.2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep the factors of the tests out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "factors"
    monkeypatch.setattr("mlip.ops.tensor_products.factors._cache_folder", lambda: folder)


def water_like():
    positions = [[0, 0, 0], [0.96, 0.1, 0.2], [-0.3, 0.9, -0.4], [0.4, -0.5, 1.6], [2.4, 1.2, 0.3]]
    return Atoms("OHHCN", positions=positions)


def random_model(**settings):
    """The same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TDN(TDNConfig(**settings)).double()


def official(shared, name="model_L1_mol"):
    with np.load(shared / "golden" / "tdn" / f"{name}.npz") as file:
        weights = {key[3:]: torch.from_numpy(file[key]) for key in file.files if key[:3] == "sd/"}
        return weights, json.loads(str(file["meta"]))


@pytest.mark.parametrize("name", [*MODELS, *PRODUCTS])
def test_golden_file(shared, name):
    rows = compare_file(shared / "golden" / "tdn" / f"{name}.npz")
    assert len(rows) >= 5
    assert [row for row in rows if not row.passed] == []
    if name in MODELS[:3]:
        quantities = {row.quantity for row in rows}
        assert {"energy (gradient)", "forces_direct", "forces_gradient", "block0"} <= quantities


def changed(shared, path, name, change):
    """Write a golden file with other arrays."""
    with np.load(shared / "golden" / "tdn" / f"{name}.npz") as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("model_L2_isolated", ["sd/blocks.1.attn.tp2.cp_tp.cp_b"]),
        (
            "model_L2_isolated",
            ["energy_rot", "forces_direct_rot", "edge_vec"]
            + [f"mid/{k}" for k in ("atom_embed", "b0.rad", "b0.tp1", "b0.tp2", "b0.ffn", "head")],
        ),
        ("tp_L2_R28_uvu", ["cp_a"]),
        ("tp_L2_R28_uvu", ["out_exact", "out_cp_f32"]),
        ("misc", ["loss_p2"]),
    ],
)
def test_a_changed_number_fails(shared, tmp_path, name, keys):
    """Each array that a file has counts: as many rows fail as arrays were changed."""

    def change(arrays):
        for key in keys:
            arrays[key] = arrays[key] * np.float32(1 + 1e-3)

    path = changed(shared, tmp_path / "changed.npz", name, change)
    failed = [row.quantity for row in compare_file(path) if not row.passed]
    assert len({quantity.split(" (")[0] for quantity in failed}) >= len(keys), failed


def test_script_says_so_and_lists_what_has_no_counterpart(shared, repository, tmp_path):
    def change(arrays):
        arrays["cp_a"] = arrays["cp_a"] * np.float32(1 + 1e-5)

    bad = changed(shared, tmp_path / "bad.npz", "tp_L2_R28_uvu", change)
    script = [sys.executable, str(repository / "scripts" / "check_parity.py"), "tdn"]
    good = [str(shared / "golden" / "tdn" / "misc.npz")]
    for files, code, last in ((good, 0, "all within tolerance"), ([*good, str(bad)], 1, "FAILED")):
        done = subprocess.run([*script, *files], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert done.stdout.splitlines()[-1] == f"parity: {last}"
        assert "not compared: split/… (6 arrays): " in done.stdout
        assert "not compared: loss_rmse: " in done.stdout


def test_parts_may_be_missing_and_unknown_ones_are_listed(shared, tmp_path):
    """Another set of files has other names, sizes and parts."""

    def strip(arrays):
        meta = json.loads(str(arrays["meta"]))
        meta["config"] = {"cutoff": meta["config"]["cutoff"], "dropout_of_nothing": 1}
        for name in list(arrays):
            if name.startswith("mid/") or name in ("rot", "edge_vec", "forces_direct"):
                del arrays[name]
        arrays["meta"] = np.array(json.dumps(meta))
        arrays["mid/new"] = np.zeros(3)

    rows = compare_file(changed(shared, tmp_path / "any name.npz", "model_L2_isolated", strip))
    assert all(row.passed for row in rows)
    assert {"energy (gradient)", "forces_gradient"} <= {row.quantity for row in rows}
    omitted = {row.quantity for row in rows if isinstance(row, Omission)}
    named = {"mid/new", "option dropout_of_nothing = 1", "energy_rot", "forces_direct_rot"}
    assert omitted == named | {"forces_direct_f32"}

    def shuffle(arrays):
        """The order of edges means nothing."""
        order = np.random.default_rng(0).permutation(len(arrays["edge_src"]))
        for name, array in arrays.items():
            if len(np.shape(array)) and len(array) == len(order):
                arrays[name] = array[order]

    rows = compare_file(changed(shared, tmp_path / "s.npz", "model_L1_periodic_derived", shuffle))
    assert all(row.passed for row in rows)
    rows = compare_file(changed(shared, tmp_path / "t.npz", "model_L3_mol", shuffle))
    assert all(row.passed for row in rows)


def test_foreign_files_are_named(tmp_path):
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.savez(tmp_path / "half.npz", **dict.fromkeys((*NAMES, "x1", "out_cp"), np.zeros((4, 7))))
    np.savez(tmp_path / "no_structure.npz", **{"sd/a": np.zeros(3), "meta": np.array("{}")})
    np.savez(tmp_path / "not_json.npz", **{"sd/a": np.zeros(3), "meta": np.array("{")})
    for name in ("foreign", "half", "no_structure", "not_json"):
        with pytest.raises(DataError, match=rf"{name}\.npz"):
            compare_file(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("lmax", [1, 2])
def test_low_rank_of_sufficient_rank_is_the_exact_model(lmax):
    """Nothing is approximated then: energies, forces and stress agree to rounding."""
    rank = {1: 8, 2: 30}[lmax]
    exact = random_model(elements=(1, 6, 7, 8), lmax=lmax, **SMALL)
    factors = find_factors(lmax, rank)
    low = TDN(exact.config.model_copy(update={"product": "low_rank", "rank": rank})).double()
    state = exact.state_dict()
    names = {
        name: dict(zip(NAMES, factors, strict=True)).get(name[-4:]) for name in low.state_dict()
    }
    low.load_state_dict(state | {name: f for name, f in names.items() if f is not None})
    atoms = water_like()
    a, b = (evaluate(Potential(model).eval(), atoms) for model in (exact, low))
    np.testing.assert_allclose(b.energies, a.energies, rtol=0, atol=1e-10)
    np.testing.assert_allclose(b.forces, a.forces, rtol=0, atol=1e-10)


def test_exact_product_makes_official_weights_equivariant(shared):
    """The same weights: rotations change the low-rank energy, not the exact one."""
    weights, meta = official(shared)
    changes = {}
    for product in ("low_rank", "exact"):
        config = config_from_official(meta["config"], (1, 6, 7, 8), prediction="gradient")
        config = config.model_copy(update={"product": product})
        potential = Potential(model_from_official(weights, config)).eval()
        atoms = water_like()
        turned = atoms.copy()
        turned.positions = atoms.positions @ rotation(2).T
        start, after = evaluate(potential, [atoms, turned])
        changes[product] = np.abs(after.forces - start.forces @ rotation(2).T).max()
    assert changes["low_rank"] > 1e-6
    assert changes["exact"] < 1e-12


def test_mirror_images_may_differ():
    potential = Potential(random_model(elements=(1, 6, 7, 8), **SMALL)).eval()
    atoms = water_like()
    mirrored = atoms.copy()
    mirrored.positions *= [1, 1, -1]
    start, after = evaluate(potential, [atoms, mirrored])
    assert abs(start.energy - after.energy) > 1e-8


def test_published_model_jumps_at_the_cutoff_and_drops_lone_atoms():
    model = random_model(elements=(1, 8), norm="degree", published=True, **SMALL)
    potential = Potential(model).eval()
    frames = [Atoms("OH", positions=[[0, 0, 0], [0, 0, d]]) for d in (4.0 - 1e-6, 4.0 + 1e-6)]
    inside, outside = evaluate(potential, frames)
    assert abs(inside.energy) > 1e-4
    assert outside.energy == 0
    assert not outside.forces.any()


def test_low_rank_model_keeps_its_factors(tmp_path):
    config = {"elements": (1, 6, 7, 8), "lmax": 1, "product": "low_rank", "rank": 6, **SMALL}
    potential = Potential(create_model("tdn", config)).to_dtype(torch.float64).eval()
    for name, buffer in potential.model.named_buffers():
        if name.endswith(NAMES):
            buffer.mul_(1.01)  # as if they came from elsewhere
    potential.save(tmp_path / "model.safetensors")
    loaded = Potential.load(tmp_path / "model.safetensors", dtype="float64")
    atoms = water_like()
    assert evaluate(loaded, atoms).energy == evaluate(potential, atoms).energy


def test_direct_forces_without_stress():
    potential = Potential(random_model(elements=(1, 8), prediction="direct", **SMALL))
    assert not potential.conservative
    assert not potential.has_stress
    atoms = Atoms("OH", positions=[[0, 0, 0], [0, 0, 1]], cell=np.eye(3) * 9, pbc=True)
    prediction = potential.eval()(atoms_to_graph(atoms, 4.0))
    assert prediction.forces.shape == (2, 3)
    assert prediction.stress.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("settings", [{}, PUBLISHED], ids=["exact", "published"])
def test_inference_by_groups_equals_the_definition(monkeypatch, settings, backend):
    """Several groups of atoms, a lone atom among them, against all edges at once in PyTorch."""
    model = random_model(elements=(1, 6, 7, 8), **SMALL | settings)
    factors = [buffer for name, buffer in model.named_buffers() if name.endswith(NAMES)]
    for i, buffer in enumerate(factors):  # each product has its own
        buffer += 0.1 * torch.linspace(i, 7.3, buffer.numel()).sin().view_as(buffer)
    potential = Potential(model).eval()
    lone = Atoms("H", positions=[[30, 0, 0]])
    atoms = water_like() + lone + water_like()
    atoms.positions[6:] += [2.0, 2.5, 3.0]
    graph = atoms_to_graph(atoms, 4.0)
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    expected = potential(graph, create_graph=True)
    monkeypatch.setenv("MLIP_BACKEND", backend)
    monkeypatch.setattr("mlip.models.tdn.EDGES_PER_GROUP", 10)
    found = potential(graph)
    for quantity in ("energies", "forces"):
        theirs = getattr(expected, quantity).detach()
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(getattr(found, quantity), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, PUBLISHED], ids=["exact", "published"])
def test_training_with_kernels_equals_the_definition(monkeypatch, settings):
    """Gradients of a loss of forces by all weights, with the same attention dropped out."""
    settings = SMALL | {"attention_dropout": 0.3} | settings
    model = random_model(elements=(1, 6, 7, 8), **settings).train()
    potential = Potential(model)
    graph = atoms_to_graph(water_like(), 4.0)
    found = {}
    for backend in ("torch", "numba"):
        monkeypatch.setenv("MLIP_BACKEND", backend)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            prediction = potential(graph, create_graph=True)
        loss = prediction.forces.square().sum() + prediction.energy.sum()
        found[backend] = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(found["numba"], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    assert not torch.equal(potential(graph).energy, potential(graph).energy)  # other ones dropped


def test_operator_of_factors_is_their_sum():
    model = random_model(elements=(1, 8), **SMALL | PUBLISHED)
    product = model.blocks[0].attention.product_1
    harmonics = torch.linspace(-1, 1, 27, dtype=torch.float64).view(3, 9)
    factors = [getattr(product, name) for name in NAMES]
    expected = torch.einsum("ir,jr,kr,ej->eki", *factors, harmonics)
    torch.testing.assert_close(product(harmonics), expected, rtol=0, atol=1e-13)


# Official files


def wrapped(weights):
    """Names as compiled blocks in a parallel run have them."""
    return {
        "module." + key.replace("blocks.0.", "blocks.0._orig_mod."): tensor
        for key, tensor in weights.items()
    }


def test_official_checkpoints_of_all_kinds(shared, tmp_path):
    weights, meta = official(shared)
    config = config_from_official(meta["config"], (1, 6, 7, 8))
    expected = model_from_official(weights, config).state_dict()
    legacy = {"blocks.0.attn.tp1.cp_tp.cp_u": torch.zeros(4, 7)}
    torch.save(wrapped(weights) | legacy, tmp_path / "best.pth")
    checkpoint = {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"lr": [0.1]}}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    for name in ("best.pth", "checkpoint.pth"):
        found = model_from_official(read_official(tmp_path / name), config).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_weights_without_factors_take_those_of_a_cache(shared):
    weights, meta = official(shared)
    config = config_from_official(meta["config"], (1, 6, 7, 8))
    bare = {key: tensor for key, tensor in weights.items() if not key.endswith(NAMES)}
    factors = find_factors(1, 8)
    model = model_from_official(bare, config, factors)
    assert torch.equal(model.blocks[0].attention.product_1.cp_a, factors.first.float().double())
    assert model.config.rank == 8
    assert model_from_official(bare, config).config.rank is None  # 7 L², found by the solver


def test_readme_size_has_all_names_and_the_published_count(shared):
    shapes = json.loads((shared / "golden" / "tdn" / "state_dict_readme_config.json").read_text())
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    arguments = {"hidden_channels": 256, "num_interactions": 6, "num_gaussians": 256}
    config = config_from_official(arguments, range(1, 80))
    model = model_from_official(weights, config, dtype=torch.float32)
    trainable = sum(p.numel() for p in model.parameters())
    assert trainable == 4_476_676 - 2 * 256  # element 0 and the bias of the one-hot map


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unusable_files_and_weights_are_named(shared, tmp_path):
    torch.save({"model_state_dict": {"a": Bomb(tmp_path / "executed")}}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no")
    for name in ("evil.pth", "foreign.pth", "text.pth", "missing.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_official(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    weights, meta = official(shared)
    config = config_from_official(meta["config"], (1, 6, 7, 8))
    with pytest.raises(CheckpointError, match="atomic number 92"):
        model_from_official(weights, config.model_copy(update={"elements": (1, 92)}))
    head = weights.pop("head.0.linear.weight")
    with pytest.raises(CheckpointError, match=r"missing: head_hidden\.weight$"):
        model_from_official(weights, config)
    weights |= {"head.0.linear.weight": head, "spare": head}
    with pytest.raises(CheckpointError, match="spare"):
        model_from_official(weights, config)
    with pytest.raises(InputError, match="num_layers"):
        config_from_official({"num_layers": 3}, (1,))


def test_settings_are_checked():
    for bad, match in (
        ({"channels": 7}, "multiple of heads"),
        ({"rank": 8}, "low_rank"),
        ({"radial_hidden": ()}, "radial_hidden"),
        ({"elements": (1, 1)}, "twice"),
        ({"elements": (0,)}, "1 to 118"),
    ):
        with pytest.raises(InputError, match=match):
            create_model("tdn", {"elements": (1,), **bad})
