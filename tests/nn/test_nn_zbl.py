"""ZBL in inference: the compiled loop against the formula pair by pair, and who decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii
from torch import Tensor

from mlip.errors import InputError
from mlip.graph import atoms_to_graph
from mlip.models import create_model
from mlip.nn.zbl import ZBLRepulsion
from mlip.ops import backend
from mlip.ops.cpu import screened_pairs, threads
from mlip.potential import Potential

CUTOFF = 3.5
NUMBERS = torch.tensor([1, 14, 14, 29, 55, 118, 0])  # 0 fills up batches; caesium reaches farther


@pytest.fixture(autouse=True)
def _nothing_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_refused", {})
    monkeypatch.setattr(backend, "_uncovered", {})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loops that ran."""
    made: list[str] = []
    right = screened_pairs._run

    def record(name, *arguments):
        made.append(name)
        right(name, *arguments)

    monkeypatch.setattr(screened_pairs, "_run", record)
    return made


def edges(dtype: torch.dtype = torch.float64, count: int = 400) -> tuple[Tensor, Tensor]:
    """Vectors of 0.3 to 4 Å and atoms of edges, in any order."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(len(NUMBERS), (2, count), generator=generator)
    vectors = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(0.3, 4.0, count, dtype=torch.float64)
    lengths = lengths[torch.randperm(count, generator=generator)]
    vectors *= (lengths / vectors.norm(dim=1))[:, None]
    return vectors.to(dtype), index


def energy(z_i: int, z_j: int, r: float) -> float:
    """Half of the energy of a pair."""
    reach = min(covalent_radii[z_i] + covalent_radii[z_j], CUTOFF)
    if r >= reach:
        return 0.0
    x, a = r / reach, 0.8854 * 0.529177210903
    if z_i or z_j:
        a /= z_i**0.23 + z_j**0.23
    terms = ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
    screening = sum(c * math.exp(-d * r / a) for c, d in terms)
    envelope = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    return 0.5 * 14.399645478425668 * z_i * z_j / r * screening * envelope


def test_kernel_equals_the_formula_pair_by_pair():
    vectors, index = edges()
    expected = np.zeros(len(NUMBERS))
    for vector, (i, j) in zip(vectors.numpy(), index.T.tolist(), strict=True):
        expected[j] += energy(int(NUMBERS[i]), int(NUMBERS[j]), float(np.linalg.norm(vector)))
    found = ZBLRepulsion(CUTOFF)._kernel(NUMBERS, vectors, index)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_both_ways_agree(dtype, tolerance):
    vectors, index = edges(dtype)
    weights = torch.randn(len(NUMBERS), generator=torch.Generator().manual_seed(2)).to(dtype)
    by_component = vectors.T.contiguous().T
    truth = vectors.double().requires_grad_(True)
    expected = ZBLRepulsion(CUTOFF)(NUMBERS, truth, index)
    (slopes,) = torch.autograd.grad(expected @ weights.double(), truth)
    for given in (vectors, by_component):
        given = given.detach().requires_grad_(True)
        found = ZBLRepulsion(CUTOFF)._kernel(NUMBERS, given, index)
        (gradient,) = torch.autograd.grad(found @ weights, given)
        assert found.dtype == gradient.dtype == dtype
        for value, right in ((found, expected), (gradient, slopes)):
            assert float((value - right).detach().norm() / right.detach().norm()) < tolerance


def test_gradient_is_that_of_finite_differences():
    vectors, index = edges(count=24)
    kernel = ZBLRepulsion(CUTOFF)._kernel
    vectors.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda d: kernel(NUMBERS, d, index) * 1e-2, [vectors], atol=1e-4
    )


def test_no_edges_and_none_near(runs):
    vectors, index = edges()
    module = ZBLRepulsion(CUTOFF)
    none = module(NUMBERS, vectors[:0], index[:, :0], inference=True)
    assert not runs
    far = (vectors * 20).requires_grad_(True)
    found = module._kernel(NUMBERS, far, index)
    (gradient,) = torch.autograd.grad(found.sum(), far)
    assert none.shape == found.shape == NUMBERS.shape
    for zeros in (none, found, gradient):
        assert not zeros.any()


def test_threads_do_not_change_a_bit(monkeypatch):
    vectors, index = edges()
    found = []
    for serial, n_threads in ((1000, 1), (1, 1), (1, 3)):
        monkeypatch.setattr(screened_pairs, "SERIAL_EDGES", serial)
        monkeypatch.setattr(threads, "available_threads", lambda n=n_threads: n)
        given = vectors.clone().requires_grad_(True)
        energies = ZBLRepulsion(CUTOFF)._kernel(NUMBERS, given, index)
        found.append((energies.detach(), *torch.autograd.grad(energies.sum(), given)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_atoms_and_elements_that_do_not_exist_are_an_error():
    vectors, index = edges()
    kernel = ZBLRepulsion(CUTOFF)._kernel
    part = torch.cat([NUMBERS, NUMBERS])[: len(NUMBERS)]  # there are numbers beyond the last
    for numbers, atoms in (
        (part, index + 1), (part, index - 1), (part + 1, index), (part - 1, index),
    ):  # fmt: skip
        with pytest.raises(InputError, match="does not exist"):
            kernel(numbers, vectors, atoms)


@pytest.mark.refusals
def test_a_wrong_kernel_is_not_used_even_where_no_edge_is_near(monkeypatch, caplog):
    right = screened_pairs._run

    def wrong(name, vectors, index, *rest):
        right(name, vectors * 1.01, index, *rest)

    monkeypatch.setattr(screened_pairs, "_run", wrong)
    vectors, index = edges()
    far = vectors * 4 / vectors.norm(dim=1, keepdim=True)
    ZBLRepulsion(CUTOFF)(NUMBERS, far, index, inference=True)
    (record,) = caplog.records
    assert "ZBL repulsion, float64: plain PyTorch instead" in record.getMessage()


def test_graphs_made_in_inference_mode_are_compared_too():
    with torch.inference_mode():
        vectors, index = edges()
        found = ZBLRepulsion(CUTOFF)(NUMBERS.clone(), vectors, index, inference=True)
    assert list(backend._refused.values()) == [None]
    assert found.any()


def test_a_potential_takes_it_where_nothing_is_differentiated_twice(runs):
    model = create_model("facet", {"elements": (14,), "cutoff": CUTOFF, "hidden": ((2, 2),)})
    potential = Potential(model, zbl=True, scale=0.0).to_dtype(torch.float64)
    graph = atoms_to_graph(Atoms("Si2", [[0, 0, 0], [0, 0.3, 1.2]]), CUTOFF)
    training = potential(graph, create_graph=True)
    assert not runs
    found = potential(graph)
    assert backend.decisions()["ZBL repulsion, float64"].startswith("CPU kernel, agrees")
    torch.testing.assert_close(found.forces, training.forces, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.energy, training.energy, rtol=1e-12, atol=0)
    runs.clear()
    with torch.no_grad():
        again = potential(graph, forces=False, stress=False).energy
    assert runs == ["screened_pairs"]
    assert torch.equal(again, found.energy)
