"""Blocks of Facet written out for inference agree with the general way, or leave it to it."""

from __future__ import annotations

import copy

import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip.errors import InputError
from mlip.graph import atoms_to_graph, batch_graphs, edge_vectors
from mlip.models import create_model, facet_inference
from mlip.models.facet_inference import blocks_in_inference, prepared
from mlip.models.facet_packed import by_degree, joined
from mlip.ops.backend import decisions
from mlip.potential import Potential

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def _nothing_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in ("_refused", "_uncovered"):
        monkeypatch.setattr(f"mlip.ops.backend.{kept}", {})


BASE = {"elements": (29, 79), "cutoff": 4.2, "embedding": 16, "outputs": 16}
MODELS = {
    "degrees 0 to 2, twice": {"hidden": ((32, 16, 16), (32, 16, 16))},
    "messages of higher degree": {"hidden": ((32, 16),), "message": (32, 32, 16, 16)},
    "two factors": {"hidden": ((16, 16),), "product_order": 2},
    "no residual": {"hidden": ((16, 16, 16),), "block_residual": False},
    "fewer channels out": {"hidden": ((32, 32), (16, 16))},
    "fewer degrees out": {"hidden": ((16, 16, 16), (16, 16))},
    "odd factors": {"hidden": ((16, 4),), "product_order": 2},
    "a degree left out": {"hidden": ((16, 0, 16), (16, 0, 16))},
    "fewer scalars out": {"hidden": ((32, 16),), "outputs": 8},
    "more scalars out": {"hidden": ((16, 16),), "outputs": 40},
}
OTHERS = {
    "gates": {"node_update": "gate", "hidden": ((16, 16),)},
    "radial network": {"radial_hidden": (8,), "hidden": ((16, 16),)},
    "odd channels": {"hidden": ((20, 12), (20, 12))},
    "normalised": {"residual_normalization": True, "hidden": ((16, 16),)},
    "mixed before": {"linear_before": True, "hidden": ((16, 16),)},
}


def make(options: dict, dtype: torch.dtype = torch.float64) -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = create_model("facet", {**BASE, **options})
        for weight in model.parameters():  # gains too, which start at one
            weight.data += 0.1 * torch.randn_like(weight)
    return Potential(model).to_dtype(dtype).eval()


def alloy():
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.symbols[::3] = "Au"
    atoms.rattle(0.1, seed=2)
    return atoms


def plain(potential: Potential) -> Potential:
    other = copy.deepcopy(potential)
    other.model.backend = "torch"
    return other


def told_of_blocks() -> dict[str, str]:
    return {name: how for name, how in decisions().items() if "block of Facet" in name}


