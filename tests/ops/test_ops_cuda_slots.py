"""Edges by atom for sums without atomics: against loops, and what is kept is not mistaken."""

from __future__ import annotations

import pytest
import torch

from mlip.ops.cuda import slots as module
from mlip.ops.cuda.slots import slots


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_known", type(module._known)())


def by_loops(index: torch.Tensor, n: int) -> tuple[list[int], list[int]]:
    flat = index.flatten().tolist()
    order = [place for atom in range(n) for place, own in enumerate(flat) if own == atom]
    return order, [sum(own < atom for own in flat) for atom in range(n + 1)]


@pytest.mark.parametrize("shape", [(2, 40), (17,), (1, 0)])
def test_order_equals_loops(shape):
    index = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        order, first = slots(index, 7)
        assert (order.tolist(), first.tolist()) == by_loops(index, 7)


def test_what_is_kept_is_not_mistaken_for_another_index():
    index = torch.tensor([2, 0, 1, 0])
    assert slots(index, 3) is slots(index, 3)
    assert slots(index[1:], 3)[0].tolist() == [0, 2, 1]
    assert len(slots(index, 4)[1]) == 5
    index[0] = 0  # in place
    assert slots(index, 3)[0].tolist() == [0, 1, 3, 2]
    for _ in range(50):  # memory is used again for other numbers
        other = torch.randint(0, 3, (4,))
        assert slots(other, 3)[0].tolist() == by_loops(other, 3)[0]
    assert len(module._known) <= module.MOST
    with torch.inference_mode():
        assert slots(torch.tensor([1, 0]), 2)[0].tolist() == [1, 0]
