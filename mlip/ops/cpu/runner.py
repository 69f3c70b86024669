"""Run the compiled convolution on packed arrays.

Packed features: one flat array, degree after degree, each [N, 2l + 1, C_l]. Channels are multiples
of ``BLOCK`` (16 for float32, 8 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise

import numpy as np

from mlip.ops.convolution import Path
from mlip.ops.cpu import cache, threads
from mlip.ops.cpu.program import program

BLOCK = {"float32": 16, "float64": 8}
CHUNK_EDGES = 2048  # neighbours of one task of the backward pass, at least
MOST_CHUNKS = 16
MOST_COPIES = 4  # gradients of features that tasks hold, in units of the features themselves
SERIAL = 50_000  # edges times channels below which threads do not pay
SERIAL_SUM = 1 << 18  # the same, for numbers in a sum of parts

Array = np.ndarray


@dataclass(frozen=True)
class Layout:
    """Where things lie in packed arrays. channels: of each degree, multiples of the block."""

    channels: tuple[int, ...]
    lmax_edge: int
    paths: tuple[Path, ...]
    out_channels: tuple[int, ...]

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that take part in a path, in order."""
        return tuple(sorted({path[0] for path in self.paths}))

    @cached_property
    def n_weights(self) -> int:
        """Weights of one edge."""
        return sum(self.channels[l1] for l1, _, _ in self.paths)

    @cached_property
    def group_channels(self) -> Array:
        """Channels of each group of paths with one l1."""
        return np.array([self.channels[l1] for l1 in self.degrees], dtype=np.int64)

    @cached_property
    def w_first(self) -> Array:
        """First weight of each group."""
        sizes = [sum(self.channels[a] for a, _, _ in self.paths if a == l1) for l1 in self.degrees]
        return np.cumsum([0, *sizes[:-1]]).astype(np.int64)

    @lru_cache(maxsize=64)  # noqa: B019  layouts live as long as the process
    def feature_first(self, n_nodes: int) -> Array:
        """First number of each group's features of ``n_nodes`` atoms."""
        first = np.cumsum([0, *((2 * i + 1) * c for i, c in enumerate(self.channels))]) * n_nodes
        return first[list(self.degrees)].astype(np.int64)

    @lru_cache(maxsize=64)  # noqa: B019
    def rows(self, n_nodes: int) -> tuple[Array, Array]:
        """Of output rows (path, m3): index for atom 0, channel 0; step of atoms."""
        first = np.cumsum([0, *((2 * i + 1) * c for i, c in enumerate(self.out_channels))])
        used = [0] * len(self.out_channels)
        start, step = [], []
        for l1, _, l3 in self.paths:
            for m3 in range(2 * l3 + 1):
                start.append(first[l3] * n_nodes + m3 * self.out_channels[l3] + used[l3])
                step.append((2 * l3 + 1) * self.out_channels[l3])
            used[l3] += self.channels[l1]
        return np.array(start, dtype=np.int64), np.array(step, dtype=np.int64)

    def feature_size(self, n_nodes: int) -> int:
        """Numbers in packed features."""
        return n_nodes * sum((2 * i + 1) * c for i, c in enumerate(self.channels))

    def out_size(self, n_nodes: int) -> int:
        """Numbers in a packed result."""
        return n_nodes * sum((2 * i + 1) * c for i, c in enumerate(self.out_channels))


class EdgeList:
    """Edges by target, and how passes over them are divided; made once for all passes.

    rowptr: [N + 1] first edge of each atom, int64. source: [E] int64.
    """

    by_pairs = False  # each edge stands for its opposite, too: targets are sources as well

    def __init__(self, rowptr: Array, source: Array) -> None:
        self.rowptr, self.source = rowptr, source
        self.n_nodes, self.n_edges = len(rowptr) - 1, len(source)
        self._bounds: dict[int, list[int]] = {}

    @property
    def n_directed(self) -> int:
        """Edges for which there is work."""
        return 2 * self.n_edges if self.by_pairs else self.n_edges

    def bounds(self, n_parts: int) -> list[int]:
        """Cut the atoms in parts with about the same number of edges."""
        if n_parts not in self._bounds:
            self._bounds[n_parts] = node_bounds(self.rowptr, n_parts)
        return self._bounds[n_parts]

    @cached_property
    def chunk_bounds(self) -> list[int]:
        """Cut the backward pass, by the graph alone: results must not depend on threads.

        Atoms that are neighbours should be near in order, else every chunk touches every atom:
        then fewer chunks are made, to bound memory.
        """
        n_chunks = threads.even_parts(self.n_directed, CHUNK_EDGES, MOST_CHUNKS)
        if n_chunks > MOST_COPIES:
            row_of, rows = np.empty(self.n_nodes, np.int32), np.empty_like(self.source)
            touched = sum(
                self._local_rows(low, high, row_of, rows)
                for low, high in pairwise(self.bounds(n_chunks))
            )
            if touched > MOST_COPIES * self.n_nodes:
                n_chunks = MOST_COPIES
        return self.bounds(n_chunks)

    @cached_property
    def chunk_rows(self) -> tuple[Array, Array, list[int]]:
        """Where chunks add gradients of features, all but the first to rows of their own.

        Returns:
            [E] row of the source of each edge, [chunks, N] row of each atom (−1: none), numbers of
            rows; the last two without the first chunk.
        """
        others = list(pairwise(self.chunk_bounds))[1:]
        rows = self.source if not others else self.source.copy()
        row_of = np.empty((len(others), self.n_nodes), np.int32)
        n_rows = [
            self._local_rows(low, high, own, rows)
            for (low, high), own in zip(others, row_of, strict=True)
        ]
        return rows, row_of, n_rows

    def _local_rows(self, low: int, high: int, row_of: Array, rows: Array) -> int:
        count: int = cache.loops().local_rows(
            self.rowptr, self.source, low, high, row_of, rows, self.by_pairs
        )
        return count

    @cached_property
    def all_rows(self) -> Array:
        """Rows of all atoms where all have one, int32."""
        return np.arange(self.n_nodes, dtype=np.int32)


