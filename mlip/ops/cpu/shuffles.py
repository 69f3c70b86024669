"""Instructions that move numbers between the lanes of vectors, for ``simd.py``.

A vector of n lanes is shuffled by numbers below 2n: lanes of the first of two vectors, then of the
second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llvmlite import ir

NUMBER = ir.IntType(32)


def splat(builder: ir.IRBuilder, scalar: ir.Value, width: int) -> ir.Value:
    """Return a number in all lanes."""
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(NUMBER, 0))
    return builder.shuffle_vector(first, undefined, _order([0] * width))


def lane_sum(builder: ir.IRBuilder, value: ir.Value, width: int) -> ir.Value:
    """Return the sum over lanes, a number, added pairwise in a fixed order."""
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(value, value, _order(part))
            for part in (range(width), range(width, 2 * width))
        ]
        value = builder.fadd(*halves)
    return builder.extract_element(value, ir.Constant(NUMBER, 0))


def lane_sums(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    """Return a vector with the sums over lanes of as many vectors as it has lanes, pairwise."""
    width = len(values)
    half = width // 2
    while half:
        starts = [i for i in range(width) if i % (2 * half) < half]
        low, high = (
            _order(
                i + offset + other * width
                for block in range(0, width, 2 * half)
                for other in (0, 1)
                for i in starts
                if i // (2 * half) == block // (2 * half)
            )
            for offset in (0, half)
        )
        n = len(values) // 2
        values = [
            builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
            for a, b in zip(values[:n], values[n:], strict=True)
        ]
        half //= 2
    return values[0]


def transposed(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the columns of the square matrix of which the vectors are the rows."""
    rows, width = list(values), len(values)
    half = width // 2
    while half:
        low, high = (
            _order(i + offset if not i & half else i - half + offset + width for i in range(width))
            for offset in (0, half)
        )
        for i in range(width):
            if not i & half:
                a, b = rows[i], rows[i + half]
                rows[i] = builder.shuffle_vector(a, b, low)
                rows[i + half] = builder.shuffle_vector(a, b, high)
        half //= 2
    return rows


def _order(lanes: Iterable[int]) -> ir.Constant:
    numbers = list(lanes)
    return ir.Constant(ir.VectorType(NUMBER, len(numbers)), numbers)
