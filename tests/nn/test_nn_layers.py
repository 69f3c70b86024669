"""Layers: equivariance with e3nn's rotation matrices, smoothness of envelopes, ZBL by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mlip.nn.equivariant import EquivariantLinear, equivariant_layer_norm, pad_or_truncate
from mlip.nn.mlp import MLP
from mlip.nn.node_update import SphereGridUpdate, SphereProductUpdate
from mlip.nn.radial import SineBasis, exponential_envelope, polynomial_envelope, xplor_envelope
from mlip.nn.zbl import ZBLRepulsion

DOUBLE = torch.float64


def random_features(channels, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(n, 2 * degree + 1, c, generator=generator, dtype=DOUBLE)
        for degree, c in enumerate(channels)
    )


def rotated(x, rotation, parity=1):
    """Rotate by matrices solved from e3nn's harmonics, Y(R r) = D Y(r), in full precision."""
    o3 = pytest.importorskip("e3nn.o3")
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    out = []
    for degree, part in enumerate(x):
        before = o3.spherical_harmonics(degree, points, True)
        after = o3.spherical_harmonics(degree, points @ rotation.T, True)
        matrix = torch.linalg.lstsq(before, after).solution.T * parity**degree
        out.append(torch.einsum("ij,njc->nic", matrix, part))
    return tuple(out)


