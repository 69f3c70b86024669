"""Prepared weights follow every supported way to change weights, and are kept otherwise."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlip.nn.prepared import Prepared, parameters_of
from mlip.training.ema import WeightAverage


class Doubled(nn.Linear):
    """A linear layer that prepares twice its weights."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.made = 0
        self.prepared: Prepared[Tensor] = Prepared()

    def forward(self, x: Tensor) -> Tensor:
        self.prepared.clear()
        return super().forward(x)

    def doubled(self) -> Tensor:
        return self.prepared.get(self.parameters(), self._double)

    def _double(self) -> Tensor:
        self.made += 1
        return 2 * self.weight


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


def moved_often(module: nn.Module) -> None:
    """Memory that is let go may be given out again, at the same address."""
    first = module.weight.data_ptr()
    for _ in range(100):
        moved(module)
        if module.weight.data_ptr() == first:
            break


def converted(module: nn.Module) -> None:
    module.half().float()


def step(**options: bool) -> Callable[[nn.Module], None]:
    def run(module: nn.Module) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), **options)
        module(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def step_with_a_given_gradient(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), fused=True).step()


def through_data(module: nn.Module) -> None:
    module.weight.data.copy_(module.weight.detach() + 1)


def last_row_through_an_array(module: nn.Module) -> None:
    module.weight.detach().numpy()[-1] += 1


def trained_and_frozen_again(module: nn.Module) -> None:
    module.requires_grad_(True)
    step(fused=True)(module)
    module.requires_grad_(False)


CHANGES = {
    "in place": in_place,
    "loaded": loaded,
    "assigned": assigned,
    "moved": moved,
    "moved often": moved_often,
    "converted": converted,
    "through data": through_data,
    "last row through an array": last_row_through_an_array,
    "trained and frozen again": trained_and_frozen_again,
    "stepped with a given gradient": step_with_a_given_gradient,
}
STEPS = {
    "stepped": step(),
    "stepped in one": step(foreach=True),
    "stepped by a fused optimiser": step(fused=True),
}
WAYS = [(way, False) for way in CHANGES] + [(way, True) for way in CHANGES | STEPS]


@pytest.mark.parametrize(("way", "trainable"), WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_a_change_is_noticed(way, trainable, training):
    module = Doubled().train(training).requires_grad_(trainable)
    before = module.doubled().clone()
    assert module.doubled() is module.doubled()
    assert module.made == 1
    (CHANGES | STEPS)[way](module)
    assert not torch.equal(module.weight, before / 2)
    for _ in range(2):
        assert torch.equal(module.doubled(), 2 * module.weight)


def test_a_step_is_noticed_after_a_look_between_forward_pass_and_step():
    module = Doubled()
    loss = module(torch.ones(1, 64)).sum()
    module.doubled()
    loss.backward()
    module.requires_grad_(False).doubled()  # a gradient is left: an optimiser would take it
    torch.optim.AdamW(module.parameters(), fused=True).step()
    assert torch.equal(module.doubled(), 2 * module.weight)


def test_an_average_is_noticed_when_it_comes_and_when_it_goes():
    module = Doubled()
    average = WeightAverage(module, 0.5)
    average.weights["weight"] += 1
    before = module.doubled().clone()
    with average.applied():
        torch.testing.assert_close(module.doubled(), before + 2)
    torch.testing.assert_close(module.doubled(), before)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3, 2).T, torch.ones(3, dtype=torch.bfloat16), torch.ones(()), torch.ones(0, 2)],
)
def test_frozen_weights_of_any_kind_can_be_looked_at(weight):
    prepared: Prepared[Tensor] = Prepared()
    made = [prepared.get([weight], lambda: weight.double().sum()) for _ in range(2)]
    assert made[0] is made[1]
    weight += 1
    assert torch.equal(prepared.get([weight], lambda: weight.double().sum()), 2 * made[0])


def test_what_is_prepared_takes_part_in_no_graph_and_no_inference_mode():
    module = Doubled()
    with torch.inference_mode():
        made = module.doubled()
    assert not made.requires_grad
    assert not made.is_inference()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_prepare_their_own(way):
    module = Doubled()
    module.doubled()
    other = way(module)
    assert other.prepared._made is None
    assert not other.prepared._memory
    in_place(other)
    assert torch.equal(other.doubled(), 2 * other.weight)
    assert (module.made, other.made) == (1, 2)


def test_nothing_is_hooked_into_optimisers_by_an_import():
    code = (
        "import torch.optim.optimizer as o\n"
        "import mlip.models.equiformer_v3, mlip.models.facet_inference\n"
        "print(len(o._global_optimizer_post_hooks), len(o._global_optimizer_pre_hooks))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]


def test_parameters_are_those_of_the_module_now():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ParameterList([torch.ones(2)]))
    module.register_parameter("absent", None)
    assert [id(w) for w in parameters_of(module)] == [id(w) for w in module.parameters()]
    state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    assert [id(w) for w in parameters_of(module)] == [id(w) for w in module.parameters()]
