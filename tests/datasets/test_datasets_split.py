"""Splits: complete, disjoint, repeatable, and free of leaks between groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip.datasets.split import split_indices
from mlip.errors import InputError


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_parts_are_disjoint_complete_and_repeatable(n: int, fraction: float, seed: int) -> None:
    large, small = split_indices(n, fraction, seed)
    assert sorted([*large, *small]) == list(range(n))
    assert len(small) == min(max(1, round(fraction * n)), n - 1)
    np.testing.assert_array_equal(small, split_indices(n, fraction, seed)[1])


def test_another_seed_draws_another_part() -> None:
    assert not np.array_equal(split_indices(100, 0.2, 0)[1], split_indices(100, 0.2, 1)[1])


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.floats(0.05, 0.95))
def test_no_group_is_in_both_parts(groups: list[int], fraction: float) -> None:
    if len(set(groups)) < 2:
        with pytest.raises(InputError, match="one group"):
            split_indices(len(groups), fraction, 0, groups)
        return
    large, small = split_indices(len(groups), fraction, 0, groups)
    assert sorted([*large, *small]) == list(range(len(groups)))
    assert not {groups[i] for i in large} & {groups[i] for i in small}
    assert len(small) > 0
    assert len(large) > 0


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.5), (10, 0.0), (10, 1.0)])
def test_nothing_to_split_is_an_error(n: int, fraction: float) -> None:
    with pytest.raises(InputError, match="cannot split"):
        split_indices(n, fraction)
