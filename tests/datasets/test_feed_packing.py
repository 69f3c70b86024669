"""Batches under budgets: nothing dropped, well filled, ranks even, any position resumed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.datasets.feed import packing as packing_module
from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.errors import InputError

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 900)), min_size=3, max_size=60)


def make(sizes: Any, **options: Any) -> EdgeBudgetSampler:
    atoms, edges = np.array(sizes).T
    return EdgeBudgetSampler(atoms, edges, **{"max_edges": 1000, "max_atoms": 60, **options})


def epoch(sampler: EdgeBudgetSampler, number: int, step: int = 0) -> list[list[int]]:
    sampler.start(number, step)
    return list(sampler)


def log_normal(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes as in mixed data sets: 84 atoms on average, the edges with a density of their own."""
    random = np.random.default_rng(0)
    atoms = np.clip(np.rint(np.exp(random.normal(np.log(70), 0.6, count))), 1, 700)
    return atoms.astype(np.uint32), (atoms * random.uniform(30, 70, count)).astype(np.uint32)


def sums(sampler: EdgeBudgetSampler, sizes: np.ndarray, number: int = 0) -> np.ndarray:
    found = sampler.batches(number)
    return np.add.reduceat(sizes[found.order].astype(np.int64), found.offsets[:-1])


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 100), st.integers(0, 5), st.integers(1, 3))
def test_every_structure_once_within_budget_on_even_ranks(sizes, seed, number, world) -> None:
    ranks = [make(sizes, seed=seed, rank=r, world_size=world) for r in range(world)]
    batches = [epoch(sampler, number) for sampler in ranks]
    seen = sorted(i for rank in batches for b in rank for i in b)
    assert sorted(set(seen)) == list(range(len(sizes)))
    repeated = len(seen) - len(sizes)
    assert repeated == 0 or (repeated < world and all(len(b) == 1 for r in batches for b in r))
    assert {len(rank) for rank in batches} == {ranks[0].steps(number)}
    for rank in batches:
        for batch in rank:
            assert batch
            assert sum(sizes[i][1] for i in batch) <= 1000
            assert sum(sizes[i][0] for i in batch) <= 60


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(0, 100), st.integers(0, 50), st.integers(1, 2))
def test_any_position_continues_the_epoch(sizes, seed, step, world) -> None:
    for rank in range(world):
        whole = epoch(make(sizes, seed=seed, rank=rank, world_size=world), 3)
        late = make(sizes, seed=seed, rank=rank, world_size=world)
        assert epoch(late, 3, step) == whole[step:]


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 100), st.integers(1, 4))
def test_without_evening_every_structure_is_seen_exactly_once(sizes, seed, world) -> None:
    for chosen in (None, seed):
        ranks = [
            epoch(make(sizes, seed=chosen, rank=r, world_size=world, even=False), 1)
            for r in range(world)
        ]
        assert sorted(i for rank in ranks for b in rank for i in b) == list(range(len(sizes)))


def test_compiled_and_interpreted_packing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, edges = log_normal(3000)
    for options in ({"world_size": 4}, {"weights": np.linspace(0, 3, 3000)}):
        found = []
        for worth in (1, 10**9):
            monkeypatch.setattr(packing_module, "_WORTH_COMPILING", worth)
            sampler = EdgeBudgetSampler(
                atoms, edges, max_edges=36_000, max_atoms=None, seed=5,
                **{"world_size": 1, **options},
            )  # fmt: skip
            found.append(list(sampler.batches(2)))
        assert found[0] == found[1]


def test_ranks_continue_each_at_its_own_batches() -> None:
    sizes = [(1, 400)] * 90
    for rank in range(3):
        sampler = make(sizes, seed=1, rank=rank, world_size=3)
        everything = list(sampler.batches(0))
        assert len(everything) == 45
        assert epoch(sampler, 0, 4) == everything[12 + rank :: 3]


def test_batches_left_at_the_end_make_steps_of_their_own() -> None:
    for count in range(9_900, 10_100, 25):
        atoms, edges = log_normal(count)
        edges = np.minimum(edges, 35_000)
        sampler = EdgeBudgetSampler(atoms, edges, max_edges=35_000, seed=0, world_size=8)
        cost = sums(sampler, edges).reshape(-1, 8)
        assert (cost.max(axis=1) / cost.mean(axis=1)).max() <= 1.1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sizes = [(4, 100 + i) for i in range(30)]
    sampler = make(sizes, seed=0)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert epoch(sampler, 0) == first
    assert epoch(make(sizes, seed=1), 0) != first


