"""Wigner matrices of rotations and frames of edges, without Euler angles and without poles.

Both are polynomials or well-conditioned rational functions of their input, so derivatives of any
order exist and are exact everywhere, edges along ±y included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.so3.clebsch_gordan import clebsch_gordan


def wigner_matrices(lmax: int, rotation: Tensor) -> list[Tensor]:
    """Return the matrices that rotate the real spherical harmonics of degrees 0 to ``lmax``.

    With C the Clebsch–Gordan tensor of (l−1, 1, l), D[0] = 1, D[1] = R and

        D[l] = (2l+1) C · (D[l−1] ⊗ R) · C.

    Then Y[l](R v) = D[l] Y[l](v) and D[l](R S) = D[l](R) D[l](S), improper R included
    (D[l](−R) = (−1)^l D[l](R)).

    Args:
        lmax: highest degree.
        rotation: [..., 3, 3] orthogonal matrices that act on column vectors (x, y, z).

    Returns:
        lmax + 1 tensors; number l is [..., 2l+1, 2l+1].

    Raises:
        InputError: ``lmax`` is negative or ``rotation`` is not floating-point [..., 3, 3].
    """
    if lmax < 0:
        raise InputError(f"lmax is {lmax}; the highest degree must be 0 or more")
    if rotation.shape[-2:] != (3, 3) or not rotation.is_floating_point():
        raise InputError(
            f"rotation has shape {tuple(rotation.shape)} and dtype {rotation.dtype}; "
            "expected a floating-point dtype and [..., 3, 3]"
        )
    batch = rotation.shape[:-2]
    matrices = [rotation.new_ones((*batch, 1, 1)), rotation][: lmax + 1]
    for degree in range(2, lmax + 1):
        k = 2 * degree + 1
        coupling = clebsch_gordan(degree - 1, 1, degree).to(rotation)  # [k−2, 3, k]
        half = matrices[-1].mT @ coupling.flatten(1)  # [..., k−2, 3·k]
        half = rotation.mT.unsqueeze(-3) @ half.unflatten(-1, (3, k))  # [..., k−2, 3, k]
        matrices.append(half.flatten(-3, -2).mT @ (k * coupling).flatten(0, 1))
    return matrices


def rotation_to_axis(vectors: Tensor) -> Tensor:
    """Return a rotation R of each vector v with R v = |v| e_y, the frame of an edge.

    For y ≥ 0 it is the shortest rotation to +y; for y < 0 the half turn about x comes first. The
    denominator 1 + |y|/r is never below 1, so values and derivatives of any order are finite
    everywhere. Crossing the plane y = 0 turns the frame about the edge: what is computed in it
    must not depend on that roll, as rotation-invariant models do not.

    Args:
        vectors: [..., 3], of any length. A zero vector gets the identity with zero derivatives.

    Returns:
        [..., 3, 3] proper rotations.

    Raises:
        InputError: ``vectors`` are not floating-point [..., 3].
    """
    if vectors.ndim == 0 or vectors.shape[-1] != 3 or not vectors.is_floating_point():
        raise InputError(
            f"vectors have shape {tuple(vectors.shape)} and dtype {vectors.dtype}; "
            "expected a floating-point dtype and [..., 3]"
        )
    r2 = vectors.square().sum(-1, keepdim=True)
    zero = r2 < torch.finfo(r2.dtype).tiny
    inverse = r2.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)
    x, y, z = (vectors * inverse).unbind(-1)
    y = y.masked_fill(zero.squeeze(-1), 1.0)
    sign = torch.ones_like(y).masked_fill(y < 0, -1.0)
    factor = 1 / (1 + sign * y)
    xz = -x * z * factor
    rows = (
        (1 - x * x * factor, -sign * x, xz),
        (x, y, z),
        (sign * xz, -z, sign * (1 - z * z * factor)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
