"""Pairs of opposite edges: found as by comparing all, and gradients as of edges one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

pytest.importorskip("numba")

from mlip.graph import atoms_to_graph, batch_graphs, edge_vectors
from mlip.ops import ConvolutionSignature, convolution, neighborhood
from mlip.ops.cpu import threads
from mlip.ops.cpu.library import edge_list, encode
from mlip.ops.cpu.pairs import PairList, covers, find_pairs, pair_gradients
from mlip.ops.pairs import Pairs, of_all_edges, opposite_edges
from mlip.so3 import spherical_harmonics

SIGNATURES = {
    "scalars in": ConvolutionSignature((16,), 2, (0, 1, 2), True),
    "all parities": ConvolutionSignature((16, 32, 16), 2, (0, 1, 2), False),
    "scalars out": ConvolutionSignature((16, 16, 16), 2, (0,), True),
    "degree left out": ConvolutionSignature((16, 0, 32), 3, (1, 3), True),
    "degree 4": ConvolutionSignature((16, 0, 16, 0, 16), 4, (0, 3, 4), True),
    "many channels": ConvolutionSignature((128, 64), 1, (0, 1), True),
}


def rattled(*repeats: int) -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat(repeats)
    atoms.rattle(0.1, seed=1)
    return atoms


GRAPHS = {
    "crystal": lambda: atoms_to_graph(rattled(2, 2, 2), 4.0),
    "one atom with its images": lambda: atoms_to_graph(bulk("Cu"), 6.0),
    "cells smaller than the cutoff": lambda: atoms_to_graph(rattled(1, 1, 1), 7.0),
    "molecule": lambda: atoms_to_graph(molecule("C6H6"), 5.0),
    "batch, an atom alone": lambda: batch_graphs(
        [atoms_to_graph(a, 4.0) for a in (bulk("Si"), Atoms("H"), rattled(1, 1, 2))]
    ),
}


def found_in(graph, order: Tensor | None = None, shift: Tensor | None = None) -> PairList | None:
    index, shift = graph.edge_index, graph.edge_shift if shift is None else shift
    if order is not None:
        index, shift = index[:, order], shift[order]
    neighbors = neighborhood(index, len(graph.atomic_numbers))
    return find_pairs(edge_list(neighbors.rowptr, neighbors.source), shift)


@pytest.mark.parametrize("name", GRAPHS)
def test_each_edge_is_in_one_pair_with_its_opposite(name):
    graph = GRAPHS[name]()
    pairs = found_in(graph)
    rows = torch.cat([graph.edge_index, graph.edge_shift.T]).T.tolist()
    assert sorted([*pairs.edge, *pairs.other]) == list(range(len(rows)))
    for a, b in zip(pairs.edge, pairs.other, strict=True):
        j, i, *shift = rows[a]
        assert rows[b] == [i, j, *(-x for x in shift)]
        assert i <= j
    assert pairs.source.tolist() == [rows[a][0] for a in pairs.edge]
    for i in range(pairs.n_nodes):
        assert all(rows[a][1] == i for a in pairs.edge[pairs.rowptr[i] : pairs.rowptr[i + 1]])


@pytest.mark.parametrize("name", GRAPHS)
def test_edges_without_opposite_or_order_are_no_pairs(name):
    graph = GRAPHS[name]()
    n_edges = graph.edge_index.shape[1]
    every = torch.arange(n_edges)
    assert found_in(graph, every) is not None
    for missing in range(n_edges):
        assert found_in(graph, every[every != missing]) is None
    shift = graph.edge_shift.clone()
    shift[n_edges // 2, 1] += 1
    assert found_in(graph, shift=shift) is None
    if pairs_of_atoms := len(graph.atomic_numbers) > 1:
        last = graph.edge_index[1] == graph.edge_index[1, -1]
        every[last] = every[last].flip(0)
    assert (found_in(graph, every) is None) == pairs_of_atoms


def test_no_edge_is_the_opposite_of_two():
    a, b, c = np.eye(3, dtype=np.int64)
    edges = edge_list(torch.tensor([0, 2, 6]), torch.tensor([1, 1, 0, 0, 0, 0]))
    assert find_pairs(edges, torch.from_numpy(np.array([a, b, -b, -a, c, -a]))) is None


def test_nearest_neighbors_alone_are_no_pairs():
    assert found_in(atoms_to_graph(rattled(2, 2, 2), 4.0, max_neighbors=7)) is None


class Case:
    """Random features, kernel and gradient; harmonics and radial functions of a graph."""

    def __init__(self, signature: ConvolutionSignature, graph, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.signature, n = signature, len(graph.atomic_numbers)
        self.neighbors = neighborhood(graph.edge_index, n)
        self.pairs = found_in(graph)
        vectors = edge_vectors(graph)[torch.from_numpy(self.pairs.edge)]
        distance = vectors.norm(dim=1, keepdim=True)
        self.harmonics = spherical_harmonics(signature.lmax_edge, vectors).to(dtype)
        self.basis = torch.sin(distance * torch.arange(1, 6)).to(dtype)
        self.kernel = randn(5, signature.n_weights)
        self.features = [randn(n, 2 * i + 1, c) for i, c in enumerate(signature.channels)]
        self.gradient = [randn(n, 2 * i + 1, c) for i, c in enumerate(signature.out_channels)]

    def definition(self, dtype: torch.dtype) -> list[Tensor]:
        given = (self.harmonics, self.basis, *self.features)
        leaves = [each.to(dtype).requires_grad_(True) for each in given]
        harmonics, basis = self.pairs.both(leaves[0], leaves[1])
        weights = basis @ self.kernel.to(dtype)
        sums = convolution(self.signature, leaves[2:], harmonics, weights, self.neighbors)
        total = sum((a * b.to(dtype)).sum() for a, b in zip(sums, self.gradient, strict=True))
        of_harmonics, of_basis, *of_x = torch.autograd.grad(total, leaves, materialize_grads=True)
        return [of_harmonics, of_basis, flat(of_x)]

    def kernels(self, wanted: bool = True) -> list[Tensor]:
        x = flat(self.features)
        onto = torch.ones_like(x) if wanted else None
        found = pair_gradients(
            x, self.harmonics, self.basis, self.kernel, flat(self.gradient), self.pairs,
            encode(self.signature), onto,
        )  # fmt: skip
        return [*found] if onto is None else [*found, onto - 1]


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("graph", ["crystal", "one atom with its images", "batch, an atom alone"])
def test_gradients_are_those_of_the_definition(graph, name, dtype):
    case = Case(SIGNATURES[name], GRAPHS[graph](), dtype)
    truth, plain = case.definition(torch.float64), case.definition(dtype)
    largest = max(100.0, *(float(exact.abs().max()) for exact in truth))  # all may vanish
    rounding = 10 * torch.finfo(dtype).eps * largest
    for found in (case.kernels(), case.kernels(wanted=False)):
        for a, b, exact in zip(found, plain, truth, strict=False):
            assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + rounding


def test_all_edges_have_the_functions_of_their_vectors():
    graph = GRAPHS["cells smaller than the cutoff"]()
    case = Case(ConvolutionSignature((16,), 3, (0,), True), graph, torch.float64)
    exact = spherical_harmonics(3, edge_vectors(graph))
    for give in (case.pairs.both, case.pairs.both_detached):
        harmonics, basis = give(case.harmonics, case.basis)
        torch.testing.assert_close(harmonics, exact, rtol=0, atol=1e-12)
        for rows in (case.pairs.edge, case.pairs.other):
            assert torch.equal(basis[torch.from_numpy(rows)], case.basis)


def test_gradients_do_not_depend_on_threads_or_on_the_run(monkeypatch):
    """Large enough for several chunks; compared bit for bit, and with the definition."""
    graph = atoms_to_graph(rattled(5, 5, 5), 4.5)
    case = Case(SIGNATURES["all parities"], graph, torch.float32)
    assert len(case.pairs.chunk_bounds) > 3
    results = []
    for n in (1, 2, 3, 3):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        results.append(case.kernels())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for a, exact in zip(results[0], case.definition(torch.float64), strict=True):
        assert (a - exact).norm() < 1e-5 * exact.norm()


def test_degrees_that_are_not_written_out_are_not_covered():
    assert covers(SIGNATURES["degree 4"].paths)
    assert not covers(ConvolutionSignature((16,) * 6, 5, (0,), True).paths)
    assert not covers(ConvolutionSignature((0, 16), 0, (0,), True).paths)


def test_rows_of_pairs_go_to_both_edges_and_derivatives_come_from_both():
    graph = GRAPHS["cells smaller than the cutoff"]()
    index = graph.edge_index
    pairs = opposite_edges(index, graph.edge_shift, len(graph.atomic_numbers))
    rows = torch.cat([index, graph.edge_shift.T]).T.tolist()
    for e in range(len(rows)):
        a, b = pairs.edge[pairs.place[e]], pairs.other[pairs.place[e]]
        assert e in (a, b)
        assert rows[b] == [rows[a][1], rows[a][0], *(-x for x in rows[a][2:])]
    generator = torch.Generator().manual_seed(0)
    few = Pairs(torch.tensor([0, 4, 3]), torch.tensor([2, 1, 5]), torch.tensor([0, 1, 0, 2, 1, 2]))
    values = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_(True)
    assert torch.equal(of_all_edges(values, few), values[[0, 1, 0, 2, 1, 2]])

    def cubed(x: Tensor) -> Tensor:
        return of_all_edges(x**3, few)

    assert torch.autograd.gradcheck(cubed, values)
    assert torch.autograd.gradgradcheck(cubed, values)


def test_no_pairs_are_looked_for_where_nothing_compiled_may_run(monkeypatch):
    graph = GRAPHS["crystal"]()
    given = (graph.edge_index, graph.edge_shift, len(graph.atomic_numbers))
    assert opposite_edges(*given) is not None
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    assert opposite_edges(*given) is None
    monkeypatch.delenv("MLIP_BACKEND")
    monkeypatch.setattr("mlip.ops.backend.numba_missing", lambda: "it is not there")
    assert opposite_edges(*given) is None
