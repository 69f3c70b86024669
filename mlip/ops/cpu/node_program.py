"""Steps from features of atoms to features of atoms, all in one compiled call.

A program is written once for a set of weights: matrix products of each degree, gates, products on
the sphere. The call does all steps for a few atoms, whose intermediate results stay in cache, then
for the next few. For code that writes its own backward pass: nothing here is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mlip.ops.cpu import threads
from mlip.ops.cpu.cache import load
from mlip.ops.cpu.node_program_text import KINDS, source_text
from mlip.ops.cpu.packed_products import PackedProducts, tables
from mlip.ops.cpu.runner import BLOCK
from mlip.ops.cpu.simd import lanes

SERIAL = 2_000_000  # multiply-adds below which threads do not pay


@dataclass(frozen=True)
class Buffer:
    """Packed features: for each degree [N, 2l + 1, C_l], one degree after the other."""

    number: int
    channels: tuple[int, ...]

    @property
    def per_atom(self) -> int:
        """Count the numbers of an atom."""
        return sum((2 * degree + 1) * n for degree, n in enumerate(self.channels))


class Matrix:
    """A matrix of weights, and how programs read it; both ways are made once."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.shape = tensor.shape

    @cached_property
    def T(self) -> Matrix:
        """The transposed matrix."""
        return Matrix(self.tensor.T)

    @cached_property
    def panels(self) -> Tensor:
        """Panels of two vectors of columns, what is left in panels of one, each row by row."""
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        width, columns = lanes(dtype), self.shape[1]
        whole = columns // (2 * width) * (2 * width)
        parts = list(self.tensor[:, :whole].split(2 * width, 1)) if whole else []
        for first in range(whole, columns, width):
            own = self.tensor[:, first : first + width]
            parts.append(torch.nn.functional.pad(own, (0, width - own.shape[1])))
        flat = [part.reshape(-1) for part in parts]
        return torch.cat([self.tensor.new_empty(0), *flat])


