"""What all tensor products share: shapes, reachable paths and the price of their freedom.

A product couples features x [E, (L1+1)², C] with y [E, (L2+1)², 1 or C], mostly the harmonics of an
edge, to [E, (L3+1)², C], channel by channel. Coefficients are degree-major (l² + l + m), channels
come last. Whatever the product, rotated inputs give the rotated output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.tables import table_like
from mlip.so3 import clebsch_gordan

Path = tuple[int, int, int]


class Degrees(NamedTuple):
    """Highest degrees of first input, second input and output."""

    first: int
    second: int
    out: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of coefficients (l+1)²."""
        return (self.first + 1) ** 2, (self.second + 1) ** 2, (self.out + 1) ** 2


def coupled_paths(degrees: Degrees) -> tuple[Path, ...]:
    """List all (l1, l2, l3) that couple, |l1 − l2| ≤ l3 ≤ l1 + l2, in lexicographic order."""
    return tuple(
        (l1, l2, l3)
        for l1 in range(degrees.first + 1)
        for l2 in range(degrees.second + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, degrees.out) + 1)
    )


@dataclass(frozen=True)
class TensorProduct(ABC):
    """A bilinear equivariant map with weights, z = x ⊗_w y.

    Attributes:
        degrees: highest degrees of x, y and z.
    """

    degrees: Degrees

    def __post_init__(self) -> None:
        if min(self.degrees) < 0:
            raise InputError(f"degrees are {tuple(self.degrees)}; expected 0 or more each")

    @property
    @abstractmethod
    def n_weights(self) -> int:
        """W, weights of one item and channel."""

    @abstractmethod
    def multiply(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Compute the product; shapes are checked already."""

    @abstractmethod
    def path_weights(self, weights: Tensor) -> Tensor:
        """Return the weights with which `ClebschGordanProduct` gives the same map.

        Args:
            weights: [E, W, C].

        Returns:
            [E, P, C], one for each of ``coupled_paths(degrees)``, 0 where a path is out of reach.
        """

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: [E, (L1+1)², C].
            y: [E, (L2+1)², 1] or [E, (L2+1)², C].
            weights: [E, W, C], or 1 in place of E.

        Returns:
            [E, (L3+1)², C].

        Raises:
            InputError: shapes do not fit.
        """
        first, second, _ = self.degrees.sizes
        wanted = (x.shape[0], first, x.shape[-1]), second, self.n_weights
        if (
            tuple(x.shape) != wanted[0]
            or y.shape[:2] != (x.shape[0], second)
            or y.shape[2:] not in ((1,), x.shape[2:])
            or weights.shape[1:] != (self.n_weights, x.shape[-1])
            or weights.shape[0] not in (1, x.shape[0])
        ):
            raise InputError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)} and weights {tuple(weights.shape)} do not "
                f"fit: expected [E, {first}, C], [E, {second}, 1 or C] and "
                f"[E or 1, {self.n_weights}, C]"
            )
        return self.multiply(x, y, weights)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Paths that some choice of weights reaches (interactability)."""
        reached = self.path_weights(self._generic_weights()).abs()[0, :, 0]
        every = coupled_paths(self.degrees)
        return tuple(path for path, size in zip(every, reached, strict=True) if size > 1e-9)

    @cached_property
    def expressivity(self) -> int:
        """Dimension of the equivariant bilinear maps within reach, for one channel.

        Weights of the product and equivariant linear maps before and after it, a factor for each
        degree, span it (Xie et al., arXiv 2506.13523); found as the generic rank of the Jacobian
        of the path weights.
        """
        every = coupled_paths(self.degrees)
        columns = [torch.tensor([path[i] for path in every]) for i in range(3)]
        own = self._generic_weights()
        factors = [_generic(degree + 1, seed=i) for i, degree in enumerate(self.degrees)]

        def reach(weights: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            outer = a[columns[0]] * b[columns[1]] * c[columns[2]]
            return self.path_weights(weights)[0, :, 0] * outer

        blocks = torch.autograd.functional.jacobian(reach, (own, *factors))
        jacobian = torch.cat([block.flatten(1) for block in blocks], dim=1)
        return int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))

    def _generic_weights(self) -> Tensor:
        return _generic(self.n_weights, seed=9)[None, :, None]


def degree_of(lmax: int) -> Tensor:
    """Degree of each coefficient, [(L+1)²] int64."""
    return torch.cat([torch.full((2 * degree + 1,), degree) for degree in range(lmax + 1)])


def scale_degrees(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply each degree of [E, (L+1)², C] with its own weight of [E, L+1, C]."""
    index = table_like(torch.empty(0, dtype=torch.int64, device=x.device), degree_of, x_lmax(x))
    return x * weights.index_select(1, index)


def x_lmax(x: Tensor) -> int:
    """Highest degree of features [E, (L+1)², C]."""
    return round(x.shape[1] ** 0.5) - 1


def coupling_tensor(degrees: Degrees) -> Tensor:
    """Sum the Clebsch–Gordan tensors of all paths, unit norm each, into one [d1, d2, d3]."""
    total = torch.zeros(degrees.sizes, dtype=torch.float64)
    for path in coupled_paths(degrees):
        total[block(path)] = clebsch_gordan(*path)
    return total


def block(path: Path) -> tuple[slice, ...]:
    """Where a path lies in a tensor [d1, d2, d3]."""
    return tuple(slice(degree**2, (degree + 1) ** 2) for degree in path)


def tensor_path_weights(tensor: Tensor, degrees: Degrees) -> Tensor:
    """Project a bilinear map [d1, d2, d3] on the unit-norm paths, [P]."""
    weights = [(tensor[block(p)] * clebsch_gordan(*p)).sum() for p in coupled_paths(degrees)]
    return torch.stack(weights)


def _generic(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
