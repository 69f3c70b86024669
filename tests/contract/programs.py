"""Programs may rely on it: files, precision, repeated calls, nothing changed behind their back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip.errors import UnknownElementError
from mlip.graph import AtomicGraph, atoms_to_graph, batch_graphs, edge_vectors
from mlip.potential import Potential
from tests.contract.base import Contract, cluster, crystal
from tests.finite_differences import close, evaluate


def global_state() -> tuple[Any, ...]:
    """Everything a model must leave alone."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),  # noqa: NPY002
        tuple(np.geterr().items()),
    )


class Programs(Contract):
    """What a potential does to files, inputs and the process."""

    def test_save_and_load_give_the_same_bits(self, potential: Potential, tmp_path: Path) -> None:
        potential.save(tmp_path / "model.safetensors")
        loaded = Potential.load(tmp_path / "model.safetensors", dtype="float64")
        assert loaded.model_hash() == potential.model_hash()
        assert loaded.cutoff == potential.cutoff
        for a, b in zip(evaluate(loaded, crystal()), evaluate(potential, crystal()), strict=True):
            close(a, b, 0.0)

    def test_single_precision_is_close(self, potential: Potential) -> None:
        single = copy.deepcopy(potential).to_dtype(torch.float32)
        for atoms in (crystal(), cluster()):
            a, b = evaluate(single, atoms), evaluate(potential, atoms)
            close(a.energies, b.energies, 1e-4)
            close(a.forces, b.forces, 1e-3)
            close(a.stress, b.stress, 1e-4)
            assert a.forces.dtype == np.float64

    def test_same_input_same_bits(self, potential: Potential) -> None:
        first = evaluate(potential, [crystal(), cluster()])
        evaluate(potential, bulk("Cu", a=3.6))
        again = evaluate(potential, [crystal(), cluster()])
        for a, b in zip(first, again, strict=True):
            for x, y in zip(a, b, strict=True):
                assert np.array_equal(x, y, equal_nan=True)

    def test_global_state_is_left_alone(self, potential: Potential) -> None:
        before = global_state()
        try:
            evaluate(potential, crystal())
            with pytest.raises(UnknownElementError):
                evaluate(potential, Atoms("O"))
            after = global_state()
        finally:
            torch.set_default_dtype(before[0])
            torch.set_grad_enabled(before[1])
        assert after == before

    def test_the_graph_is_left_alone(self, potential: Potential) -> None:
        for graph in (
            atoms_to_graph(crystal(), potential.cutoff),
            batch_graphs([atoms_to_graph(cluster(), potential.cutoff)] * 2),
        ):
            before = graph.clone()
            for create_graph in (False, True):
                potential(graph, create_graph=create_graph)
            assert set(graph.keys()) == set(before.keys())
            for key in tensors(graph):
                torch.testing.assert_close(graph[key], before[key], rtol=0, atol=0, equal_nan=True)
                assert graph[key].requires_grad == before[key].requires_grad

    def test_derivatives_on_request(self, potential: Potential) -> None:
        """Energy alone equals the full answer; what was not asked for is None."""
        graph = atoms_to_graph(crystal(), potential.cutoff)
        full = potential(graph)
        with torch.no_grad():
            energy = potential(graph, forces=False, stress=False)
        assert (energy.forces, energy.stress) == (None, None)
        assert torch.equal(energy.energy, full.energy)
        assert torch.equal(potential(graph, stress=False).forces, full.forces)
        assert torch.equal(potential(graph, forces=False).stress, full.stress)
        assert not full.forces.requires_grad
        assert edge_vectors(graph).dtype == full.energy.dtype == torch.float64


def tensors(graph: AtomicGraph) -> list[str]:
    """Names of the tensor fields."""
    return [key for key in graph.keys() if isinstance(graph[key], torch.Tensor)]  # noqa: SIM118
