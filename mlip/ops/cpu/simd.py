"""Straight-line SIMD code inside Numba functions.

A function decorated with ``straight_line`` is run once, with a ``Writer`` as its first argument,
and what it asks of the writer becomes machine code: vectors of a fixed width, multiply-adds, loops.
Nothing is left to an auto-vectoriser, and hundreds of statements compile in a fraction of the time
that they would take as Numba statements.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mlip.ops.cpu import shuffles

INDEX = ir.IntType(64)


@cache
def register_bytes() -> int:
    """Width of the vector registers of this CPU."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


def lanes(dtype: str) -> int:
    """Numbers that one vector holds; on narrow machines two registers make a vector."""
    return max(register_bytes(), 32) // np.dtype(dtype).itemsize


class Int:
    """An integer of the generated code, with the operators of index arithmetic."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def _value(self, other: Int | int) -> ir.Value:
        return other.value if isinstance(other, Int) else ir.Constant(INDEX, other)

    def __add__(self, other: Int | int) -> Int:
        return Int(self.builder, self.builder.add(self.value, self._value(other)))

    def __mul__(self, other: Int | int) -> Int:
        return Int(self.builder, self.builder.mul(self.value, self._value(other)))

    def __sub__(self, other: Int | int) -> Int:
        return Int(self.builder, self.builder.sub(self.value, self._value(other)))

    __radd__, __rmul__ = __add__, __mul__


class Pointer:
    """The first element of an array."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def at(self, index: Int | int) -> ir.Value:
        """Address of an element."""
        value = index.value if isinstance(index, Int) else ir.Constant(INDEX, index)
        return self.builder.gep(self.value, [value])


class Accumulator:
    """A vector that is added to; lives in a register."""

    def __init__(self, writer: Writer, value: ir.Value) -> None:
        self.writer = writer
        with writer.builder.goto_entry_block():
            self.slot = writer.builder.alloca(writer.vector)
        writer.builder.store(value, self.slot)

    @property
    def value(self) -> ir.Value:
        return self.writer.builder.load(self.slot)

    def add(self, x: ir.Value, y: ir.Value) -> None:
        """Add x·y, rounded once."""
        self.writer.builder.store(self.writer.fma(x, y, self.value), self.slot)


