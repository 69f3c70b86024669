"""What is made of weights for inference, kept while the weights are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Prepared(Generic[T]):
    """What was made of weights, made anew when a weight was replaced or changed.

    Addresses and versions tell of every change but one: fused optimisers change weights and leave
    their versions. A weight that an optimiser may step, having or wanting a gradient, is therefore
    compared with a copy. For one that was frozen, trained and is frozen again, the owner calls
    `clear` wherever it computes what may be differentiated by its weights. Not noticed are writes
    to a frozen weight through ``weight.data`` or an array that shares its memory.

    Copies of the owner, and what is pickled, begin empty.
    """

    def __init__(self) -> None:
        self._made: T | None = None
        self._state: list[tuple[int, int, bool]] = []
        self._copies: list[Tensor | None] = []
        self._memory: list[Tensor] = []  # of the weights: while it is held, addresses differ

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
        return self._made

    def clear(self) -> None:
        """Forget what was made."""
        self._made = None

    def _equal(self, weights: list[Tensor]) -> bool:
        """Whether weights that have a copy are equal to it."""
        pairs = zip(self._copies, weights, strict=True)
        return all(copy is None or torch.equal(copy, weight) for copy, weight in pairs)


def _may_be_stepped(weight: Tensor) -> bool:
    return weight.requires_grad or weight.grad is not None
