"""The key of prepared weights follows every supported way to change weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mlip.nn.so3_layers import versions
from mlip.training.ema import WeightAverage


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(1.5)


def loaded(module: nn.Module) -> None:
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})


def assigned(module: nn.Module) -> None:
    changed = {name: value + 1 for name, value in module.state_dict().items()}
    module.load_state_dict(changed, assign=True)


def moved(module: nn.Module) -> None:
    """As ``nn.Module.to`` does for another device or precision."""
    module.weight.data = module.weight.data + 1


def step(**options: bool) -> Callable[[nn.Module], None]:
    def run(module: nn.Module) -> None:
        module(torch.ones(1, 3)).sum().backward()
        torch.optim.AdamW(module.parameters(), **options).step()

    return run


WAYS = {
    "in place": in_place,
    "loaded": loaded,
    "assigned": assigned,
    "moved": moved,
    "stepped": step(),
    "stepped in one": step(foreach=True),
    "stepped by a fused optimiser": step(fused=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_change_is_noticed(way):
    module = nn.Linear(3, 2)
    before, weight = versions(module.parameters()), module.weight.detach().clone()
    assert versions(module.parameters()) == before
    WAYS[way](module)
    assert not torch.equal(module.weight, weight)
    assert versions(module.parameters()) != before


def test_an_average_is_noticed_when_it_comes_and_when_it_goes():
    module = nn.Linear(3, 2)
    average = WeightAverage(module, 0.5)
    average.weights["weight"] += 1
    before = versions(module.parameters())
    with average.applied():
        within = versions(module.parameters())
    assert len({before, within, versions(module.parameters())}) == 3