class Writer:
    """Writes vector operations at the end of a function under construction."""

    def __init__(self, builder: ir.IRBuilder, dtype: str) -> None:
        self.builder = builder
        self.width = lanes(dtype)
        self.scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()
        self.vector = ir.VectorType(self.scalar, self.width)
        self.suffix = f"v{self.width}f{32 if dtype == 'float32' else 64}"
        self.align = np.dtype(dtype).itemsize
        self.mask: ir.Value | None = None  # lanes in use, where not all are

    def load(self, array: Pointer, index: Int | int) -> ir.Value:
        """Read consecutive numbers."""
        address = self.builder.bitcast(array.at(index), self.vector.as_pointer())
        if self.mask is None:
            return self.builder.load(address, align=self.align, typ=self.vector)
        return self._masked("load", self.vector, [address], [self.zero()])

    def store(self, array: Pointer, index: Int | int, value: ir.Value) -> None:
        """Write consecutive numbers."""
        address = self.builder.bitcast(array.at(index), self.vector.as_pointer())
        if self.mask is None:
            self.builder.store(value, address, align=self.align)
        else:
            self._masked("store", ir.VoidType(), [value, address], [])

    def stream(self, array: Pointer, index: Int | int, value: ir.Value) -> None:
        """Write consecutive numbers to a whole register's width in memory, past the caches."""
        address = self.builder.bitcast(array.at(index), self.vector.as_pointer())
        written = self.builder.store(value, address, align=register_bytes())
        one = self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        written.set_metadata("nontemporal", one)

    def prefetch(self, array: Pointer, index: Int | int, write: bool = False) -> None:
        """Ask for a cache line that will be read or written soon; any address will do."""
        address = self.builder.bitcast(array.at(index), ir.IntType(8).as_pointer())
        hints = [ir.Constant(ir.IntType(32), hint) for hint in (int(write), 2, 1)]
        self._call("llvm.prefetch.p0", ir.VoidType(), [address, *hints])

    def broadcast(self, array: Pointer, index: Int | int) -> ir.Value:
        """Read one number into all lanes."""
        return self._splat(self.builder.load(array.at(index), typ=self.scalar))

    def constant(self, value: float) -> ir.Value:
        """Return a number in all lanes, rounded to the precision of the code."""
        return ir.Constant(self.vector, [ir.Constant(self.scalar, value)] * self.width)

    def zero(self) -> ir.Value:
        """Return zeros."""
        return self.constant(0.0)

    def mul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return x·y."""
        return self.builder.fmul(x, y)

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return x + y."""
        return self.builder.fadd(x, y)

    def divide(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return x/y."""
        return self.builder.fdiv(x, y)

    def negative(self, x: ir.Value) -> ir.Value:
        """Return −x."""
        return self.builder.fneg(x)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """Return x·y + z, rounded once."""
        return self._call(f"llvm.fma.{self.suffix}", self.vector, [x, y, z])

    def accumulator(self, value: ir.Value) -> Accumulator:
        """Return a vector that later statements add to."""
        return Accumulator(self, value)

    def integer(self, array: Pointer, index: Int | int) -> Int:
        """Read an integer."""
        return Int(self.builder, self.builder.load(array.at(index), typ=INDEX))

    def opaque(self, value: Int) -> Int:
        """Return the same integer, of which the compiler then knows nothing.

        What is read at it inside a loop stays there; copies of many loop constants, made before it
        in full vectors, cost more than reading one number into all lanes.
        """
        kind = ir.FunctionType(INDEX, [INDEX])
        return Int(self.builder, self.builder.asm(kind, "", "=r,0", [value.value], True))

    def store_sum(self, array: Pointer, index: Int | int, value: ir.Value) -> None:
        """Write the sum over lanes, added pairwise in a fixed order."""
        total = shuffles.lane_sum(self.builder, value, self.width)
        self.builder.store(total, array.at(index), align=self.align)

    def add_sum(self, array: Pointer, index: Int | int, value: ir.Value) -> None:
        """Add the sum over lanes to one number."""
        address = array.at(index)
        before = self.builder.load(address, align=self.align, typ=self.scalar)
        total = self.builder.fadd(before, shuffles.lane_sum(self.builder, value, self.width))
        self.builder.store(total, address, align=self.align)

    def lane_sums(self, values: Sequence[ir.Value]) -> ir.Value:
        """Return a vector with the sum over lanes of each of ``lanes`` vectors, pairwise."""
        return shuffles.lane_sums(self.builder, values)

    @contextlib.contextmanager
    def loop(self, count: Int, start: int = 0, step: int = 1) -> Iterator[Int]:
        """Repeat the statements of the ``with`` block; gives the counter."""
        builder = self.builder
        before = builder.block
        head = builder.append_basic_block("loop")
        body = builder.append_basic_block("body")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        counter = builder.phi(INDEX)
        counter.add_incoming(ir.Constant(INDEX, start), before)
        last = builder.add(counter, ir.Constant(INDEX, step - 1))
        builder.cbranch(builder.icmp_signed("<", last, count.value), body, after)
        builder.position_at_end(body)
        yield Int(builder, counter)
        counter.add_incoming(builder.add(counter, ir.Constant(INDEX, step)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    def vectors(self, count: Int, partial: bool) -> Iterator[Int]:
        """Loop over whole vectors of ``count`` numbers; gives the first place of each.

        With ``partial`` the statements are written a second time for the numbers that are left.
        """
        with self.loop(count, step=self.width) as place:
            yield place
        if partial:
            place = self.remainder(count, self.width)
            self.use_lanes(count - place)
            yield place
            self.mask = None

    def use_lanes(self, count: Int, partial: bool = True) -> None:
        """From here on read zeros and write nothing beyond ``count`` lanes.

        Args:
            count: may be more than a vector holds.
            partial: if not, there are always as many lanes, and nothing is looked at.
        """
        if not partial:
            return
        kind = ir.VectorType(INDEX, self.width)
        numbers = ir.Constant(kind, [ir.Constant(INDEX, i) for i in range(self.width)])
        self.mask = self.builder.icmp_signed("<", numbers, self._splat(count.value))

    @contextlib.contextmanager
    def all_lanes(self) -> Iterator[None]:
        """Use all lanes for the statements of the ``with`` block."""
        mask, self.mask = self.mask, None
        yield
        self.mask = mask

    @contextlib.contextmanager
    def when(self, value: Int, constant: int) -> Iterator[None]:
        """Do the statements of the ``with`` block if an integer has this value."""
        builder = self.builder
        body = builder.append_basic_block("then")
        after = builder.append_basic_block("after")
        same = builder.icmp_signed("==", value.value, ir.Constant(INDEX, constant))
        builder.cbranch(same, body, after)
        builder.position_at_end(body)
        yield
        builder.branch(after)
        builder.position_at_end(after)

    def number(self, value: int) -> Int:
        """Return an integer constant, as loops take them."""
        return Int(self.builder, ir.Constant(INDEX, value))

    def transposed(self, values: Sequence[ir.Value]) -> list[ir.Value]:
        """Return the columns of the square matrix of which ``lanes`` vectors are the rows."""
        return shuffles.transposed(self.builder, values)

    def remainder(self, count: Int, step: int) -> Int:
        """Return the largest multiple of ``step`` (a power of two) within ``count``."""
        return Int(self.builder, self.builder.and_(count.value, ir.Constant(INDEX, -step)))

    @contextlib.contextmanager
    def loop_from(self, start: Int, count: Int, step: int = 1) -> Iterator[Int]:
        """Repeat for the counters ``start``, ``start`` + ``step``, … below ``count``."""
        length = Int(self.builder, self.builder.sub(count.value, start.value))
        with self.loop(length, step=step) as i:
            yield start + i

    def _splat(self, scalar: ir.Value) -> ir.Value:
        return shuffles.splat(self.builder, scalar, self.width)

    def _masked(
        self, name: str, result: ir.Type, first: list[ir.Value], last: list[ir.Value]
    ) -> ir.Value:
        """Read or write the lanes in use."""
        arguments = [*first, ir.Constant(ir.IntType(32), self.align), self.mask, *last]
        return self._call(f"llvm.masked.{name}.{self.suffix}.p0", result, arguments)

    def _call(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
        """Call a function of LLVM's own."""
        module = self.builder.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.builder.call(module.globals[name], arguments)


def straight_line(dtype: str) -> Callable[[Callable[..., None]], Any]:
    """Turn a function of a ``Writer`` and integers into one that Numba functions can call.

    Parameters in capitals are arrays of ``dtype`` given by address (``array.ctypes.data``), those
    that end in ``_index`` arrays of int64, all others integers. Arrays must not overlap.
    """

    def decorate(function: Callable[..., None]) -> Any:
        names = list(inspect.signature(function).parameters)[1:]

        def typing(context: Any, *arguments: Any) -> Any:  # noqa: ARG001
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
                callee = _define(builder.module, function, names, dtype)
                converted = [
                    builder.inttoptr(value, parameter.type)
                    if isinstance(parameter.type, ir.PointerType)
                    else value
                    for value, parameter in zip(values, callee.args, strict=True)
                ]
                builder.call(callee, converted)
                return context.get_dummy_value()

            return types.void(*[types.intp] * len(names)), generate

        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("context", *names)
        ]
        typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typing.__name__ = typing.__qualname__ = function.__name__
        return intrinsic(typing)

    return decorate


def _define(module: ir.Module, function: Callable[..., None], names: list[str], dtype: str) -> Any:
    """Write the function into a module, once."""
    name = f"{function.__module__}.{function.__name__}"
    if name in module.globals:
        return module.globals[name]
    scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()

    def kind(parameter: str) -> ir.Type:
        if parameter.endswith("_index"):
            return INDEX.as_pointer()
        return scalar.as_pointer() if parameter.isupper() else INDEX

    callee = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind(n) for n in names]), name)
    callee.linkage = "internal"
    callee.attributes.add("noinline")
    builder = ir.IRBuilder(callee.append_basic_block("entry"))
    arguments: list[Int | Pointer] = []
    for argument, parameter in zip(callee.args, names, strict=True):
        argument.name = parameter
        if isinstance(argument.type, ir.PointerType):
            argument.add_attribute("noalias")
            arguments.append(Pointer(builder, argument))
        else:
            arguments.append(Int(builder, argument))
    function(Writer(builder, dtype), *arguments)
    builder.ret_void()
    return callee
