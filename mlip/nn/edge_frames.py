"""Frames of edges: features rotated so that the edge is the polar axis, orders |m| ≤ mmax kept.

After the reduction of SO(3) to SO(2) convolutions (Passaro and Zitnick, arXiv 2302.03655). Wigner
matrices act degree by degree, so the zeros between degrees are never stored or multiplied.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlip.so3 import degree_major, order_major, rotation_to_axis, wigner_matrices

POLE = 0.999999  # |cos| to the polar axis beyond which the published model freezes a direction


class EdgeFrames(NamedTuple):
    """Wigner matrices of E edges, which all layers share; K = (lmax+1)², n coefficients are kept.

    to_frame: [E, n_l, 2l+1] for each degree, the rows with |m| ≤ mmax.
    from_frame: [E, 2l+1, n_l] for each degree, the transpose times √((2l+1)/(2 mmax+1)) where
        l > mmax, which makes up for the orders left out.
    to_orders, to_degrees: [n], permutations from degree-major to order-major and back.
    degrees: [n], degree of each order-major coefficient.
    """

    to_frame: tuple[Tensor, ...]
    from_frame: tuple[Tensor, ...]
    to_orders: Tensor
    to_degrees: Tensor
    degrees: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Turn features [E, K, C] into the frames: [E, n, C], order-major."""
        parts = x.split([matrix.shape[2] for matrix in self.to_frame], dim=1)
        local = [matrix @ part for matrix, part in zip(self.to_frame, parts, strict=True)]
        return torch.cat(local, dim=1).index_select(1, self.to_orders)

    def rotate_back(self, x: Tensor) -> Tensor:
        """Turn features [E, n, C] of the frames back: [E, K, C]."""
        sorted_ = x.index_select(1, self.to_degrees)
        parts = sorted_.split([matrix.shape[2] for matrix in self.from_frame], dim=1)
        turned = [matrix @ part for matrix, part in zip(self.from_frame, parts, strict=True)]
        return torch.cat(turned, dim=1)

    def rotate_back_axial(self, x: Tensor) -> Tensor:
        """Turn features with m = 0 alone, [E, lmax+1, C], back: [E, K, C]."""
        turned = [
            matrix[:, :, matrix.shape[2] // 2, None] * x[:, degree, None, :]
            for degree, matrix in enumerate(self.from_frame)
        ]
        return torch.cat(turned, dim=1)


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
    to_degrees: Tensor
    degrees: Tensor

    def __init__(self, lmax: int, mmax: int, freeze_poles: bool = False) -> None:
        super().__init__()
        self.lmax, self.mmax, self.freeze_poles = lmax, mmax, freeze_poles
        sorted_, orders = degree_major(lmax, mmax), order_major(lmax, mmax)
        tables = {
            "to_orders": [sorted_.index(pair) for pair in orders],
            "to_degrees": [orders.index(pair) for pair in sorted_],
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
        matrices = wigner_matrices(self.lmax, rotations)
        to_frame, from_frame = [], []
        for degree, matrix in enumerate(matrices):
            cut = max(0, degree - self.mmax)
            kept = matrix[:, cut : 2 * degree + 1 - cut]
            scale = math.sqrt((2 * degree + 1) / (2 * self.mmax + 1)) if cut else 1.0
            to_frame.append(kept)
            from_frame.append(kept.mT * scale if cut else kept.mT)
        return EdgeFrames(
            tuple(to_frame), tuple(from_frame), self.to_orders, self.to_degrees, self.degrees
        )


def frozen_at_poles(vectors: Tensor) -> Tensor:
    """Replace vectors [E, 3] within 1.4 mrad of ±y by constants ±e_y (published behaviour)."""
    cosine = vectors.detach()[:, 1] / torch.linalg.vector_norm(vectors.detach(), dim=1)
    axis = torch.zeros_like(vectors.detach())
    axis[:, 1] = cosine.sign()
    return torch.where((cosine.abs() > POLE)[:, None], axis, vectors)
