"""Batches under an edge and an atom budget: re-packed every epoch, the same on every process.

The index is small: what the sizes take, and 4 bytes a structure for the order of one epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from mlip.errors import InputError

_OPEN_BATCHES = 16  # batches that packing keeps open; more fill hardly better
_WORTH_COMPILING = 20_000  # structures; fewer are packed sooner than numba compiles

_PIECE = 1 << 20  # structures summed up at a time

Array = NDArray[Any]
Order = NDArray[np.int32]
Sizes = NDArray[np.uint32]


class Packing(Sequence[list[int]]):
    """The batches of one epoch: structure indices one batch after the other.

    Attributes:
        order: structure indices, [appearances] int32.
        offsets: where each batch begins and the last ends, [batches + 1].
    """

    def __init__(self, order: Order, offsets: NDArray[np.int64]) -> None:
        self.order = order
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        batch: list[int] = self.order[self.offsets[i] : self.offsets[i + 1]].tolist()
        return batch


class EdgeBudgetSampler(Sampler[list[int]]):
    """Yields lists of structure indices whose edges and atoms stay within a budget.

    The batches are a pure function of (sizes, weights, budgets, seed, epoch, world size): no state
    is kept but the position, so a run resumes at any (epoch, step). Without weights every structure
    appears once an epoch. Every rank has the same number of steps; only where each batch is a
    single structure are fewer than `world_size` of them repeated to that end. The batches of one
    step cost nearly the same.

    Args:
        n_atoms: atoms of each structure, [n]; uint32 is not copied.
        n_edges: edges of each structure, [n]; uint32 is not copied.
        max_edges: edge budget of one batch.
        max_atoms: atom budget of one batch, None for no limit.
        seed: seed of the permutations; None keeps the order and shuffles nothing.
        rank: this process.
        world_size: number of processes.
        even: give all ranks the same number of steps.
        weights: expected appearances of each structure in an epoch, [n]: 2.3 means twice, and a
            third time in three epochs of ten (drawn from seed and epoch). None for once each.

    Raises:
        InputError: a structure larger than the budget, fewer structures than processes, weights
            that are negative or not finite or come without a seed.
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
        weights: ArrayLike | None = None,
    ) -> None:
        self.n_atoms = _sizes("n_atoms", n_atoms)
        self.n_edges = _sizes("n_edges", n_edges)
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float32)
        self.max_edges = max_edges
        self.max_atoms = max_atoms if max_atoms is not None else int(self.n_atoms.sum()) + 1
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.step, self.even = 0, 0, even
        self._packed: tuple[tuple[int, int], Packing] | None = None
        self._check()

    def _check(self) -> None:
        count = len(self.n_atoms)
        if len(self.n_edges) != count:
            raise InputError(f"sizes of {count} structures, but edges of {len(self.n_edges)}")
        if count == 0:
            raise InputError("there are no structures to make batches of")
        if self.even and count < self.world_size:
            raise InputError(f"{count} training structures cannot feed {self.world_size} processes")
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
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: NDArray[np.float32]) -> None:
        if weights.shape != self.n_atoms.shape:
            raise InputError(f"weights of shape {weights.shape}, expected {self.n_atoms.shape}")
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise InputError("weights must be finite and not negative")
        if self.seed is None:
            raise InputError("weights need a seed: which structures appear is drawn")
        if weights.sum() < self.world_size:
            raise InputError(
                f"the weights add up to {weights.sum():.3g} structures an epoch, too few for "
                f"{self.world_size} process{'es' if self.world_size > 1 else ''}: raise them"
            )

    def start(self, epoch: int, step: int = 0) -> None:
        """Move to a position; the next iteration yields the batches of `epoch` from `step` on."""
        self.epoch, self.step = epoch, step

    def steps(self, epoch: int) -> int:
        """Return the number of batches that every rank sees in an epoch."""
        return len(self.batches(epoch)) // self.world_size

    def batches(self, epoch: int) -> Packing:
        """Return the batches of all ranks; rank r takes r, r + world_size, …"""
        key = (epoch, self.world_size)
        if self._packed is None or self._packed[0] != key:
            self._packed = None
            self._packed = (key, self._pack(epoch))
        return self._packed[1]

    def __iter__(self) -> Iterator[list[int]]:
        first = self.step * self.world_size + self.rank
        batches = self.batches(self.epoch)
        return (batches[b] for b in range(first, len(batches), self.world_size))

    def _pack(self, epoch: int) -> Packing:
        generator = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        order = self._appearances(generator)
        if generator is not None:
            generator.shuffle(order)
        batch_of, count, tail = self._assign(order)
        if self.even and self.world_size > 1:
            order, batch_of, count = self._make_even(order, batch_of, count, tail)
        sequence = np.arange(count)
        if generator is not None:
            sequence = self._in_steps(order, batch_of, count, generator)
        return _grouped(order, batch_of, sequence)

    def _appearances(self, generator: np.random.Generator | None) -> Order:
        """List the structures of an epoch, each as often as its weight says."""
        everything = np.arange(len(self.n_atoms), dtype=np.int32)
        if self.weights is None:
            return everything
        assert generator is not None
        whole = np.floor(self.weights)
        drawn = generator.random(len(whole), dtype=np.float32) < self.weights - whole
        order = np.repeat(everything, whole.astype(np.int32) + drawn)
        # a draw of too few for the processes is made up by the heaviest ones
        missing = max(self.world_size - len(order), 0)
        heaviest = np.argsort(-self.weights, kind="stable")[:missing].astype(np.int32)
        return np.concatenate([order, heaviest])

    def _assign(self, order: Order) -> tuple[Order, int, Order]:
        """Give each appearance a batch; also the number of batches, and which are not closed."""
        batch_of = np.empty(len(order), dtype=np.int32)
        still_open = np.empty(_OPEN_BATCHES, dtype=np.int32)
        count = _kernel(_best_fit, len(order))(
            order, self.n_atoms, self.n_edges, self.max_atoms, self.max_edges, batch_of, still_open
        )
        return batch_of, int(count), still_open[: min(count, _OPEN_BATCHES)]

    def _make_even(
        self, order: Order, batch_of: Order, count: int, tail: Order
    ) -> tuple[Order, Order, int]:
        """Spread the batches left open over so many that the number divides among the ranks."""
        missing = -count % self.world_size
        tail = self._whole_steps(order, batch_of, count, tail, missing)
        places = np.flatnonzero(np.isin(batch_of, tail))
        names = np.concatenate([tail, np.arange(count, count + missing)]).astype(np.int32)
        spread = self._spread(order[places], len(names))
        if spread is not None:
            batch_of[places] = names[spread]
            return order, batch_of, count + missing
        return _split(order, batch_of, count, missing) if missing else (order, batch_of, count)

    def _whole_steps(
        self, order: Order, batch_of: Order, count: int, tail: Order, missing: int
    ) -> Order:
        """Add the lightest batches to the open ones, so that spread they make whole steps."""
        lacking = min(-(len(tail) + missing) % self.world_size, count - len(tail))
        cost = _sums(self.n_edges, order, batch_of, count)
        cost[tail] = np.inf
        return np.concatenate([tail, np.argsort(cost, kind="stable")[:lacking].astype(np.int32)])

    def _spread(self, items: Order, count: int) -> Order | None:
        """Distribute structures over batches of nearly equal cost; None if they do not fit."""
        if len(items) < count:
            return None
        largest_first = np.lexsort((self.n_atoms[items], self.n_edges[items]))[::-1]
        batch_of = np.empty(len(items), dtype=np.int32)
        fits = _kernel(_lightest_first, len(items))(
            items, largest_first, self.n_atoms, self.n_edges, self.max_atoms, self.max_edges,
            batch_of, count,
        )  # fmt: skip
        return batch_of if fits and len(np.unique(batch_of)) == count else None

    def _in_steps(
        self, order: Order, batch_of: Order, count: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Put batches of similar cost into one step, so that ranks wait little for each other."""
        if self.world_size == 1:
            return generator.permutation(count)
        costs = [_sums(size, order, batch_of, count) for size in (self.n_atoms, self.n_edges)]
        by_cost = np.lexsort(costs)
        whole = count // self.world_size * self.world_size
        steps = by_cost[:whole].reshape(-1, self.world_size)
        shuffled = steps[generator.permutation(len(steps))].ravel()
        return np.concatenate([shuffled, by_cost[whole:]])


def _sizes(name: str, values: ArrayLike) -> Sizes:
    array = np.asarray(values)
    if array.dtype == np.uint32:
        return array
    if array.ndim != 1 or (len(array) and not 0 <= array.min() <= array.max() < 2**32):
        raise InputError(f"{name} must be a list of sizes between 0 and 2³²")
    return array.astype(np.uint32)


def _split(order: Order, batch_of: Order, count: int, missing: int) -> tuple[Order, Order, int]:
    """Halve batches until their number divides; repeat some where all are single structures."""
    batches = list(_grouped(order, batch_of, np.arange(count)))
    while missing:
        batches.sort(key=len)
        if len(batches[-1]) == 1:
            batches += batches[:missing]
            break
        largest = batches.pop()
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        missing -= 1
    lengths = [len(batch) for batch in batches]
    return (
        np.concatenate(batches).astype(np.int32),
        np.repeat(np.arange(len(batches), dtype=np.int32), lengths),
        len(batches),
    )


def _sums(sizes: Sizes, order: Order, batch_of: Order, count: int) -> NDArray[np.float64]:
    """Add up a size over each batch; in pieces, to need little memory."""
    totals = np.zeros(count)
    for begin in range(0, len(order), _PIECE):
        piece = slice(begin, begin + _PIECE)
        first = int(batch_of[piece].min())
        found = np.bincount(batch_of[piece] - first, weights=sizes[order[piece]])
        totals[first : first + len(found)] += found
    return totals


def _grouped(order: Order, batch_of: Order, sequence: NDArray[np.int64]) -> Packing:
    """Sort appearances by the place of their batch in a sequence, keeping the order inside."""
    place_of = np.empty(len(sequence), dtype=np.int32)
    place_of[sequence] = np.arange(len(sequence), dtype=np.int32)
    offsets = np.zeros(len(sequence) + 1, dtype=np.int64)
    grouped = np.empty_like(order)
    _kernel(_group, len(order))(order, batch_of, place_of, offsets, grouped)
    return Packing(grouped, offsets)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    compiled: Callable[..., Any] = numba.njit(function)
    return compiled


def _kernel(function: Callable[..., Any], items: int) -> Callable[..., Any]:
    """Give a loop compiled if that pays; the results are the same."""
    return function if items < _WORTH_COMPILING else _compiled(function)


def _best_fit(
    order: Array, atoms: Array, edges: Array, max_atoms: int, max_edges: int,
    batch_of: Array, still_open: Array,
) -> int:  # fmt: skip
    """Put each structure into the open batch that it fills best; close the fullest if none fits."""
    window = len(still_open)
    room_atoms = np.zeros(window, dtype=np.int64)
    room_edges = np.zeros(window, dtype=np.int64)
    opened, count = 0, 0
    for place in range(len(order)):
        a, e = np.int64(atoms[order[place]]), np.int64(edges[order[place]])
        best, best_room = -1, 2.0
        for k in range(opened):
            if a <= room_atoms[k] and e <= room_edges[k]:
                room = min((room_atoms[k] - a) / max_atoms, (room_edges[k] - e) / max_edges)
                if room < best_room:
                    best, best_room = k, room
        if best < 0:
            if opened < window:
                best = opened
                opened += 1
            else:
                for k in range(window):
                    room = min(room_atoms[k] / max_atoms, room_edges[k] / max_edges)
                    if room < best_room:
                        best, best_room = k, room
            room_atoms[best], room_edges[best] = max_atoms, max_edges
            still_open[best] = count
            count += 1
        room_atoms[best] -= a
        room_edges[best] -= e
        batch_of[place] = still_open[best]
    return count


def _lightest_first(
    items: Array, largest_first: Array, atoms: Array, edges: Array, max_atoms: int,
    max_edges: int, batch_of: Array, count: int,
) -> bool:  # fmt: skip
    """Put each structure into the batch with the fewest edges that has room; False if none has."""
    sum_atoms = np.zeros(count, dtype=np.int64)
    sum_edges = np.zeros(count, dtype=np.int64)
    for place in largest_first:
        a, e = np.int64(atoms[items[place]]), np.int64(edges[items[place]])
        best = -1
        for k in range(count):
            if sum_atoms[k] + a <= max_atoms and sum_edges[k] + e <= max_edges:
                lighter = best < 0 or sum_edges[k] < sum_edges[best]
                if lighter or (sum_edges[k] == sum_edges[best] and sum_atoms[k] < sum_atoms[best]):
                    best = k
        if best < 0:
            return False
        sum_atoms[best] += a
        sum_edges[best] += e
        batch_of[place] = best
    return True


def _group(order: Array, batch_of: Array, place_of: Array, offsets: Array, grouped: Array) -> None:
    """Sort by counting; leaves in ``offsets`` where each batch begins."""
    for place in range(len(order)):
        offsets[place_of[batch_of[place]] + 1] += 1
    for batch in range(1, len(offsets)):
        offsets[batch] += offsets[batch - 1]
    cursor = offsets.copy()
    for place in range(len(order)):
        batch = place_of[batch_of[place]]
        grouped[cursor[batch]] = order[place]
        cursor[batch] += 1
