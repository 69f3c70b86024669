"""Batches by edge budget: nothing dropped, budgets held, ranks even, any position resumed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip.errors import InputError
from mlip.training.sampler import EdgeBudgetSampler

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 900)), min_size=3, max_size=60)


def make(sizes, **options) -> EdgeBudgetSampler:
    atoms, edges = np.array(sizes).T
    return EdgeBudgetSampler(atoms, edges, **{"max_edges": 1000, "max_atoms": 60, **options})


def epoch(sampler: EdgeBudgetSampler, number: int, step: int = 0) -> list[list[int]]:
    sampler.start(number, step)
    return list(sampler)


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


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sizes = [(4, 100 + i) for i in range(30)]
    sampler = make(sizes, seed=0)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert first != second
    assert epoch(sampler, 0) == first
    assert epoch(make(sizes, seed=1), 0) != first


def test_batches_are_well_filled() -> None:
    random = np.random.default_rng(0)
    edges = random.integers(50, 1000, 500)
    sampler = EdgeBudgetSampler(np.ones(500), edges, max_edges=2000, seed=0)
    assert sampler.steps(0) <= 1.1 * edges.sum() / 2000
    assert sorted(i for batch in sampler for i in batch) == list(range(500))


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
