"""What is made of weights for inference, kept while the weights are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

T = TypeVar("T")


class Prepared(Generic[T]):
    """What was made of weights, made anew when a weight was replaced or changed.

    Addresses and versions tell of every change but one: fused optimisers change weights and leave
    their versions. A weight that an optimiser may step, having or wanting a gradient, is therefore
    compared with a copy. For one that was frozen, trained and is frozen again, the owner calls
    `clear` wherever it computes what may be differentiated by its weights.

    Writes through ``weight.data`` or an array that shares its memory leave versions, too. Of a
    frozen weight on the CPU a few entries are compared; a write that spares them, or to another
    device, is not noticed. Under ``torch.no_grad()``, ``weight.copy_(…)`` always is.

    Copies of the owner, and what is pickled, begin empty.
    """

    def __init__(self) -> None:
        self._made: T | None = None
        self._state: list[tuple[int, int, bool]] = []
        self._copies: list[Tensor | None] = []
        self._memory: list[Tensor] = []  # of the weights: while it is held, addresses differ
        self._entries: list[NDArray[Any]] = []  # a few of each frozen weight, in its own memory
        self._seen: list[list[float]] = []  # what they were

    def __reduce__(self) -> tuple[type[Prepared[T]], tuple[()]]:
        return type(self), ()

    def get(self, weights: Iterable[Tensor], make: Callable[[], T]) -> T:
        """Give what ``make`` returns, called without autograd if any of the weights has changed.

        Args:
            weights: all that ``make`` reads, always in the same order.
            make: reads the weights.
        """
        present = list(weights)
        state = [(w.data_ptr(), w._version, _may_be_stepped(w)) for w in present]
        if self._made is None or state != self._state or not self._equal(present):
            with torch.inference_mode(False), torch.no_grad():
                self._made = make()
                self._copies = [w.clone() if _may_be_stepped(w) else None for w in present]
            self._state, self._memory = state, [w.detach() for w in present]
            self._entries = [_few(w) for w in present if not _may_be_stepped(w)]
            self._seen = [entries.tolist() for entries in self._entries]
        return self._made

    def clear(self) -> None:
        """Forget what was made."""
        self._made = None

    def _equal(self, weights: list[Tensor]) -> bool:
        """Whether weights that have a copy are equal to it, and a few entries of others as seen."""
        pairs = zip(self._copies, weights, strict=True)
        return [entries.tolist() for entries in self._entries] == self._seen and all(
            copy is None or torch.equal(copy, weight) for copy, weight in pairs
        )


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """Walk over the weights of a module as they are now, in order; made for every call.

    ``module.parameters()`` takes several times longer: it builds names and looks for duplicates.
    """
    yield from (weight for weight in module._parameters.values() if weight is not None)
    for child in module._modules.values():
        if child is not None:
            yield from parameters_of(child)


def _may_be_stepped(weight: Tensor) -> bool:
    return weight.requires_grad or weight.grad is not None


def _few(weight: Tensor) -> NDArray[Any]:
    """View about five entries of a weight where they lie; none where NumPy cannot look."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return np.empty(0)
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach()[:0]
    return flat[:: max(1, (flat.numel() - 1) // 4)].numpy()
