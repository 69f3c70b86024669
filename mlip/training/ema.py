"""Exponential moving average of the weights, with a warm-up of the decay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a module's trainable weights: decay_t = min(decay, (1 + t) / (10 + t)).

    Args:
        module: its parameters are averaged; its buffers are not.
        decay: 0 makes the average follow the weights exactly.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    def decay_now(self) -> float:
        """Return the decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the present weights of the module it was made from."""
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, self._current(module), 1 - self.decay_now())
        self.updates += 1

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give the module the averaged weights for a while; its own come back bit for bit."""
        current = self._current(module)
        kept = [tensor.clone() for tensor in current]
        try:
            torch._foreach_copy_(current, list(self.weights.values()))
            yield
        finally:
            torch._foreach_copy_(current, kept)

    def _current(self, module: nn.Module) -> list[Tensor]:
        parameters = dict(module.named_parameters())
        return [parameters[name].detach() for name in self.weights]
