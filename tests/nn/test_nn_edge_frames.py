"""Layers in the frames of edges: equivariance, orders, exact products, sums over neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from mlip.nn.edge_frames import EdgeFrameBuilder, frozen_at_poles
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.equiformer_heads import symmetric_tensor
from mlip.nn.force_encoding import encode_forces
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import MergedLayerNorm, SO3Linear
from mlip.nn.sphere_feed_forward import SphereFeedForward
from mlip.nn.sphere_product import SphereBasis, sphere_product
from mlip.ops import envelope_softmax, nearest_edges
from mlip.so3 import (
    clebsch_gordan,
    degree_major,
    order_major,
    order_sizes,
    rotation_to_axis,
    spherical_harmonics,
    wigner_matrices,
)

SIZES = [(2, 2), (3, 1), (4, 2), (3, 0)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_wigner(lmax: int, rotation: torch.Tensor) -> torch.Tensor:
    """Block-diagonal Wigner matrices [E, K, K]."""
    degrees = wigner_matrices(lmax, rotation)
    return torch.stack([torch.block_diag(*parts) for parts in zip(*degrees, strict=True)])


def roll(angle: float) -> torch.Tensor:
    """Rotation about y."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)


def test_orders_hold_every_coefficient_once():
    for lmax, mmax in SIZES:
        assert sorted(order_major(lmax, mmax)) == sorted(degree_major(lmax, mmax))
    assert order_major(2, 1) == ((0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (1, -1), (2, -1))
    assert len(order_major(4, 2)) == 19
    assert len(order_major(6, 2)) == 29


@pytest.mark.parametrize(("lmax", "mmax"), SIZES)
def test_rotation_is_the_dense_one(lmax, mmax):
    vectors, x = randn(7, 3), randn(7, (lmax + 1) ** 2, 5, seed=1)
    frames = EdgeFrameBuilder(lmax, mmax)(vectors)
    dense = dense_wigner(lmax, rotation_to_axis(vectors))
    rows = [degree**2 + degree + order for degree, order in order_major(lmax, mmax)]
    local = frames.matrix @ x
    torch.testing.assert_close(local, (dense @ x)[:, rows], rtol=0, atol=1e-12)
    if mmax == lmax:
        torch.testing.assert_close(frames.matrix.mT @ local, x, rtol=0, atol=1e-12)
    axial = randn(7, lmax + 1, 5, seed=2)
    padding = axial.new_zeros(7, len(rows) - lmax - 1, 5)
    back = (frames.matrix.mT @ torch.cat([axial, padding], 1)) * frames.rescale[:, None]
    torch.testing.assert_close(frames.rotate_back_axial(axial), back, rtol=0, atol=1e-12)


def test_poles_are_frozen_inside_the_cone_alone():
    directions = [[1e-3, 1.0, 0], [2e-3, 1.0, 0], [0, -2.0, 1e-3], [1.0, 0, 0]]
    vectors = torch.tensor(directions, dtype=torch.float64, requires_grad=True)
    frozen = frozen_at_poles(vectors)
    (gradient,) = torch.autograd.grad(frozen.sum(), vectors)
    assert gradient.any(1).tolist() == [False, True, False, True]
    assert frozen[2].tolist() == [0.0, -1.0, 0.0]


@pytest.mark.parametrize(("lmax", "mmax"), SIZES)
def test_linear_map_in_the_frame_does_not_see_the_roll(lmax, mmax):
    """Turn about the edge, map, turn back: the same as mapping."""
    layer = SO2Linear(lmax, mmax, 4, 3, extra=2).double()
    identity = torch.eye(3, dtype=torch.float64).expand(5, 3, 3)
    builder = EdgeFrameBuilder(lmax, lmax)
    keep = [order_major(lmax, lmax).index(pair) for pair in order_major(lmax, mmax)]

    def turn(x: torch.Tensor, channels: int) -> torch.Tensor:
        """Rotate order-major features about y by going through all orders."""
        whole = x.new_zeros(5, (lmax + 1) ** 2, channels)
        whole[:, keep] = x
        plain = builder.from_rotations(identity).matrix.mT @ whole
        turned = builder.from_rotations(roll(0.7).expand(5, 3, 3)).matrix @ plain
        return turned[:, keep]

    def apply(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat(layer(x.split(order_sizes(lmax, mmax), dim=1)), dim=1)
        return y[:, 2:].unflatten(1, (-1, 3)), y[:, :2]

    x = randn(5, len(keep), 4)
    y, invariants = apply(x)
    z, same = apply(turn(x, 4))
    torch.testing.assert_close(z, turn(y, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(same, invariants, rtol=0, atol=1e-12)
    assert mmax == 0 or (turn(x, 4) - x).abs().max() > 0.1


@pytest.mark.parametrize("make", [SO3Linear, "norm", "feed forward"])
def test_layers_on_atoms_commute_with_rotations(make):
    if make == "norm":
        layer = MergedLayerNorm(3, 4).double()
        torch.nn.init.normal_(layer.weight)
    elif make == "feed forward":
        layer = SphereFeedForward(SphereBasis(3, 3, in_frame=False), 4, 6).double()
    else:
        layer = make(3, 4, 5).double()
    torch.nn.init.normal_(next(p for name, p in layer.named_parameters() if "bias" in name))
    dense = dense_wigner(3, rotation_to_axis(randn(1, 3)))
    x = randn(6, 16, 4, seed=4)
    torch.testing.assert_close(layer(dense @ x), dense @ layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_frame", [False, True])
def test_product_on_the_sphere_is_the_gaunt_product(in_frame):
    """Coefficients of a product by Clebsch–Gordan tensors instead of a grid."""
    lmax = 3
    basis = SphereBasis(lmax, lmax, in_frame=in_frame)
    a, b = randn(1, 16, 1), randn(1, 16, 1, seed=1)
    pairs = order_major(lmax, lmax) if in_frame else degree_major(lmax, lmax)
    rows = [degree**2 + degree + order for degree, order in pairs]
    plain_a, plain_b = torch.zeros(16, 1).double(), torch.zeros(16, 1).double()
    plain_a[rows], plain_b[rows] = a[0], b[0]
    scale = torch.tensor(
        [math.sqrt((2 * degree + 1) * (lmax + 1)) for degree, _ in degree_major(lmax, lmax)],
        dtype=torch.float64,
    )
    f, g = plain_a[:, 0] / scale, plain_b[:, 0] / scale
    expected = torch.zeros(16, dtype=torch.float64)
    for l1 in range(lmax + 1):
        for l2 in range(lmax + 1):
            for l3 in range(abs(l1 - l2), min(lmax, l1 + l2) + 1):
                table = clebsch_gordan(l1, l2, l3)
                pole = [
                    spherical_harmonics(lmax, torch.tensor([0.0, 1.0, 0.0]).double())[
                        degree**2 + degree
                    ]
                    for degree in (l1, l2, l3)
                ]
                axial = table[l1, l2, l3]  # all m = 0: fixes the one free factor of the product
                one, two = f[l1**2 : (l1 + 1) ** 2], g[l2**2 : (l2 + 1) ** 2]
                coupled = torch.einsum("i,j,ijk->k", one, two, table)
                expected[l3**2 : (l3 + 1) ** 2] += coupled * axial * pole[0] * pole[1] * pole[2]
    found = sphere_product(basis, a, b)[0, :, 0]
    torch.testing.assert_close(found, (expected * scale)[rows], rtol=0, atol=1e-12)


def test_radial_tables_are_the_concatenated_layer():
    mlp = EdgeRadialMLP(3, 4, 5, 6).double()
    basis, source, target = randn(8, 4), torch.arange(8) % 3, torch.arange(8) % 2
    joined = torch.cat([basis, mlp.source_embedding(source), mlp.target_embedding(target)], 1)
    expected = mlp.rest(mlp.first(joined))
    torch.testing.assert_close(mlp(basis, source, target), expected, rtol=0, atol=1e-13)


def test_softmax_by_a_loop():
    logits, envelope = 30 * randn(7, 2), torch.rand(7).double()
    index = torch.tensor([0, 0, 0, 2, 2, 3, 3])
    found = envelope_softmax(logits, envelope, index, 5, 1e-16)
    for group in range(4):
        rows = index == group
        for head in range(2):
            weights = envelope[rows] * torch.exp(logits[rows, head])
            torch.testing.assert_close(found[rows, head], weights / weights.sum())
    huge = envelope_softmax(1e3 * logits, envelope, index, 5, 1e-16)  # exp alone would overflow
    assert torch.isfinite(huge).all()
    assert huge[index == 3].sum(0).tolist() == pytest.approx([1.0, 1.0])
    none = envelope_softmax(logits, torch.zeros(7).double(), index, 5, 1e-16)
    assert not none.any()


def test_nearest_edges_by_a_loop():
    target = torch.arange(30) % 4
    distance = torch.rand(30, generator=torch.Generator().manual_seed(3))
    keep = nearest_edges(target, distance, 6, 3)
    expected = []
    for node in range(4):
        rows = torch.nonzero(target == node)[:, 0]
        expected += rows[distance[rows].argsort()[:3]].tolist()
    assert keep.tolist() == sorted(expected)
    assert nearest_edges(target, distance, 6, 8) is None
    assert nearest_edges(target[:0], distance[:0], 6, 8) is None


def test_tensor_of_the_stress_head_turns_with_its_coefficients():
    """T(D c) = R T(c) Rᵀ for l = 0 and 2, symmetric, with the norm of its coefficients."""
    rotation = rotation_to_axis(randn(1, 3))
    coefficients = randn(1, 9)
    coefficients[:, 1:4] = 0
    tensor = symmetric_tensor(coefficients)
    turned = symmetric_tensor((dense_wigner(2, rotation) @ coefficients[:, :, None])[:, :, 0])
    torch.testing.assert_close(turned, rotation @ tensor @ rotation.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(tensor, tensor.mT)
    torch.testing.assert_close(tensor.norm(), coefficients.norm())


def test_encoded_forces_hold_the_forces():
    forces = torch.cat([randn(4, 3), torch.zeros(1, 3).double()])
    encoded = encode_forces(forces, 3)
    torch.testing.assert_close(encoded[:, 1:4], forces)
    torch.testing.assert_close(encoded[:, 0], forces.norm(dim=1) / math.sqrt(3))
    assert not encoded[4].any()