def random_rotation(seed=3):
    return torch.from_numpy(Rotation.random(random_state=seed).as_matrix())


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("channels_out", [(5, 4, 3), (7, 2), (6,)])
def test_sphere_product_is_equivariant_to_rounding(order, channels_out):
    torch.manual_seed(0)
    update = SphereProductUpdate((4, 3, 5), channels_out, order, 8).double()
    x = random_features((4, 3, 5))
    rotation = random_rotation()
    for parity in (1, -1):
        first = update(rotated(x, rotation, parity))
        second = rotated(update(x), rotation, parity)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_sphere_product_is_not_linear():
    torch.manual_seed(0)
    update = SphereProductUpdate((4, 3, 5), (5, 4, 3), 2, 8).double()
    x = random_features((4, 3, 5))
    doubled = update(tuple(2 * part for part in x))
    assert float((doubled[1] - 2 * update(x)[1]).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("order", [2, 3])
def test_sphere_product_multiplies_functions_on_the_sphere(order):
    """Against e3nn's harmonics on a grid much finer than the product needs."""
    o3 = pytest.importorskip("e3nn.o3")
    torch.manual_seed(0)
    update = SphereProductUpdate((2, 2, 2), (3, 2, 2), order, 4).double()
    y = random_features((2, 2, 2))
    heights, weights = np.polynomial.legendre.leggauss(20)
    angles = 2 * np.pi * np.arange(41) / 41
    ring = np.sqrt(1 - heights**2)[:, None]
    points = np.stack(
        np.broadcast_arrays(ring * np.sin(angles), heights[:, None], ring * np.cos(angles)), -1
    ).reshape(-1, 3)
    table = o3.spherical_harmonics(  # [G, 9]
        [0, 1, 2], torch.from_numpy(points), True, normalization="component"
    )
    quadrature = torch.from_numpy(np.repeat(weights / 2 / 41, 41))
    up = torch.cat(update.up(y), 1)  # [N, 9, order·2]
    values = torch.einsum("gk,nkc->ngc", table, up) / math.sqrt(3)
    factors = values.split(2, dim=2)
    products = [math.prod(factors[:n]) for n in range(2, order + 1)]
    v = torch.einsum("g,gk,ngc->nkc", quadrature, table, torch.cat(products, 2))
    scalars = torch.cat([y[0], v[:, :1]], 2)
    linear = update.down((scalars, torch.cat([y[1], v[:, 1:4]], 2), torch.cat([y[2], v[:, 4:]], 2)))
    gates = update.invariants(scalars).split((3, 2, 2), dim=2)
    truth = (linear[0] + gates[0], linear[1] * (1 + gates[1]), linear[2] * (1 + gates[2]))
    for ours, theirs in zip(update(y), truth, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_published_grid_update_is_only_nearly_equivariant():
    torch.manual_seed(0)
    rotation = random_rotation()
    x = random_features((4, 3, 5))
    errors = []
    for grid in ((8, 7, "soft"), (36, 35, "soft")):
        torch.manual_seed(1)
        update = SphereGridUpdate(
            (4, 3, 5), (5, 4, 3), grid, (6,), 1, "silu", "silu", False
        ).double()
        first, second = update(rotated(x, rotation)), rotated(update(x), rotation)
        pairs = zip(first, second, strict=True)
        errors.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    assert errors[0] > 1e-6
    assert errors[1] < errors[0] / 10


def test_linear_equals_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    torch.manual_seed(0)
    ours = EquivariantLinear((4, 3), (5, 2, 2)).double()
    theirs = o3.Linear("4x0e + 3x1e", "5x0e + 2x1e + 2x2e").double()
    with torch.no_grad():
        theirs.weight.copy_(torch.cat([w.flatten() for w in list(ours.weights)[:2]]))
    x = random_features((4, 3))
    flat = torch.cat([part.transpose(1, 2).flatten(1) for part in x], 1)
    out = torch.cat([part.transpose(1, 2).flatten(1) for part in ours(x)], 1)
    torch.testing.assert_close(out, theirs(flat), atol=1e-12, rtol=0)


def test_layer_norm_normalises():
    normal = equivariant_layer_norm(random_features((50, 20, 10)))
    assert float(normal[0].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(normal[0].square().mean()) == pytest.approx(1.0, abs=1e-4)
    higher = torch.cat([part.flatten(1) for part in normal[1:]], 1)
    assert float(higher.square().mean()) == pytest.approx(1.0, abs=1e-4)


def test_pad_or_truncate():
    x = random_features((4, 3))
    out = pad_or_truncate(x, (2, 5, 1))
    assert [tuple(part.shape[1:]) for part in out] == [(1, 2), (3, 5), (5, 1)]
    assert torch.equal(out[0], x[0][:, :, :2])
    assert torch.equal(out[1][:, :, :3], x[1])
    assert not out[1][:, :, 3:].any()
    assert not out[2].any()


@pytest.mark.parametrize("p", [3, 5, 6])
def test_polynomial_envelope_is_twice_differentiable_at_the_cutoff(p):
    x = torch.tensor([1.0 - 1e-9], dtype=DOUBLE, requires_grad=True)
    value = polynomial_envelope(x, p)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert abs(value.item()) < 1e-12
    assert abs(first.item()) < 1e-10
    assert abs(second.item()) < 1e-6
    beyond = polynomial_envelope(torch.tensor([0.0, 1.0, 7.0], dtype=DOUBLE), p)
    assert beyond.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("kind", ["exponential", "xplor"])
def test_published_envelopes_have_continuous_slope(kind):
    cutoff = torch.tensor([5.0], dtype=DOUBLE)
    r = torch.linspace(0.5, 5.5, 20001, dtype=DOUBLE, requires_grad=True)
    if kind == "xplor":
        value = xplor_envelope(r, cutoff, 0.9)
    else:
        value = exponential_envelope(r, cutoff, 0.8, 0.1)
    (slope,) = torch.autograd.grad(value.sum(), r)
    numeric = np.gradient(value.detach().numpy(), r.detach().numpy())
    assert np.abs(slope.numpy() - numeric).max() < 2e-3
    assert value[-1] == 0
    assert value[0] == 1


def test_sine_basis_values():
    basis = SineBasis([1.0, 2.5]).double()
    out = basis(torch.tensor([2.0], dtype=DOUBLE))[0].tolist()
    assert out == pytest.approx([math.sin(2.0) / 2, math.sin(5.0) / 2], abs=1e-7)


def test_mlp_against_numpy():
    torch.manual_seed(0)
    mlp = MLP([3, 4, 2], "silu", "identity", normalize=True).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    first, second = (k.detach().numpy() for k in mlp.kernels)
    hidden = x.numpy() @ first
    hidden = hidden / (1 + np.exp(-hidden))
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(mlp(x).detach().numpy(), hidden @ second, atol=1e-12)


def test_zbl_of_two_silicon_atoms():
    """Repulsion of a pair at 1 Å against the formula written out with numpy."""
    vectors = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=DOUBLE)
    energies = ZBLRepulsion(5.0)(torch.tensor([14, 14]), vectors, torch.tensor([[1, 0], [0, 1]]))
    a = 0.8854 * 0.529177210903 / (2 * 14**0.23)
    phi = sum(
        c * math.exp(-d / a)
        for c, d in ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
    )
    x = 1.0 / (2 * 1.11)
    envelope = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    assert energies.sum().item() == pytest.approx(14.3996454785 * 196 * phi * envelope, rel=1e-9)


def test_zbl_vanishes_beyond_the_covalent_radii():
    vectors = torch.tensor([[0.0, 0.0, 2.3], [0.0, 0.0, -2.3]], dtype=DOUBLE)
    energies = ZBLRepulsion(5.0)(torch.tensor([14, 14]), vectors, torch.tensor([[1, 0], [0, 1]]))
    assert not energies.any()
