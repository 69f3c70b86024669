"""Batches under an edge and an atom budget: re-packed every epoch, the same on every process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from mlip.errors import InputError

_OPEN_BATCHES = 16  # batches that first-fit packing keeps open


class EdgeBudgetSampler(Sampler[list[int]]):
    """Yields lists of structure indices whose edges and atoms stay within a budget.

    The batches are a pure function of (sizes, budgets, seed, epoch, world size): no state is
    kept but the position, so a run resumes at any (epoch, step). Every structure appears once
    an epoch, and every rank has the same number of steps; only where each batch is a single
    structure are fewer than `world_size` of them repeated to that end.

    Args:
        n_atoms: atoms of each structure, [n].
        n_edges: edges of each structure, [n].
        max_edges: edge budget of one batch.
        max_atoms: atom budget of one batch, None for no limit.
        seed: seed of the permutations; None keeps the order and shuffles nothing.
        rank: this process.
        world_size: number of processes.
        even: give all ranks the same number of steps.

    Raises:
        InputError: a structure larger than the budget, or fewer structures than processes.
    """

    def __init__(
        self,
        n_atoms: ArrayLike,
        n_edges: ArrayLike,
        *,
        max_edges: int,
        max_atoms: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
    ) -> None:
        self.n_atoms = np.asarray(n_atoms, dtype=np.int64)
        self.n_edges = np.asarray(n_edges, dtype=np.int64)
        self.max_edges = max_edges
        self.max_atoms = max_atoms if max_atoms is not None else int(self.n_atoms.sum()) + 1
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.step, self.even = 0, 0, even
        self._packed: tuple[int, list[list[int]]] | None = None
        self._check()

    def _check(self) -> None:
        if self.even and len(self.n_atoms) < self.world_size:
            raise InputError(
                f"{len(self.n_atoms)} training structures cannot feed {self.world_size} processes"
            )
        for sizes, limit, what in (
            (self.n_edges, self.max_edges, "edges"),
            (self.n_atoms, self.max_atoms, "atoms"),
        ):
            worst = int(np.argmax(sizes))
            if sizes[worst] > limit:
                raise InputError(
                    f"structure {worst} has {sizes[worst]} {what}, more than batch.max_{what} = "
                    f"{limit}: raise it to at least {sizes[worst]}"
                )

    def start(self, epoch: int, step: int = 0) -> None:
        """Move to a position; the next iteration yields the batches of `epoch` from `step` on."""
        self.epoch, self.step = epoch, step

    def steps(self, epoch: int) -> int:
        """Return the number of batches that every rank sees in an epoch."""
        return len(self.batches(epoch)) // self.world_size

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of all ranks; rank r takes r, r + world_size, …"""
        if self._packed is None or self._packed[0] != epoch:
            self._packed = (epoch, self._pack(epoch))
        return self._packed[1]

    def __iter__(self) -> Iterator[list[int]]:
        first = self.step * self.world_size + self.rank
        yield from self.batches(self.epoch)[first :: self.world_size]

    def _pack(self, epoch: int) -> list[list[int]]:
        count = len(self.n_atoms)
        if self.seed is None:
            return self._even(self._first_fit(np.arange(count)))
        generator = np.random.default_rng([self.seed, epoch])
        batches = self._even(self._first_fit(generator.permutation(count)))
        # batches of similar cost form a step, so that ranks wait little for each other
        batches.sort(key=lambda batch: (int(self.n_edges[batch].sum()), batch[0]))
        order = generator.permutation(len(batches) // self.world_size)
        return [batches[s * self.world_size + r] for s in order for r in range(self.world_size)]

    def _first_fit(self, order: NDArray[np.int64]) -> list[list[int]]:
        closed: list[list[int]] = []
        open_batches: list[tuple[list[int], int, int]] = []
        atoms, edges = self.n_atoms.tolist(), self.n_edges.tolist()
        for i in order.tolist():
            for slot, (batch, room_edges, room_atoms) in enumerate(open_batches):
                if edges[i] <= room_edges and atoms[i] <= room_atoms:
                    batch.append(i)
                    open_batches[slot] = (batch, room_edges - edges[i], room_atoms - atoms[i])
                    break
            else:
                if len(open_batches) == _OPEN_BATCHES:
                    closed.append(open_batches.pop(0)[0])
                open_batches.append(([i], self.max_edges - edges[i], self.max_atoms - atoms[i]))
        return closed + [batch for batch, _, _ in open_batches]

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """Split batches until their number divides among the ranks.

        Where every batch holds a single structure, the first ones are repeated instead.
        """
        while self.even and (missing := -len(batches) % self.world_size):
            largest = max(range(len(batches)), key=lambda b: len(batches[b]))
            batch = batches[largest]
            if len(batch) == 1:
                return batches + [[*batch] for batch in batches[:missing]]
            batches[largest] = batch[: len(batch) // 2]
            batches.append(batch[len(batch) // 2 :])
        return batches
