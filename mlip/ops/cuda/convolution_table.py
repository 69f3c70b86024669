"""The headers that ``kernels/convolution.cu`` includes: products of one input degree, written out.

Paths with one l1 form a group, which has its own kernels: features of other degrees have other
numbers of channels, and the sums of all groups would not fit in registers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from mlip.ops.cpu.coupling import Coupling, couplings
from mlip.ops.cpu.runner import Layout
from mlip.ops.cuda.program import whole_warps

PARTS = 4  # shares of the matrix of an edge, built by different warps
LARGEST_BLOCK = 128  # threads
SHARED_BYTES = 46 * 1024  # below the 48 KiB that every GPU gives without asking


class Group:
    """The paths of one input degree.

    Args:
        layout: shapes and places of all features.
        degree: l1, one of ``layout.degrees``.
        n_radial: radial functions of the fused variant; 0 if weights are given.
    """

    def __init__(self, layout: Layout, degree: int, n_radial: int = 0) -> None:
        self.layout, self.degree, self.n_radial = layout, degree, n_radial
        self.channels = layout.channels[degree]

    @cached_property
    def couplings(self) -> tuple[Coupling, ...]:
        """Entries of the paths, numbered within the group."""
        return couplings(tuple(path for path in self.layout.paths if path[0] == self.degree))

    @cached_property
    def n_entries(self) -> int:
        """Nonzero entries of the matrices of an edge."""
        return sum(len(c.matrix) for c in self.couplings)

    @property
    def stride(self) -> int:
        """Numbers from one edge's matrices to the next: an odd multiple of four, for the banks."""
        quads = -(-self.n_entries // 4)
        return 4 * (quads + 1 - quads % 2)

    @property
    def block(self) -> int:
        """Threads of a block: whole warps."""
        return whole_warps(self.channels, LARGEST_BLOCK)

    @property
    def warp_sums(self) -> int:
        """Numbers of an edge that hold the sum of each warp for each harmonic."""
        return (self.layout.lmax_edge + 1) ** 2 * self.block // 32

    def tile(self, itemsize: int) -> int:
        """Edges whose matrices are in shared memory at a time."""
        return _largest_tile(itemsize, self.stride + self.n_radial, self._columns(itemsize))

    def backward_tile(self, itemsize: int) -> int:
        """The same in the backward pass."""
        return _largest_tile(itemsize, self._backward_numbers())

    def kept(self, itemsize: int) -> bool:
        """Whether the forward pass keeps its columns of the kernel in shared memory."""
        numbers = self._kernel_numbers() + self.stride + self.n_radial  # of one edge at least
        return self.n_radial > 0 and itemsize * numbers <= SHARED_BYTES

    def _kernel_numbers(self) -> int:
        """Numbers of the kernel of radial functions for the channels of a block."""
        return self.n_radial * len(self.couplings) * self.block

    def _columns(self, itemsize: int) -> int:
        """Those that the forward pass keeps."""
        return self._kernel_numbers() if self.kept(itemsize) else 0

    def _backward_numbers(self) -> int:
        """Numbers of an edge: matrices, sums of each warp for harmonics and radial functions."""
        return self.stride + self.warp_sums + self.n_radial * self.block // 32

    def second_tile(self, itemsize: int) -> int:
        """Edges whose two matrices are in shared memory at a time, for second derivatives."""
        return _largest_tile(itemsize, self._second_numbers())

    def second_shared_bytes(self, itemsize: int) -> int:
        """Dynamic shared memory of a block for second derivatives."""
        return itemsize * self.second_tile(itemsize) * self._second_numbers()

    def _second_numbers(self) -> int:
        """Numbers of an edge: two sets of matrices, and the sums of each warp."""
        return self.stride + self._backward_numbers()

    def shared_bytes(self, itemsize: int, backward: bool) -> int:
        """Dynamic shared memory of a block."""
        if backward:
            return itemsize * self.backward_tile(itemsize) * self._backward_numbers()
        each = self.stride + self.n_radial
        return itemsize * (self._columns(itemsize) + self.tile(itemsize) * each)

    def text(self) -> str:
        """Write the header."""
        layout, d1 = self.layout, 2 * self.degree + 1
        before = sum((2 * i + 1) * layout.channels[i] for i in range(self.degree))
        first = int(layout.w_first[layout.degrees.index(self.degree)])
        rows = sum(2 * c.path[2] + 1 for c in self.couplings)
        constants = {
            "DIM": d1,
            "PATHS": len(self.couplings),
            "ROWS": rows,
            "ENTRIES": self.n_entries,
            "STRIDE": self.stride,
            "CHANNELS": self.channels,
            "HARMONICS": (layout.lmax_edge + 1) ** 2,
            "RADIAL": self.n_radial,
            "WEIGHTS": layout.n_weights,
            "FIRST_WEIGHT": first,
            "BEFORE": before,
            "PARTS": PARTS,
            "BLOCK": self.block,
        }
        lines = [
            f"// Generated by mlip: products of features with l = {self.degree}, channels "
            f"{layout.channels}.",
            "#pragma once",
            "",
            *(f"constexpr int {name} = {value};" for name, value in constants.items()),
            "template <typename T>",
            "constexpr int TILE = sizeof(T) == 4 "
            f"? {self.tile(4)} : {self.tile(8)};  // edges in shared memory",
            "template <typename T>",
            "constexpr bool KEPT = sizeof(T) == 4 "
            f"? {int(self.kept(4))} : {int(self.kept(8))};  // the kernel in shared memory",
            "template <typename T>",
            "constexpr int BACKWARD_TILE = sizeof(T) == 4 "
            f"? {self.backward_tile(4)} : {self.backward_tile(8)};",
            "template <typename T>",
            "constexpr int SECOND_TILE = sizeof(T) == 4 "
            f"? {self.second_tile(4)} : {self.second_tile(8)};  // for second derivatives",
            "",
            *self._matrix(),
            *self._rows(),
            *self._products(),
            *self._slopes(),
            *self._second(),
        ]
        return "\n".join(lines) + "\n"

    def _matrix(self) -> Iterable[str]:
        """M[m3, m1] = Σ_m2 C Y[m2] of all paths, in shares of about equal work."""
        shares: list[list[Coupling]] = [[] for _ in range(PARTS)]
        work = [0] * PARTS
        for coupling in sorted(self.couplings, key=lambda c: -len(c.entries)):
            part = work.index(min(work))
            shares[part].append(coupling)
            work[part] += len(coupling.entries)
        yield "// Write one of the shares of the matrices m of an edge with harmonics y."
        yield "template <typename T>"
        yield "__device__ __forceinline__ void edge_matrix(int part, const T* y, T* m) {"
        yield "  switch (part) {"
        for part, share in enumerate(shares):
            yield f"    case {part}:"
            for coupling in share:
                l1, l2, l3 = coupling.path
                yield f"      // {l1} x {l2} -> {l3}"
                for i, terms in enumerate(coupling.matrix.values()):
                    value = " + ".join(f"T({v!r}) * y[{l2 * l2 + m2}]" for m2, v in terms)
                    yield f"      m[{coupling.first_matrix + i}] = {value};"
            yield "      break;"
        yield "  }"
        yield "}"
        yield ""

    def _rows(self) -> Iterable[str]:
        """Where the output rows of an atom lie: packed, degree after degree."""
        layout = self.layout
        first = [0]
        for degree, channels in enumerate(layout.out_channels):
            first.append(first[-1] + (2 * degree + 1) * channels)
        used = [0] * len(layout.out_channels)
        yield "// Call f(row, place) for every row of the result of an atom."
        yield "template <typename F>"
        yield "__device__ __forceinline__ void for_rows(size_t n_atoms, size_t atom, F&& f) {"
        row = 0
        for l1, _, l3 in layout.paths:
            channels = layout.out_channels[l3]
            if l1 == self.degree:
                for m3 in range(2 * l3 + 1):
                    offset = m3 * channels + used[l3]
                    step = (2 * l3 + 1) * channels
                    yield f"  f({row}, {first[l3]} * n_atoms + {step} * atom + {offset});"
                    row += 1
            used[l3] += layout.channels[l1]
        yield "}"
        yield ""

    def _products(self) -> Iterable[str]:
        """sum[row] += w M x; the weight multiplies the smaller side."""
        yield "// Add the products of an edge to the sums of its target; weight(path) gives w."
        yield "template <typename T, typename W>"
        yield "__device__ __forceinline__ void add_products("
        yield "    const T* m, const T (&x)[DIM], W&& weight, T (&sum)[ROWS]) {"
        for p, coupling in enumerate(self.couplings):
            l1, l2, l3 = coupling.path
            yield f"  {{  // {l1} x {l2} -> {l3}"
            yield f"    const T w = weight({p});"
            inner = l1 < l3
            if inner:
                for a in range(2 * l1 + 1):
                    yield f"    const T y{a} = w * x[{a}];"
            for m3 in range(2 * l3 + 1):
                entries = _row(coupling, m3)
                if not entries:
                    continue
                row = coupling.first_row + m3
                if inner:
                    for a, i in entries:
                        yield f"    sum[{row}] += m[{i}] * y{a};"
                else:
                    products = " + ".join(f"m[{i}] * x[{a}]" for a, i in entries)
                    yield f"    sum[{row}] += w * ({products});"
            yield "  }"
        yield "}"
        yield ""

    def _slopes(self) -> Iterable[str]:
        """q = Mᵀ g; ∂/∂w = x·q; ∂/∂x += w q; ∂/∂Y[m2] += C w x[m1] g[m3]."""
        yield "// Add derivatives of an edge's products: by features to dx, by harmonics to dy;"
        yield "// slope(path, value) takes those by weights, g[row] is the gradient of the result."
        yield "template <typename T, int N, typename W, typename S>"
        yield "__device__ __forceinline__ void add_slopes("
        yield "    const T* m, const T (&x)[DIM], const T (&g)[ROWS], W&& weight, S&& slope,"
        yield "    T (&dx)[DIM], T (&dy)[N]) {"
        for p, coupling in enumerate(self.couplings):
            l1, l2, l3 = coupling.path
            yield f"  {{  // {l1} x {l2} -> {l3}"
            yield f"    const T w = weight({p});"
            for m1 in range(2 * l1 + 1):
                entries = [
                    (k, i) for k in range(2 * l3 + 1) for a, i in _row(coupling, k) if a == m1
                ]
                products = " + ".join(f"m[{i}] * g[{coupling.first_row + k}]" for k, i in entries)
                yield f"    const T q{m1} = {products or 'T(0)'};"
                yield f"    const T u{m1} = w * x[{m1}];"
                yield f"    dx[{m1}] += w * q{m1};"
            sums = " + ".join(f"x[{m1}] * q{m1}" for m1 in range(2 * l1 + 1))
            yield f"    slope({p}, {sums});"
            for m3 in range(2 * l3 + 1):
                for m1, _ in _row(coupling, m3):
                    yield f"    {{ const T v = u{m1} * g[{coupling.first_row + m3}];"
                    for m2, value in coupling.matrix[m3, m1]:
                        yield f"      dy[{l2 * l2 + m2}] += T({value!r}) * v;"
                    yield "    }"
            yield "  }"
        yield "}"

    def _second(self) -> Iterable[str]:
        """With u = w x, v = w x' + w' x: M v + M' u, and the derivatives that belong to it."""
        yield ""
        yield "// Add second derivatives of an edge's products: by the gradient of the result to"
        yield "// sum, by features to dx, by harmonics to dy; n: matrices of the cotangent of y;"
        yield "// slope(path, first, second) takes first and second derivatives by weights."
        yield "template <typename T, int N, typename W, typename A, typename S>"
        yield "__device__ __forceinline__ void add_second("
        yield "    const T* m, const T* n, const T (&x)[DIM], const T (&along)[DIM],"
        yield "    const T (&g)[ROWS], W&& weight, A&& along_weight, S&& slope, T (&sum)[ROWS],"
        yield "    T (&dx)[DIM], T (&dy)[N]) {"
        for p, coupling in enumerate(self.couplings):
            l1, l2, l3 = coupling.path
            columns = range(2 * l1 + 1)
            yield f"  {{  // {l1} x {l2} -> {l3}"
            yield f"    const T w = weight({p}), along_w = along_weight({p});"
            for a in columns:
                yield f"    const T u{a} = w * x[{a}], v{a} = w * along[{a}] + along_w * x[{a}];"
                yield f"    T q{a} = 0, r{a} = 0;"
            for m3 in range(2 * l3 + 1):
                row = coupling.first_row + m3
                for a, i in _row(coupling, m3):
                    yield f"    {{ const T s = m[{i}], t = n[{i}], z = v{a} * g[{row}];"
                    yield f"      sum[{row}] += s * v{a} + t * u{a};"
                    yield f"      q{a} += s * g[{row}]; r{a} += t * g[{row}];"
                    for m2, value in coupling.matrix[m3, a]:
                        yield f"      dy[{l2 * l2 + m2}] += T({value!r}) * z;"
                    yield "    }"
            first = " + ".join(f"x[{a}] * q{a}" for a in columns)
            second = " + ".join(f"along[{a}] * q{a} + x[{a}] * r{a}" for a in columns)
            yield f"    slope({p}, {first}, {second});"
            for a in columns:
                yield f"    dx[{a}] += along_w * q{a} + w * r{a};"
            yield "  }"
        yield "}"


def _largest_tile(itemsize: int, each: int, fixed: int = 0) -> int:
    """Edges of ``each`` numbers that fit in shared memory beside ``fixed`` ones; at least one."""
    sizes = (n for n in (32, 16, 8, 4, 2) if itemsize * (fixed + n * each) <= SHARED_BYTES)
    return next(sizes, 1)


def _row(coupling: Coupling, m3: int) -> list[tuple[int, int]]:
    """(m1, entry number) of the nonzero entries of a row of the matrix."""
    return [(m1, coupling.first_matrix + i) for i, (k, m1) in enumerate(coupling.matrix) if k == m3]