def forward(
    layout: Layout,
    features: Array,
    harmonics: Array,
    radial: Array,
    kernel: Array | None,
    edges: EdgeList,
    out: Array,
) -> None:
    """Write the sums over neighbours to ``out``.

    Args:
        layout: shapes.
        features, out: packed, flat.
        harmonics: [E, K].
        radial: [E, n_weights]; radial functions [E, R] if there is a kernel.
        kernel: [R, n_weights] or None.
        edges: by target.
    """
    if not layout.paths or not edges.n_edges:
        out[:] = 0
        return
    run = program(layout.paths, layout.lmax_edge, features.dtype.name, kernel is not None)
    weights, basis, matrix, n_radial = radial_arrays(radial, kernel)
    call = partial(
        run.code.forward_pass, *run.tables, features, harmonics.ravel(), weights, basis, matrix,
        edges.rowptr, edges.source, out, layout.group_channels,
        layout.feature_first(edges.n_nodes), layout.w_first, layout.n_weights, n_radial,
        *ordered_rows(layout, edges.n_nodes, run.row_order),
    )  # fmt: skip
    parts = 1 if _is_serial(layout, edges) else 4 * threads.available_threads()
    threads.run(over_nodes(call, edges.bounds(parts)))


@dataclass(frozen=True)
class Gradients:
    """Where a backward pass writes; None: not wanted. radial and harmonics come together.

    To ``features`` it adds.
    """

    features: Array | None
    harmonics: Array | None
    radial: Array | None
    kernel: Array | None


def backward(
    layout: Layout,
    features: Array,
    harmonics: Array,
    radial: Array,
    kernel: Array | None,
    gradient: Array,
    edges: EdgeList,
    out: Gradients,
) -> None:
    """Write the gradients of Σ gradient·result; arguments as in ``forward``."""
    if not layout.paths or not edges.n_edges:
        for array in (out.harmonics, out.radial, out.kernel):
            if array is not None:
                array[:] = 0
        return
    run = program(layout.paths, layout.lmax_edge, features.dtype.name, kernel is not None)
    weights, basis, matrix, n_radial = radial_arrays(radial, kernel)
    empty = np.empty(0, features.dtype)
    slopes = empty if out.radial is None else out.radial.ravel()
    start, step = ordered_rows(layout, edges.n_nodes, run.row_order)

    def call(part: Part) -> None:
        run.code.backward_pass(
            *run.tables, features, harmonics.ravel(), weights, basis, matrix, gradient,
            edges.rowptr, edges.source, part.rows, part.features,
            empty if out.harmonics is None else out.harmonics.ravel(),
            slopes if n_radial == 0 else empty, slopes if n_radial else empty, part.kernel,
            layout.group_channels, layout.feature_first(edges.n_nodes), part.first,
            layout.w_first, layout.n_weights, n_radial, start, step, *part.atoms,
            out.harmonics is not None, out.kernel is not None,
        )  # fmt: skip

    in_parts(layout, edges, features.dtype, out.features, out.kernel, call)


@dataclass(frozen=True)
class Part:
    """A range of targets, and where a pass over it adds.

    rows: [E] row in ``features`` of the source of each edge; row_of: [N] of each atom.
    features: packed rows; first: number where those of each group begin.
    kernel: gradient of a radial kernel, flat; empty if it is not wanted.
    atoms: first of the range, and first after it.
    """

    rows: Array
    row_of: Array
    features: Array
    first: Array
    kernel: Array
    atoms: tuple[int, int]