class Program:
    """Steps on buffers, in the order in which they are asked for."""

    def __init__(self, products: PackedProducts | None = None) -> None:
        """Begin a program.

        Args:
            products: which products on the sphere it may take.
        """
        self.sphere = products
        self._buffers: list[Buffer] = []
        self._given: list[bool] = []
        self._steps: list[tuple[int, ...]] = []
        self._matrices: list[Matrix] = []

    def given(self, channels: Sequence[int]) -> Buffer:
        """Name features in the caller's memory: the next tensor of a call."""
        return self._buffer(channels, True)

    def local(self, channels: Sequence[int]) -> Buffer:
        """Name features that no one needs after the call."""
        return self._buffer(channels, False)

    def _buffer(self, channels: Sequence[int], is_given: bool) -> Buffer:
        buffer = Buffer(len(self._buffers), tuple(channels))
        self._buffers.append(buffer)
        self._given.append(is_given)
        return buffer

    def multiply(
        self, out: Buffer, x: Buffer, degree: int, matrix: Matrix, *, add: bool = False
    ) -> None:
        """Write x·matrix of one degree, or add it."""
        expected = (x.channels[degree], out.channels[degree])
        if tuple(matrix.shape) != expected:
            raise ValueError(f"matrix of degree {degree} is {tuple(matrix.shape)}, not {expected}")
        if self._matrices and matrix.tensor.dtype != self._matrices[0].tensor.dtype:
            raise ValueError("matrices of a program are of one precision")
        self._matrices.append(matrix)  # alive as long as the steps have its address
        kind = "multiply_add" if add else "multiply"
        self._step(kind, out, x, x, degree, matrix.panels.data_ptr())

    def silu(self, out: Buffer, x: Buffer) -> None:
        """Write silu of scalars."""
        self._step("silu", out, x, x)

    def silu_slopes(self, out: Buffer, gradient: Buffer, x: Buffer) -> None:
        """Write the gradient by x of silu, given that by its result."""
        self._step("silu_slopes", out, gradient, x)

    def gated(self, out: Buffer, x: Buffer, gates: Buffer, *, add_gates: bool = True) -> None:
        """Write scalars, plus gates or not, and other degrees times one plus gates."""
        if add_gates:
            self._step("add_gates", out, x, gates)
        else:
            self.copy(out, x, 0)
        for degree, first in enumerate(_firsts(out.channels)[1:], 1):
            self._step("gated", out, x, gates, degree, first)

    def gate_slopes(self, out: Buffer, x: Buffer, gradient: Buffer) -> None:
        """Write the gradient by the gates of ``gated``."""
        self.copy(out, gradient, 0)
        for degree, first in enumerate(_firsts(x.channels)[1:], 1):
            self._step("gate_slopes", out, x, gradient, degree, first)

    def add(self, out: Buffer, x: Buffer) -> None:
        """Add the channels of x that both have."""
        for degree in range(min(len(out.channels), len(x.channels))):
            self._step("add_shared", out, x, x, degree)

    def clear(self, out: Buffer, degree: int) -> None:
        """Write zeros to one degree."""
        self._step("clear", out, out, out, degree)

    def copy(self, out: Buffer, x: Buffer, degree: int) -> None:
        """Write the channels of one degree of x that both have, zeros to others."""
        self.clear(out, degree)
        self._step("add_shared", out, x, x, degree)

    def products(self, out: Buffer, u: Buffer) -> None:
        """Write the running products of the factors u (given) to a local buffer."""
        self._demand_places(u, out)
        self._step("products", out, u, u)

    def slopes(self, out: Buffer, gradient: Buffer, u: Buffer) -> None:
        """Write the gradient by u (given), from that by the products; both local."""
        self._demand_places(u, out, gradient)
        self._step("slopes", out, gradient, u)

    def _demand_places(self, u: Buffer, *others: Buffer) -> None:
        if not self._given[u.number] or any(self._given[other.number] for other in others):
            raise ValueError("factors of products are given, products and gradients local")

    def _step(
        self, kind: str, out: Buffer, x: Buffer, y: Buffer, degree: int = 0, number: int = 0
    ) -> None:
        numbers = (out.number, x.number, y.number)
        self._steps.append((KINDS.index(kind), *numbers, degree, number))

    def sizes(self, n_atoms: int) -> list[int]:
        """Count the numbers in each buffer that is given."""
        return [n_atoms * per_atom for per_atom in self._given_per_atom]

    def run(self, n_atoms: int, *tensors: Tensor) -> None:
        """Do all steps.

        Args:
            n_atoms: N.
            *tensors: packed features of the buffers that are given, in order.

        Raises:
            ValueError: a tensor has another size, precision or layout than its buffer.
        """
        tables, kind = self._tables, self._matrices[0].tensor.dtype
        for tensor, size in zip(tensors, self.sizes(n_atoms), strict=True):
            if tensor.numel() != size or tensor.dtype != kind or not tensor.is_contiguous():
                raise ValueError(
                    f"a buffer of {size} numbers got {tuple(tensor.shape)}, {tensor.dtype}; "
                    f"expected as many, {kind} and contiguous"
                )
        dtype = str(kind).removeprefix("torch.")
        given = iter(tensors)
        addresses = np.array(
            [next(given).data_ptr() if own else 0 for own in self._given], dtype=np.int64
        )
        module = _module(dtype, self.sphere)
        call = partial(
            module.run, *tables.of_buffers, addresses, tables.home, tables.per_atom,
            *_of_products(self.sphere, dtype), n_atoms,
        )  # fmt: skip
        threads.run_range(call, n_atoms, serial=n_atoms * tables.n_weights < SERIAL)

    @cached_property
    def _given_per_atom(self) -> list[int]:
        pairs = zip(self._buffers, self._given, strict=True)
        return [buffer.per_atom for buffer, is_given in pairs if is_given]

    @cached_property
    def _tables(self) -> _Tables:
        most = max(len(buffer.channels) for buffer in self._buffers)
        widths = np.zeros((len(self._buffers), most), np.int64)
        before, home, total = np.zeros_like(widths), np.zeros(len(self._buffers), np.int64), 0
        for buffer, is_given in zip(self._buffers, self._given, strict=True):
            n = len(buffer.channels)
            widths[buffer.number, :n] = buffer.channels
            sizes = [(2 * degree + 1) * width for degree, width in enumerate(buffer.channels)]
            before[buffer.number, :n] = np.cumsum([0, *sizes])[:-1]
            if not is_given:
                home[buffer.number] = total
                total += buffer.per_atom
        n_weights = sum(matrix.shape.numel() for matrix in self._matrices)
        return _Tables((np.array(self._steps, np.int64), widths, before), home, total, n_weights)


@dataclass(frozen=True)
class _Tables:
    """What the compiled code reads: see ``node_program_text``."""

    of_buffers: tuple[np.ndarray, np.ndarray, np.ndarray]
    home: np.ndarray
    per_atom: int
    n_weights: int


def _firsts(channels: Sequence[int]) -> list[int]:
    return [sum(channels[:degree]) for degree in range(len(channels))]


def _of_products(products: PackedProducts | None, dtype: str) -> tuple[object, ...]:
    """Tables of the products, number of circles, channels of a factor."""
    if products is None:
        none = np.zeros(0, dtype)
        return none, none, 0, 0
    circles, to, back = tables(products, dtype)
    return to, back, circles, products.channels


@cache
def _module(dtype: str, products: PackedProducts | None) -> ModuleType:
    """Compiled code, from the cache on disk if it is there."""
    if products is None:
        return load(f"node_program_{dtype}", source_text(dtype, None, False))
    degrees = (products.lmax, products.lmax_out, products.order)
    text = source_text(dtype, degrees, products.channels % BLOCK[dtype] > 0)
    return load(f"node_program_{'_'.join(map(str, degrees))}_{dtype}", text)