@pytest.mark.parametrize("binding", ["atoms", "edges"])
def test_log_normal_sizes_fill_the_budget_and_load_ranks_alike(binding: str) -> None:
    atoms, edges = log_normal(200_000)
    budgets = {"atoms": (700, 10**7), "edges": (10**6, 35_000)}[binding]
    edges = np.minimum(edges, budgets[1]).astype(np.uint32)
    sampler = EdgeBudgetSampler(
        atoms, edges, max_atoms=budgets[0], max_edges=budgets[1], seed=0, world_size=8
    )
    used = sums(sampler, atoms) / 700 if binding == "atoms" else sums(sampler, edges) / 35_000
    assert used.max() <= 1
    assert used.mean() >= 0.99
    cost = sums(sampler, edges).reshape(-1, 8)
    unevenness = cost.max(axis=1) / cost.mean(axis=1)
    assert unevenness.mean() <= 1.001
    assert unevenness.max() <= 1.05
    if binding == "atoms":
        loads = sums(sampler, atoms).reshape(-1, 8)
        assert (loads.max(axis=1) / loads.mean(axis=1)).mean() <= 1.01


def test_a_million_structures_take_little_memory() -> None:
    atoms, edges = log_normal(1_000_000)
    sampler = EdgeBudgetSampler(atoms, edges, max_atoms=700, max_edges=50_000, seed=0, world_size=8)
    assert sampler.n_atoms is atoms
    assert sampler.n_edges is edges
    found = sampler.batches(1)
    checksums = 4
    index = atoms.nbytes + edges.nbytes + found.order.nbytes + found.offsets.nbytes
    assert index / 1_000_000 + checksums <= 17  # 16, and one offset a batch
    assert np.array_equal(np.sort(found.order), np.arange(1_000_000))


def test_weights_say_how_often_structures_appear() -> None:
    weights = np.array([0.0, 0.25, 1.0, 2.5, 3.0] * 40)
    sampler = make([(1, 10)] * 200, seed=3, weights=weights, world_size=2)
    counts = np.zeros(200)
    for number in range(200):
        found = np.bincount(sampler.batches(number).order, minlength=200)
        assert (np.floor(weights) <= found).all()
        assert (found <= np.ceil(weights)).all()
        counts += found
    assert np.abs(counts.reshape(40, 5).mean(axis=0) / 200 - weights[:5]).max() < 0.02
    again = make([(1, 10)] * 200, seed=3, weights=weights, world_size=2)
    assert list(again.batches(7)) == list(sampler.batches(7))


def test_rarely_drawn_structures_still_feed_every_process() -> None:
    sampler = make([(1, 10)] * 3, seed=0, weights=[0.4, 0.8, 0.8], world_size=2)
    for number in range(50):
        assert sampler.steps(number) >= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1.0, 1.0]}, "weights need a seed"),
        ({"weights": [1.0], "seed": 0}, r"weights of shape \(1,\), expected \(2,\)"),
        ({"weights": [1.0, -1.0], "seed": 0}, "finite and not negative"),
        ({"weights": [1.0, np.nan], "seed": 0}, "finite and not negative"),
        ({"weights": [0.1, 0.2], "seed": 0}, "add up to 0.3 structures an epoch"),
    ],
)
def test_bad_weights_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make([(1, 1), (1, 1)], **options)


def test_validation_keeps_order_of_a_single_batch() -> None:
    assert epoch(make([(1, 1)] * 5), 0) == [[0, 1, 2, 3, 4]]
    uneven = [epoch(make([(1, 1)] * 5, rank=r, world_size=2, even=False), 0) for r in range(2)]
    assert uneven == [[[0, 1, 2, 3, 4]], []]


def test_too_large_structure_and_too_many_processes_are_named() -> None:
    with pytest.raises(InputError, match=r"structure 1 has 1500 edges.*batch\.max_edges = 1000"):
        make([(1, 10), (2, 1500)])
    with pytest.raises(InputError, match=r"structure 0 has 61 atoms.*batch\.max_atoms = 60"):
        make([(61, 10), (2, 15)])
    with pytest.raises(InputError, match="2 training structures cannot feed 3 processes"):
        make([(1, 1), (1, 1)], world_size=3)
    with pytest.raises(InputError, match="sizes between 0 and"):
        EdgeBudgetSampler([-1], [1], max_edges=5)
    with pytest.raises(InputError, match="no structures"):
        EdgeBudgetSampler([], [], max_edges=5)
