"""Frames of edges: features rotated so that the edge is the polar axis, orders |m| ≤ mmax kept.

After the reduction of SO(3) to SO(2) convolutions (Passaro and Zitnick, arXiv 2302.03655). Wigner
matrices are stored as dense rows over all degrees, in the order that the next layer reads: in plain
PyTorch one small product an edge is as fast as one for each degree and the copies that sort their
rows. Compiled code (``mlip.ops.rotation``) reads the nonzero blocks alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlip.ops import table_like
from mlip.so3 import degree_major, order_major, rotation_to_axis, wigner_matrices

POLE = 0.999999  # |cos| to the polar axis beyond which the published model freezes a direction


class EdgeFrames(NamedTuple):
    """Rotations of E edges, which all layers share; K = (lmax+1)², n coefficients are kept.

    matrix: [E, n, K] Wigner matrices into the frames, rows order-major.
    rescale: [K], √((2l+1)/(2 mmax+1)) where l > mmax, otherwise 1: makes up on the way back for the
        orders left out.
    degrees: [n], degree of each order-major coefficient.
    """

    matrix: Tensor
    rescale: Tensor
    degrees: Tensor

    def rotate_back_axial(self, x: Tensor) -> Tensor:
        """Turn features with m = 0 alone, [E, lmax+1, C], back: [E, K, C]."""
        return (self.matrix[:, : x.shape[1]].mT @ x) * self.rescale[:, None]


class EdgeFrameBuilder(nn.Module):
    """Build the frames of edges.

    Args:
        lmax: highest degree of the features.
        mmax: highest order |m| that is kept in the frames.
        freeze_poles: treat edges within 1.4 mrad of ±y as the published code does in gradient
            mode: their direction is replaced by ±y and passes no derivative. Otherwise values and
            derivatives are exact in every direction.
    """

    to_orders: Tensor
    degrees: Tensor

    def __init__(self, lmax: int, mmax: int, freeze_poles: bool = False) -> None:
        super().__init__()
        self.lmax, self.mmax, self.freeze_poles = lmax, mmax, freeze_poles
        sorted_, orders = degree_major(lmax, mmax), order_major(lmax, mmax)
        tables = {
            "to_orders": [sorted_.index(pair) for pair in orders],
            "degrees": [degree for degree, _ in orders],
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table), persistent=False)

    def forward(self, vectors: Tensor) -> EdgeFrames:
        """Compute the Wigner matrices that carry each edge [E, 3] to the y axis."""
        if self.freeze_poles:
            vectors = frozen_at_poles(vectors)
        return self.from_rotations(rotation_to_axis(vectors))

    def from_rotations(self, rotations: Tensor) -> EdgeFrames:
        """Compute the Wigner matrices of rotations [E, 3, 3] into the frames."""
        size, rows = (self.lmax + 1) ** 2, []
        for degree, matrix in enumerate(wigner_matrices(self.lmax, rotations)):
            cut = max(0, degree - self.mmax)
            kept = matrix[:, cut : 2 * degree + 1 - cut]
            rows.append(nn.functional.pad(kept, (degree**2, size - (degree + 1) ** 2)))
        return EdgeFrames(
            torch.cat(rows, dim=1).index_select(1, self.to_orders),
            table_like(rotations, _rescale, self.lmax, self.mmax),
            self.degrees,
        )


def _rescale(lmax: int, mmax: int) -> Tensor:
    degrees = torch.tensor([degree for degree, _ in degree_major(lmax, lmax)])
    return torch.sqrt((2.0 * degrees.double() + 1) / (2 * mmax + 1)).clamp(min=1.0)


def frozen_at_poles(vectors: Tensor) -> Tensor:
    """Replace vectors [E, 3] within 1.4 mrad of ±y by constants ±e_y (published behaviour)."""
    cosine = vectors.detach()[:, 1] / torch.linalg.vector_norm(vectors.detach(), dim=1)
    axis = torch.zeros_like(vectors.detach())
    axis[:, 1] = cosine.sign()
    return torch.where((cosine.abs() > POLE)[:, None], axis, vectors)
