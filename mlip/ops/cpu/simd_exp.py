"""The exponential function in vector instructions."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from mlip.ops.cpu.simd import Writer


def exp(k: Writer, x: ir.Value) -> ir.Value:
    """Return exp x to about a unit in the last place, for x cut to what the precision holds.

    exp x = 2^n exp r with n = round(x / ln 2): n is added to the exponent of 1, exp r is a
    Taylor series.
    """
    single = isinstance(k.scalar, ir.FloatType)
    bits, most, degree = (23, 87.0, 7) if single else (52, 708.0, 13)
    for sign, bound in ((">", most), ("<", -most)):
        limit = k.constant(bound)
        x = k.builder.select(k.builder.fcmp_ordered(sign, x, limit), limit, x)
    big = k.constant(1.5 * 2.0**bits)  # the last bits of big + n are those of n
    shifted = k.fma(x, k.constant(1 / math.log(2)), big)
    n = k.builder.fsub(shifted, big)
    high = float(np.float32(math.log(2))) if single else math.log(2)
    low = math.log(2) - high if single else 2.3190468138462996e-17
    minus = k.negative(n)
    r = k.fma(minus, k.constant(low), k.fma(minus, k.constant(high), x))
    value = k.constant(1 / math.factorial(degree))
    for power in reversed(range(degree)):
        value = k.fma(value, r, k.constant(1 / math.factorial(power)))
    whole = ir.VectorType(ir.IntType(32 if single else 64), k.width)
    shift = ir.Constant(whole, [bits] * k.width)
    raised = k.builder.shl(k.builder.bitcast(shifted, whole), shift)
    one = k.builder.bitcast(k.constant(1.0), whole)
    scale = k.builder.bitcast(k.builder.add(raised, one), k.vector)
    return k.mul(value, scale)
