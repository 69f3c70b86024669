"""Real spherical harmonics as polynomials, exact in every derivative.

Order and signs are those of e3nn: y is the polar axis, degree 1 is (x, y, z), index l² + l + m.
Nothing here knows of graphs or features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlip.errors import InputError


def spherical_harmonics(lmax: int, vectors: Tensor, *, normalize: bool = True) -> Tensor:
    """Evaluate the real spherical harmonics of degrees 0 to ``lmax``.

    Component normalisation: the 2l+1 components of degree l have squared norm 2l+1 on the unit
    sphere. Every component is evaluated as a polynomial in x, y, z,

        Y[l, m] = p[l, |m|](y, r²) · {Im (z + ix)^|m| for m < 0, Re (z + ix)^m for m ≥ 0},

    with the three-term recurrence of the associated Legendre functions in l, so nothing is
    special at the poles.

    Args:
        lmax: highest degree.
        vectors: [..., 3], of any length and unit.
        normalize: take the direction of each vector. A zero vector (or one whose squared length
            underflows) then has Y[0] = 1, all else 0, and zero derivatives of any order.
            If false the result is the solid harmonics r^l Y[l], homogeneous polynomials.

    Returns:
        [..., (lmax+1)²] in the dtype and on the device of ``vectors``.

    Raises:
        InputError: ``lmax`` is negative or ``vectors`` are not floating-point [..., 3].
    """
    if lmax < 0:
        raise InputError(f"lmax is {lmax}; the highest degree must be 0 or more")
    if vectors.ndim == 0 or vectors.shape[-1] != 3:
        raise InputError(f"vectors have shape {tuple(vectors.shape)}; expected [..., 3]")
    if not vectors.is_floating_point():
        raise InputError(f"vectors have dtype {vectors.dtype}; expected a floating-point dtype")
    if lmax == 0:
        return torch.ones_like(vectors[..., :1])
    components = vectors.movedim(-1, 0).contiguous()  # [3, ...]: long contiguous rows
    r2 = components.square().sum(0)
    if normalize:
        zero = r2 < torch.finfo(r2.dtype).tiny
        components = components * r2.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)
        # 1 up to rounding, and 0 for a zero vector: the polynomials stay homogeneous, which keeps
        # the error of high degrees small; it is constant, hence no derivative.
        r2 = components.detach().square().sum(0)
    x, y, z = components.unbind(0)
    return torch.stack(_polynomials(lmax, x, y, z, r2), dim=-1)


def _polynomials(lmax: int, x: Tensor, y: Tensor, z: Tensor, r2: Tensor) -> list[Tensor]:
    """List the components in the order l² + l + m."""
    result: list[Tensor] = [x] * (lmax + 1) ** 2
    result[0] = torch.ones_like(x)
    sine, cosine = x, z  # Im and Re of (z + ix)^m
    square = 1.0  # of the factor of order m in degree m
    for m in range(lmax + 1):
        if m == 2:
            sine, cosine = 2 * (x * z), (z - x) * (z + x)
        elif m > 2:
            sine, cosine = x * cosine + z * sine, z * cosine - x * sine
        if m > 0:
            square *= (2 * m + 1) / (2 * m) * (2 if m == 1 else 1)
            result[m * m] = math.sqrt(square) * sine
            result[m * m + 2 * m] = math.sqrt(square) * cosine
        _raise_degree(result, lmax, m, y, r2)
    return result


def _raise_degree(result: list[Tensor], lmax: int, m: int, y: Tensor, r2: Tensor) -> None:
    """Fill degrees m+1 to ``lmax`` of the orders ±m from degree m, by

    Y[l] = sqrt((4l²−1)/(l²−m²)) · (y Y[l−1] − sqrt(((l−1)²−m²)/(4(l−1)²−1)) r² Y[l−2]).
    """
    for degree in range(m + 1, lmax + 1):
        rise = math.sqrt((4 * degree**2 - 1) / (degree**2 - m**2))
        if degree > m + 1:
            below = (degree - 1) ** 2
            drop = (rise * math.sqrt((below - m**2) / (4 * below - 1))) * r2
        step = rise * y
        for order in {m, -m}:
            here = degree**2 + degree + order
            value = step if degree == 1 else step * result[here - 2 * degree]
            if degree > m + 1:
                value = value - (drop if degree == 2 else drop * result[here - 4 * degree + 2])
            result[here] = value
