"""The average of the weights: closed form, warm-up, and giving the weights back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlip.training.ema import WeightAverage


def set_weight(module: nn.Linear, value: float) -> None:
    with torch.no_grad():
        module.weight.fill_(value)


def test_average_follows_the_recurrence_with_warm_up() -> None:
    module = nn.Linear(2, 1, bias=False).double()
    set_weight(module, 1.0)
    average, expected = WeightAverage(module, 0.5), 1.0
    for step, value in enumerate((3.0, -2.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 0.0)):
        set_weight(module, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(average.weights["weight"][0, 0]) == pytest.approx(expected, rel=1e-14)


def test_no_decay_follows_exactly() -> None:
    module = nn.Linear(2, 1)
    average = WeightAverage(module, 0.0)
    set_weight(module, 0.1)
    average.update()
    assert torch.equal(average.weights["weight"], module.weight)


def test_weights_come_back_even_after_an_error() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, 0.9)
    set_weight(module, 0.3)
    before = {k: v.clone() for k, v in module.state_dict().items()}

    def fail_while_applied() -> None:
        with average.applied():
            assert not torch.equal(module.weight, before["weight"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_while_applied()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
