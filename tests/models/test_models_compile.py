"""``torch.compile`` of whole models: one graph, kernels as one operator, the same numbers."""

from __future__ import annotations

import pytest
import torch
from ase.build import bulk

from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.potential import Potential

MODELS = {
    "facet": {"cutoff": 4.2, "hidden": ((16, 8),), "embedding": 8, "outputs": 8},
}


def make_potential(name: str) -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, {"elements": (29,), **MODELS[name]})
    return Potential(model).to_dtype(torch.float64).eval()


def copper(repeat: int):
    atoms = bulk("Cu", cubic=True).repeat((repeat, 1, 1))
    atoms.rattle(0.1, seed=1)
    return atoms


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_keep_energies_and_forces(name, monkeypatch):
    """One graph without breaks on the back end of a new process, for two sizes of structures."""
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    plain = make_potential(name)
    graphs = [atoms_to_graph(copper(repeat), plain.cutoff) for repeat in (1, 2)]
    expected = [plain(graph) for graph in graphs]
    monkeypatch.setenv("MLIP_BACKEND", "auto")
    potential = make_potential(name)
    seen: list[str] = []

    def compiler(traced, inputs):  # noqa: ARG001
        seen.extend(str(node.target) for node in traced.graph.nodes)
        return traced.forward

    potential.model = torch.compile(potential.model, backend=compiler, fullgraph=True)
    for graph, truth in zip(graphs, expected, strict=True):
        found = potential(graph)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert sum("mlip.convolution" in target for target in seen) >= 2
    torch.compiler.reset()
