"""Tensor products against Clebsch–Gordan sums of e3nn, functions on the sphere and each other."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3

from mlip.errors import InputError
from mlip.ops import operator_apply
from mlip.ops.tensor_products import (
    ClebschGordanProduct,
    Degrees,
    Factors,
    GauntProduct,
    LowRankProduct,
    SharedProduct,
    VectorHarmonicProduct,
    coupled_paths,
)
from mlip.ops.tensor_products.interface import coupling_tensor
from mlip.so3 import wigner_matrices
from tests.finite_differences import rotation

DOUBLE = torch.float64
DEGREES = [Degrees(1, 1, 1), Degrees(2, 2, 2), Degrees(1, 2, 3), Degrees(3, 2, 1), Degrees(0, 2, 2)]


def full_rank_factors(lmax):
    """Exact factors, one term for each entry of the tensor that is not zero."""
    tensor = coupling_tensor(Degrees(lmax, lmax, lmax))
    entries = tensor.nonzero()
    one_hot = [
        torch.nn.functional.one_hot(column, len(tensor)).T.to(DOUBLE) for column in entries.T
    ]
    return Factors(one_hot[0], one_hot[1], one_hot[2] * tensor[tuple(entries.T)])


def products(degrees):
    found = [
        ClebschGordanProduct(degrees),
        SharedProduct(degrees),
        GauntProduct(degrees),
        GauntProduct(degrees, "fourier"),
        VectorHarmonicProduct(degrees),
    ]
    if len(set(degrees)) == 1:
        factors = full_rank_factors(degrees.first)
        found += [LowRankProduct(factors), LowRankProduct(factors, "factors")]
    return found


def name(value):
    if isinstance(value, Degrees):
        return "".join(map(str, value))
    kind = getattr(value, "method", getattr(value, "evaluation", ""))
    return f"{type(value).__name__}-{kind}-{name(value.degrees)}"


ALL = [product for degrees in DEGREES for product in products(degrees)]
SMALL = [product for degrees in DEGREES[:1] for product in products(degrees)]


def inputs(product, n_items=4, channels=3, second_channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second, _ = product.degrees.sizes
    shapes = (first, channels), (second, second_channels), (product.n_weights, channels)
    return [torch.randn(n_items, *s, generator=generator, dtype=DOUBLE) for s in shapes]


def by_e3nn(degrees, x, y, weights):
    """Sum all paths with e3nn's tensors, one item and channel layout of ours."""
    out = torch.zeros(x.shape[0], degrees.sizes[2], x.shape[2], dtype=DOUBLE)
    for i, (l1, l2, l3) in enumerate(coupled_paths(degrees)):
        coupled = torch.einsum(
            "ijk,eic,ejc->ekc",
            o3.wigner_3j(l1, l2, l3, dtype=DOUBLE),
            x[:, l1**2 : (l1 + 1) ** 2],
            y[:, l2**2 : (l2 + 1) ** 2].expand(-1, -1, x.shape[2]),
        )
        out[:, l3**2 : (l3 + 1) ** 2] += weights[:, i, None] * coupled
    return out


@pytest.mark.parametrize("product", ALL, ids=name)
@pytest.mark.parametrize("second_channels", [1, 3])
def test_product_is_the_sum_of_paths_of_e3nn(product, second_channels):
    x, y, weights = inputs(product, second_channels=second_channels)
    expected = by_e3nn(product.degrees, x, y, product.path_weights(weights))
    torch.testing.assert_close(product(x, y, weights), expected, rtol=0, atol=1e-7)
    # e3nn's tables are good to 1e-8 or so; ours to rounding
    full = ClebschGordanProduct(product.degrees)
    torch.testing.assert_close(
        product(x, y, weights), full(x, y, product.path_weights(weights)), rtol=0, atol=1e-11
    )