def in_parts(
    layout: Layout,
    edges: EdgeList,
    dtype: np.dtype,
    of_features: Array | None,
    of_kernel: Array | None,
    call: Callable[[Part], None],
) -> None:
    """Call a pass for ranges of targets, cut by the graph alone, and add their gradients in order.

    Args:
        layout: shapes.
        edges: by target.
        dtype: of the numbers.
        of_features: what gradients of features are added to; None: not wanted.
        of_kernel: where that of the kernel goes; None: not wanted.
        call: the pass.
    """
    bounds = edges.chunk_bounds
    chunks = _Chunks(layout, edges, of_features) if of_features is not None else None
    parts = chunks.part if chunks else _unwanted(layout, edges, dtype)
    size = 0 if of_kernel is None else of_kernel.size
    kernels = [np.zeros(size, dtype) for _ in bounds[1:]]

    def task(i: int) -> None:
        call(Part(*parts(i), kernels[i], (bounds[i], bounds[i + 1])))

    tasks = [partial(task, i) for i in range(len(bounds) - 1)]
    _run(tasks, serial=_is_serial(layout, edges))
    if chunks:
        chunks.sum()
    if of_kernel is not None:
        np.sum(kernels, axis=0, out=of_kernel.reshape(-1))


class _Chunks:
    """Gradients of features, one part for each range of targets, added up in a fixed order.

    The first range adds to the result itself, the others to rows of their own.
    """

    def __init__(self, layout: Layout, edges: EdgeList, out: Array) -> None:
        self.layout, self.out, self.edges = layout, out, edges
        self.rows, self.row_of, self.n_rows = edges.chunk_rows
        self.begins = np.cumsum([0, *(layout.feature_size(n) for n in self.n_rows)])
        self.parts = np.zeros(self.begins[-1], out.dtype)

    def part(self, i: int) -> tuple[Array, Array, Array, Array]:
        """Part of a chunk: rows of edges and of atoms, numbers, first number of each group."""
        if i == 0:
            first = self.layout.feature_first(self.edges.n_nodes)
            return self.rows, self.edges.all_rows, self.out, first
        own, first = (
            self.parts[self.begins[i - 1] : self.begins[i]],
            self.layout.feature_first(self.n_rows[i - 1]),
        )
        return self.rows, self.row_of[i - 1], own, first

    def sum(self) -> None:
        """Add the parts in the order of the chunks."""
        if not self.n_rows:
            return
        before, tasks = 0, []
        pieces = 8 if self.out.size >= SERIAL_SUM else 1
        n_nodes = self.edges.n_nodes
        cuts = np.linspace(0, n_nodes, pieces + 1).astype(int).tolist()
        for degree, channels in enumerate(self.layout.channels):
            width = (2 * degree + 1) * channels
            if width:
                first = self.begins[:-1] + np.array(self.n_rows, dtype=np.int64) * before
                call = partial(
                    cache.loops().add_chunks, self.parts, first, self.row_of, width, self.out,
                    before * n_nodes,
                )  # fmt: skip
                tasks += over_nodes(call, cuts)
            before += width
        _run(tasks, serial=pieces == 1)


def _unwanted(
    layout: Layout, edges: EdgeList, dtype: np.dtype
) -> Callable[[int], tuple[Array, Array, Array, Array]]:
    """Stand in for ``_Chunks.part``: one row takes gradients of features which nobody wants."""
    size = max((2 * i + 1) * c for i, c in enumerate(layout.channels))
    begins = np.zeros(len(layout.degrees), dtype=np.int64)
    rows, row = np.zeros_like(edges.source), np.zeros(size, dtype)
    return lambda _: (rows, np.zeros_like(edges.all_rows), row, begins)


def ordered_rows(layout: Layout, n_nodes: int, order: Array | None) -> tuple[Array, Array]:
    """As ``Layout.rows``, in the order of a program; rows of one path share a step."""
    start, step = layout.rows(n_nodes)
    return start if order is None else start[order], step


def radial_arrays(radial: Array, kernel: Array | None) -> tuple[Array, Array, Array, int]:
    """Weights, radial functions, kernel and number of radial functions (0 without kernel)."""
    empty = np.empty(0, radial.dtype)
    if kernel is None:
        return radial.ravel(), empty, empty, 0
    return empty, radial.ravel(), kernel.ravel(), kernel.shape[0]


def _is_serial(layout: Layout, edges: EdgeList) -> bool:
    return edges.n_directed * int(layout.group_channels.sum()) < SERIAL


def _run(tasks: Sequence[Callable[[], object]], *, serial: bool) -> None:
    if serial:
        for task in tasks:
            task()
    else:
        threads.run(tasks)


def over_nodes(call: Callable[..., object], bounds: list[int]) -> list[Callable[[], object]]:
    """Tasks that call a function for ranges of atoms, empty ones left out."""
    return [
        partial(call, low, high) for low, high in pairwise(bounds)
        if high > low
    ]  # fmt: skip


def node_bounds(rowptr: Array, n_parts: int) -> list[int]:
    """Cut the atoms in parts with about the same number of edges."""
    n_nodes = len(rowptr) - 1
    goals = rowptr[-1] * np.arange(1, n_parts) / n_parts
    inner = np.searchsorted(rowptr, goals).clip(0, n_nodes)
    return [0, *inner.tolist(), n_nodes]
