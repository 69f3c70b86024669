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
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in trained.items()}
        self._current = [p.detach() for p in trained.values()]  # shares memory with the module
        self._parameters = list(trained.values())

    def decay_now(self) -> float:
        """Return the decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def restore(self, weights: dict[str, Tensor], updates: int) -> None:
        """Put back a saved average."""
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
        self.updates = updates

    def follow_device(self) -> None:
        """Move the average to where the module's weights are now."""
        self._current = [p.detach() for p in self._parameters]
        self.weights = {
            name: tensor.to(p.device)
            for (name, tensor), p in zip(self.weights.items(), self._parameters, strict=True)
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights of the module."""
        torch._foreach_lerp_(list(self.weights.values()), self._current, 1 - self.decay_now())
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights for a while; its own come back bit for bit."""
        kept = [tensor.clone() for tensor in self._current]
        try:
            torch._foreach_copy_(self._current, list(self.weights.values()))
            yield
        finally:
            torch._foreach_copy_(self._current, kept)