def test_full_product_is_the_tensor_product_of_e3nn():
    degrees, channels = Degrees(2, 2, 2), 3
    product = ClebschGordanProduct(degrees)
    x, y, weights = inputs(product, channels=channels)
    irreps = o3.Irreps([(channels, (degree, 1)) for degree in range(3)])
    instructions = [(l1, l2, l3, "uvu", True) for l1, l2, l3 in coupled_paths(degrees)]
    harmonics = o3.Irreps([(1, (degree, 1)) for degree in range(3)])
    module = o3.TensorProduct(
        irreps,
        harmonics,
        irreps,
        instructions,
        irrep_normalization="none",
        path_normalization="none",
        shared_weights=False,
        internal_weights=False,
    ).to(DOUBLE)

    def to_e3nn(features):
        parts = features.split([1, 3, 5], dim=1)
        return torch.cat([part.transpose(1, 2).flatten(1) for part in parts], dim=1)

    found = module(to_e3nn(x), to_e3nn(y), weights.flatten(1))
    torch.testing.assert_close(to_e3nn(product(x, y, weights)), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("product", ALL, ids=name)
def test_rotated_inputs_give_the_rotated_output(product):
    x, y, weights = inputs(product, seed=1)
    matrix = torch.from_numpy(rotation(3))
    first, second, out = (
        torch.block_diag(*wigner_matrices(degree, matrix)) for degree in product.degrees
    )
    found = product(first @ x, second @ y, weights)
    torch.testing.assert_close(found, out @ product(x, y, weights), rtol=0, atol=1e-11)


@pytest.mark.parametrize("product", SMALL, ids=name)
@pytest.mark.parametrize("second_channels", [1, 2])
def test_first_and_second_derivatives(product, second_channels):
    arguments = inputs(product, n_items=2, channels=2, second_channels=second_channels)
    for argument in arguments:
        argument.requires_grad_(True)
    assert torch.autograd.gradcheck(product, arguments)
    assert torch.autograd.gradgradcheck(product, arguments)


@pytest.mark.parametrize("method", ["grid", "fourier"])
def test_gaunt_product_multiplies_functions(method):
    """With all output degrees nothing is cut: f(n) g(n) at any point, harmonics of e3nn."""
    degrees = Degrees(2, 3, 5)
    x, y, _ = inputs(GauntProduct(degrees, method))
    ones = torch.ones(1, GauntProduct(degrees).n_weights, 3, dtype=DOUBLE)
    z = GauntProduct(degrees, method)(x, y, ones)
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    f, g, product = (values(part, points) for part in (x, y, z))
    torch.testing.assert_close(product, f * g, rtol=0, atol=1e-10)


def test_vector_harmonic_product_adds_the_cross_product_of_gradients():
    degrees = Degrees(2, 3, 4)  # l1 + l2 − 1: nothing is cut
    product = VectorHarmonicProduct(degrees)
    x, y, _ = inputs(product)
    weights = torch.ones(1, product.n_weights, 3, dtype=DOUBLE)
    weights[:, : product.n_weights // 2] = 0
    z = product(x, y, weights)
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    points = torch.nn.functional.normalize(points, dim=1)
    slopes = []
    for part in (x, y.expand(-1, -1, 3)):
        at = points.clone().requires_grad_(True)
        rows = [
            torch.autograd.grad(v.sum(), at, retain_graph=True)[0] for v in per_function(part, at)
        ]
        slopes.append(torch.stack(rows))  # [E·C, G, 3]
    triple = (points * torch.linalg.cross(*slopes)).sum(2)
    found = values(z, points).movedim(2, 1).flatten(0, 1)
    torch.testing.assert_close(found, triple, rtol=0, atol=1e-10)


def values(coefficients, points):
    """Functions [E, K, C] at points [G, 3]: [E, G, C]."""
    lmax = math.isqrt(coefficients.shape[1]) - 1
    harmonics = o3.spherical_harmonics(
        list(range(lmax + 1)), points, normalize=True, normalization="component"
    )
    return harmonics @ coefficients


def per_function(coefficients, points):
    return values(coefficients, points).movedim(2, 1).flatten(0, 1)


def test_cross_product_of_vectors():
    """The Gaunt product is blind to it, the others are not."""
    x = torch.zeros(1, 4, 1, dtype=DOUBLE)
    y = torch.zeros(1, 4, 1, dtype=DOUBLE)
    x[0, 1], y[0, 2] = 1.0, 1.0  # x̂ × ŷ = ẑ
    for product in products(Degrees(1, 1, 1)):
        weights = torch.ones(1, product.n_weights, 1, dtype=DOUBLE)
        vector = product(x, y, weights)[0, 1:, 0]
        blind = isinstance(product, GauntProduct)
        assert (vector[2].abs() < 1e-12) == blind
        assert vector[:2].abs().max() < 1e-12


def test_reachable_paths_and_expressivity():
    """Counts of arXiv 2506.13523: all paths, and Σ L + 1 for the products of functions."""
    for lmax, n_paths, n_even in ((1, 6, 5), (2, 19, 14), (3, 44, 30), (4, 85, 55)):
        degrees = Degrees(lmax, lmax, 2 * lmax)
        full, gaunt = ClebschGordanProduct(degrees), GauntProduct(degrees)
        assert (len(full.paths), full.expressivity) == (n_paths, n_paths)
        assert (len(gaunt.paths), gaunt.expressivity) == (n_even, 4 * lmax + 1)
        assert all(sum(path) % 2 == 0 for path in gaunt.paths)
        vector = VectorHarmonicProduct(degrees)
        assert vector.paths == full.paths
        assert gaunt.expressivity < vector.expressivity <= n_paths
        assert SharedProduct(degrees).paths == full.paths
        assert SharedProduct(degrees).expressivity == 4 * lmax + 1


def test_one_operator_serves_many_products():
    product = SharedProduct(Degrees(2, 2, 2))
    x, y, weights = inputs(product)
    operator = product.operator(y[:, :, 0])
    assert operator.shape == (4, 9, 9)
    torch.testing.assert_close(operator_apply(x, operator, weights[:, 0]), product(x, y, weights))


@pytest.mark.parametrize("product", products(Degrees(3, 3, 3))[:5], ids=name)
def test_single_precision(product):
    x, y, weights = inputs(product, n_items=20)
    exact = product(x, y, weights)
    single = product(x.float(), y.float(), weights.float())
    assert single.dtype == torch.float32
    assert float((single - exact).norm() / exact.norm()) < 2e-6


def test_no_items_and_shared_weights():
    for product in SMALL:
        x, y, weights = inputs(product)
        assert product(x[:0], y[:0], weights[:0]).shape == (0, product.degrees.sizes[2], 3)
        same = product(x, y, weights[:1])
        torch.testing.assert_close(same, product(x, y, weights[:1].expand(4, -1, -1)))


def test_bad_input_is_named():
    product = SharedProduct(Degrees(1, 1, 1))
    x, y, weights = inputs(product)
    for bad in ((x[:, :3], y, weights), (x, y[:3], weights), (x, y, weights[:, :, :1])):
        with pytest.raises(InputError, match="do not fit"):
            product(*bad)
    with pytest.raises(InputError, match="degrees"):
        SharedProduct(Degrees(1, -1, 1))
    with pytest.raises(InputError, match="spectral"):
        GauntProduct(Degrees(1, 1, 1), "spectral")
