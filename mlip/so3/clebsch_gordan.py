"""Clebsch–Gordan (Wigner 3j) tensors in the real basis of the spherical harmonics."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mlip.errors import InputError


def clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    """Return the invariant tensor that couples degrees ``l1`` and ``l2`` to ``l3``.

    Complex coefficients come from Racah's formula in exact integers and are turned to the real
    basis; with the phase (−i)^l on degree l all are real. Order and sign are those of e3nn
    ``o3.wigner_3j``; the Frobenius norm is 1.

    Args:
        l1: first degree.
        l2: second degree.
        l3: third degree, |l1 − l2| ≤ l3 ≤ l1 + l2.

    Returns:
        float64 [2 l1 + 1, 2 l2 + 1, 2 l3 + 1]; a fresh tensor at each call.

    Raises:
        InputError: a degree is negative or the three break the triangle rule.
    """
    if min(l1, l2, l3) < 0 or not abs(l1 - l2) <= l3 <= l1 + l2:
        raise InputError(
            f"degrees ({l1}, {l2}, {l3}) do not couple: expected |l1 - l2| <= l3 <= l1 + l2"
        )
    return torch.from_numpy(_real_coefficients(l1, l2, l3).copy())


@cache
def _real_coefficients(l1: int, l2: int, l3: int) -> np.ndarray:
    coupled = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
            value = _racah(l1, m1, l2, m2, l3)
            coupled[l1 + m1, l2 + m2, l3 + m1 + m2] = value
    real = np.einsum(
        "abc,ai,bj,ck->ijk",
        coupled,
        _real_basis(l1),
        _real_basis(l2),
        _real_basis(l3).conj(),
    ).real
    return real / math.sqrt(2 * l3 + 1)


def _racah(l1: int, m1: int, l2: int, m2: int, l3: int) -> float:
    """Return ⟨l1 m1 l2 m2 | l3 m1+m2⟩ (Racah 1942, eq. 16), the sum and the square exact."""
    f = math.factorial
    m3 = m1 + m2
    total = Fraction(0)
    for k in range(max(0, l2 - l3 - m1, l1 - l3 + m2), min(l1 + l2 - l3, l1 - m1, l2 + m2) + 1):
        total += Fraction(
            (-1) ** k,
            f(k)
            * f(l1 + l2 - l3 - k)
            * f(l1 - m1 - k)
            * f(l2 + m2 - k)
            * f(l3 - l2 + m1 + k)
            * f(l3 - l1 - m2 + k),
        )
    square = (
        total
        * total
        * Fraction(
            (2 * l3 + 1)
            * f(l3 + l1 - l2)
            * f(l3 - l1 + l2)
            * f(l1 + l2 - l3)
            * f(l3 + m3)
            * f(l3 - m3)
            * f(l1 - m1)
            * f(l1 + m1)
            * f(l2 - m2)
            * f(l2 + m2),
            f(l1 + l2 + l3 + 1),
        )
    )
    return math.copysign(math.sqrt(square), total)


def _real_basis(degree: int) -> np.ndarray:
    """Return the unitary matrix [complex order, real order] with the phase (−i)^l."""
    matrix = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=complex)
    matrix[degree, degree] = 1
    for m in range(1, degree + 1):
        sign = (-1) ** m
        matrix[degree - m, [degree + m, degree - m]] = math.sqrt(0.5), -1j * math.sqrt(0.5)
        matrix[degree + m, [degree + m, degree - m]] = (
            sign * math.sqrt(0.5),
            1j * sign * math.sqrt(0.5),
        )
    return (-1j) ** degree * matrix