def functions_used() -> set[str]:
    ran = {name for name, how in decisions().items() if how.startswith("CPU kernel")}
    return {name for name in ran if "functions of edges" in name}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_the_general_way(name, dtype, monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        made = new_empty(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    potential = make(MODELS[name], dtype)
    graph = atoms_to_graph(alloy(), potential.cutoff)
    found, truth = potential(graph), plain(make(MODELS[name]))(graph)
    told = told_of_blocks().values()
    assert len(told) == len(potential.model.blocks)
    assert sum(not how.startswith("CPU kernel") for how in told) == (name == "odd factors")
    known = plain(potential)(graph)
    rounding = (100 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
    for name in ("energies", "forces", "stress"):
        a, b, exact = (getattr(each, name) for each in (found, known, truth))
        assert (a - exact).norm() <= 2 * (b - exact).norm() + rounding * exact.norm()


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_one_block_may_go_the_general_way(refused, monkeypatch):
    """Opposite edges are together then, and the block gets all of them."""
    potential = make(MODELS["degrees 0 to 2, twice"])
    use_kernel, asked = facet_inference.use_kernel, []

    def refuses_one(backend, name, *arguments, **options):
        asked.append(name)
        is_last = "sums for elements" not in name and len(asked) == refused + 1
        return not is_last and use_kernel(backend, name, *arguments, **options)

    monkeypatch.setattr(facet_inference, "use_kernel", refuses_one)
    graph = atoms_to_graph(alloy(), potential.cutoff)
    for a, b in zip(potential(graph), plain(potential)(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert "opposite edges together" in asked[refused]
    assert len(told_of_blocks()) == 2


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_go_the_general_way(name):
    """Nothing is told about a block that is another one; its operators tell for themselves."""
    potential = make(OTHERS[name])
    graph = atoms_to_graph(alloy(), potential.cutoff)
    for a, b in zip(potential(graph), plain(potential)(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    blocks = told_of_blocks()
    if name == "odd channels":  # the first block has those of the embedding
        assert {how[:13] for how in blocks.values()} == {"CPU kernel, a", "plain PyTorch"}
    else:
        assert not blocks
    assert any(key.startswith("convolution") for key in decisions())


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "normalized_silu"},
        {"final_activation": "silu"},
        {"mixer_normalization": True},
    ],
)
def test_other_perceptrons_of_the_last_block_go_the_general_way(options):
    potential = make({"hidden": ((16, 16),), **options})
    graph = atoms_to_graph(alloy(), potential.cutoff)
    for a, b in zip(potential(graph), plain(potential)(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ((_, how),) = told_of_blocks().items()  # of the first
    assert how.startswith("CPU kernel")


@pytest.mark.parametrize(
    "options",
    [
        {"radial_basis": "gaussian"},
        {"envelope": "xplor"},
        {"trainable_cutoff": True},
        {"node_update": "gate"},
    ],
)
def test_other_functions_of_edges_are_evaluated_in_plain_pytorch(options, monkeypatch):
    potential = make({"hidden": ((16, 16),), **options})
    graph = atoms_to_graph(alloy(), potential.cutoff)
    torch.testing.assert_close(
        potential(graph).forces, plain(potential)(graph).forces, rtol=1e-12, atol=1e-12
    )
    assert not functions_used()
    ours = make({"hidden": ((16, 16),)})
    graph = atoms_to_graph(alloy(), ours.cutoff)
    ours(graph)
    assert functions_used()
    monkeypatch.setattr("mlip.ops.backend._refused", {})
    ours.train()(graph)
    assert not functions_used()


@pytest.mark.parametrize("name", ["degrees 0 to 2, twice", "messages of higher degree"])
def test_symmetry_does_not_refuse_a_block(name):
    """Vectors vanish in a perfect crystal, and so do their gradients, up to rounding."""
    potential = make(MODELS[name], torch.float32)
    potential(atoms_to_graph(bulk("Cu", cubic=True) * (2, 1, 1), potential.cutoff))
    told = told_of_blocks().values()
    assert len(told) == len(potential.model.blocks)
    assert all(how.startswith("CPU kernel") for how in told)


def test_changed_weights_are_noticed():
    potential = make(MODELS["two factors"])
    graph = atoms_to_graph(alloy(), potential.cutoff)
    first = potential(graph)
    block = potential.model.blocks[0]
    assert prepared(potential.model) is prepared(potential.model)
    with torch.no_grad():
        block.skip.weights[0].mul_(1.5)
    changed = potential(graph)
    assert (changed.energy - first.energy).abs() > 1e-6
    torch.testing.assert_close(changed.energy, plain(potential)(graph).energy, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_steps_of_training_are_noticed(mode, trainable):
    """A fused optimiser, which counts no version, between two evaluations."""
    potential = make(MODELS["two factors"]).requires_grad_(trainable)
    graph = atoms_to_graph(alloy(), potential.cutoff)
    first = potential(graph)
    potential.requires_grad_(True).train(mode)
    potential(graph, create_graph=True).forces.square().sum().backward()
    optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-2, fused=True)
    optimizer.step()
    optimizer.zero_grad()
    changed = potential.requires_grad_(trainable).eval()(graph)
    assert (changed.energy - first.energy).abs() > 1e-6
    torch.testing.assert_close(changed.energy, plain(potential)(graph).energy, rtol=1e-12, atol=0)


def test_second_derivatives_go_the_general_way():
    """Weights of a model in evaluation have gradients still, of forces too."""
    potential = make(MODELS["two factors"])
    graph = atoms_to_graph(alloy(), potential.cutoff)
    weight = potential.model.blocks[0].after.weights[0]
    slopes = []
    for model in (potential, plain(potential)):
        own = model.model.blocks[0].after.weights[0]
        forces = model(graph, create_graph=True).forces
        (slope,) = torch.autograd.grad(forces.square().sum(), own)
        slopes.append(slope)
    assert weight.requires_grad
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("decided", [False, True])
def test_atoms_without_neighbors(together, decided):
    """Alone or beside a crystal, before and after blocks have been compared."""
    potential = make(MODELS["two factors"])
    crystal = atoms_to_graph(alloy(), potential.cutoff)
    if decided:
        potential(crystal)
        assert told_of_blocks()
    far = Atoms("CuAu", positions=[[0, 0, 0], [0, 0, 9]], cell=[20, 20, 20], pbc=True)
    graph = atoms_to_graph(far, potential.cutoff)
    assert not graph.edge_index.numel()
    if together:
        graph = batch_graphs([graph, crystal])
    for a, b in zip(potential(graph), plain(potential)(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert bool(told_of_blocks()) == bool(functions_used()) == (together or decided)


def test_results_do_not_depend_on_threads():
    potential = make(MODELS["degrees 0 to 2, twice"], torch.float32)
    graph = atoms_to_graph(alloy() * (3, 3, 3), potential.cutoff)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(potential(graph).forces)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("paired", [False, True])
def test_edges_that_do_not_exist_are_refused_by_the_first_block_that_runs(paired):
    potential = make(MODELS["two factors"])
    model, graph = potential.model, atoms_to_graph(alloy(), potential.cutoff)
    vectors, species = edge_vectors(graph), torch.arange(8) % 2
    x = (torch.randn(8, 1, 16, dtype=torch.float64),)

    def run(index):
        shift = graph.edge_shift if paired else None
        edges = model.edges(vectors, index, 8, inference=True, shift=shift)
        assert (edges.pairs is not None) == paired
        blocks_in_inference(model, x, edges, species)

    run(graph.edge_index)
    assert all(how.startswith("CPU kernel") for how in told_of_blocks().values())
    wrong = graph.edge_index.clone()
    wrong[0, 3] = 99
    with pytest.raises(InputError, match="sources among the atoms"):
        run(wrong)


def test_packed_features_are_not_copied_where_they_lie_in_order():
    flat = torch.randn(2 * (3 + 3 * 5))
    parts = by_degree(flat, 2, (3, 5))
    assert joined(parts).data_ptr() == flat.data_ptr()
    assert torch.equal(joined(parts), flat)
    assert torch.equal(joined(parts[1:]), flat[6:])
    for others in (
        (parts[0], parts[1].clone()),
        (parts[1], parts[0]),
        (parts[0], parts[1].transpose(0, 1).contiguous().transpose(0, 1)),
        (parts[0][:, :, :1].expand(2, 1, 3), parts[1]),
    ):
        expected = torch.cat([part.reshape(-1) for part in others])
        assert torch.equal(joined(others), expected)
        assert joined(others).data_ptr() != flat.data_ptr()
