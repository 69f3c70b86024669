"""The tensor products that ``mlip bench tensor-products`` compares, with their inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlip.ops.tensor_products import (
    ClebschGordanProduct,
    Degrees,
    Factors,
    GauntProduct,
    LowRankProduct,
    SharedProduct,
    TensorProduct,
    VectorHarmonicProduct,
    coupled_paths,
    find_factors,
    published_rank,
)
from mlip.so3 import spherical_harmonics, wigner_matrices

FITTED = 3  # above, factors take minutes to find and are drawn at random: times do not depend on it
EDGES_TURNED = 100  # of which the equivariance error is taken
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """A product to be timed: its function of the inputs, and what it can express.

    inputs: makes them for a number of edges. expressivity is None where channels are mixed too;
    reached counts the paths. equivariance_error: under one rotation, or None. remark: what to know
    of it.
    """

    name: str
    function: Function
    inputs: Callable[[int], tuple[Tensor, ...]]
    expressivity: int | None
    reached: int
    equivariance_error: float | None
    remark: str = ""


def own_cases(lmax: int, channels: int, like: Tensor) -> Iterator[Case]:
    """Make the products of this package, and the official arrangement of the low-rank one."""
    degrees = Degrees(lmax, lmax, lmax)
    factors, fitted = _factors(lmax)
    products: dict[str, TensorProduct] = {
        "Clebsch–Gordan, weight per path": ClebschGordanProduct(degrees),
        "shared operator, exact": SharedProduct(degrees),
        "low rank, operator": LowRankProduct(factors),
        "low rank, factors": LowRankProduct(factors, "factors"),
        "Gaunt, grid": GauntProduct(degrees),
        "Gaunt, 2-D Fourier": GauntProduct(degrees, "fourier"),
        "vector harmonics": VectorHarmonicProduct(degrees),
    }
    for name, product in products.items():

        def inputs(edges: int, n: int = product.n_weights) -> tuple[Tensor, ...]:
            return make_inputs(lmax, channels, edges, n, like)

        low_rank = isinstance(product, LowRankProduct)
        known = fitted or not low_rank
        error = equivariance_error(product, inputs(EDGES_TURNED), lmax) if known else None
        about = product.expressivity, len(product.paths), error, "" if known else "random factors"
        yield Case(name, product, inputs, *about)
        if low_rank and product.evaluation == "factors":  # type: ignore[attr-defined]
            parts = [factor.to(like) for factor in factors]

            def published(x: Tensor, y: Tensor, w: Tensor, parts: Any = parts) -> Tensor:
                return torch.einsum("ir,jr,kr,eic,ejz,ezc->ekc", *parts, x, y, w)

            yield Case("low rank, one einsum", published, inputs, *about)


def e3nn_cases(lmax: int, channels: int, like: Tensor) -> Iterator[Case]:
    """Make the same products of e3nn, if it is installed, with inputs in its own layout."""
    if importlib.util.find_spec("e3nn") is None:
        return
    from e3nn import o3

    paths = coupled_paths(Degrees(lmax, lmax, lmax))
    features = o3.Irreps([(channels, (degree, 1)) for degree in range(lmax + 1)])
    harmonics = o3.Irreps([(1, (degree, 1)) for degree in range(lmax + 1)])
    instructions = [(l1, l2, l3, "uvu", True) for l1, l2, l3 in paths]
    by_path = o3.TensorProduct(
        features, harmonics, features, instructions, shared_weights=False, internal_weights=False
    ).to(like)
    mixing = o3.FullyConnectedTensorProduct(features, harmonics, features).to(like)

    def inputs(edges: int) -> tuple[Tensor, ...]:
        x, y, w = make_inputs(lmax, channels, edges, len(paths), like)
        parts = (_to_e3nn(x.detach(), lmax), y.detach().flatten(1), w.detach().flatten(1))
        return tuple(part.requires_grad_() for part in parts)

    def without_weights(edges: int) -> tuple[Tensor, ...]:
        return inputs(edges)[:2]

    for name, product, given, maps, remark in (
        ("e3nn, weight per path", by_path, inputs, len(paths), ""),
        ("e3nn, fully connected", mixing, without_weights, None, "mixes channels too"),
    ):

        def in_our_layout(x: Tensor, y: Tensor, *w: Tensor, product: Any = product) -> Tensor:
            out = product(_to_e3nn(x, lmax), y.flatten(1), *(part.flatten(1) for part in w))
            return _from_e3nn(out, lmax, channels)

        ours = make_inputs(lmax, channels, EDGES_TURNED, len(paths), like)
        error = equivariance_error(in_our_layout, ours[: len(given(1))], lmax)
        yield Case(name, product, given, maps, len(paths), error, remark)


def make_inputs(
    lmax: int, channels: int, edges: int, n_weights: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw features, harmonics of directions and weights, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    size = (lmax + 1) ** 2
    x = torch.randn(edges, size, channels, generator=generator)
    vectors = torch.randn(edges, 3, generator=generator, dtype=torch.float64)
    y = spherical_harmonics(lmax, vectors)[:, :, None]
    w = torch.randn(edges, n_weights, channels, generator=generator)
    x, y, w = (part.to(like).requires_grad_() for part in (x, y, w))
    return x, y, w


def equivariance_error(product: Function, inputs: tuple[Tensor, ...], lmax: int) -> float:
    """Relative error under one rotation of features [E, K, C] and harmonics [E, K, 1]."""
    x, y, *weights = (part.detach() for part in inputs)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    matrix = matrix * torch.linalg.det(matrix)
    wigner = torch.block_diag(*wigner_matrices(lmax, matrix))
    turned = [(wigner @ part.cpu().double()).to(part) for part in (x, y)]
    with torch.no_grad():
        expected = wigner @ product(x, y, *weights).cpu().double()
        found = product(*turned, *weights).cpu().double()
    return float((found - expected).norm() / expected.norm())


def _to_e3nn(x: Tensor, lmax: int) -> Tensor:
    """Lay [E, K, C] out degree by degree, coefficients last."""
    parts = x.split([2 * degree + 1 for degree in range(lmax + 1)], dim=1)
    return torch.cat([part.mT.flatten(1) for part in parts], dim=1)


def _from_e3nn(x: Tensor, lmax: int, channels: int) -> Tensor:
    sizes = [(2 * degree + 1) for degree in range(lmax + 1)]
    parts = x.split([channels * size for size in sizes], dim=1)
    return torch.cat([part.unflatten(1, (channels, -1)).mT for part in parts], dim=1)


def _factors(lmax: int) -> tuple[Factors, bool]:
    rank = published_rank(lmax)
    if lmax <= FITTED:
        return find_factors(lmax, rank), True
    generator = torch.Generator().manual_seed(0)
    shape = ((lmax + 1) ** 2, rank)
    a, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return Factors(a, b, c), False
