"""Compare the layers of Facet with unit-level numbers of the official code (``parts.npz``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mlip.nn.equivariant import (
    EquivariantLinear,
    equivariant_layer_norm,
    gate,
    normalized_shifted_softplus,
    normalized_silu,
    pad_or_truncate,
)
from mlip.nn.node_update import SphereGridUpdate
from mlip.nn.radial import GaussianBasis, SineBasis, exponential_envelope, xplor_envelope
from mlip.ops import ConvolutionSignature, Features, convolution, neighborhood, radial_convolution
from mlip.so3 import clebsch_gordan, latitude_longitude_grid, spherical_harmonics

Arrays = Mapping[str, np.ndarray]
R_MAX = 5.0  # cutoff of the stored envelopes and bases, Å


def compare_parts(arrays: Arrays) -> dict[str, float]:
    """Return the worst absolute deviation of each stored part, float64."""
    comparisons: tuple[Callable[[Arrays], dict[str, float]], ...] = (
        _radial,
        _harmonics,
        _grids,
        _grid_update,
        _layers,
        _convolution,
    )
    result: dict[str, float] = {}
    for compare in comparisons:
        with torch.no_grad():
            result |= compare(arrays)
    return result


def unflatten(flat: Tensor, channels: tuple[int, ...]) -> Features:
    """Read the official layout (degree, channel, component) as features."""
    sizes = [n * (2 * degree + 1) for degree, n in enumerate(channels)]
    return tuple(
        part.reshape(len(flat), n, 2 * degree + 1).transpose(1, 2)
        for degree, (part, n) in enumerate(zip(flat.split(sizes, 1), channels, strict=True))
    )


def flatten(x: Features) -> Tensor:
    """Write features in the official layout."""
    return torch.cat([part.transpose(1, 2).flatten(1) for part in x], dim=1)


def _get(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(arrays[name]))


def _worst(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max()) if ours.shape == truth.shape else float("inf")


def _radial(arrays: Arrays) -> dict[str, float]:
    r = _get(arrays, "r")
    radius = torch.tensor([R_MAX], dtype=torch.float64)
    result = {}
    for name in arrays:
        match = re.fullmatch(r"env_exp_c([\d.]+)_s([\d.]+)", name)
        if match:
            curvature, start = float(match[1]), float(match[2])
            with torch.enable_grad():
                x = r.clone().requires_grad_(True)
                ours = exponential_envelope(x, radius, start, curvature)
                (slope,) = torch.autograd.grad(ours.sum(), x)
            result[name] = _worst(ours.detach(), _get(arrays, name))
            result[f"{name}_grad"] = _worst(slope, _get(arrays, f"{name}_grad"))
    result["env_xplor_0.9"] = _worst(xplor_envelope(r, radius, 0.9), _get(arrays, "env_xplor_0.9"))
    sine = SineBasis(_get(arrays, "freq").tolist()).double()
    sine.frequencies.copy_(_get(arrays, "freq"))
    for name in ("basis_sinc", "basis_bessel"):
        result[name] = _worst(sine(r) * (2 / R_MAX), _get(arrays, name))
    gaussian = GaussianBasis(len(arrays["mu"]), R_MAX, 1.0).double()
    gaussian.centres.copy_(_get(arrays, "mu"))
    gaussian.width.copy_(_get(arrays, "sigma"))
    result["basis_gauss"] = _worst(gaussian(r), _get(arrays, "basis_gauss"))
    x = _get(arrays, "act_x")
    result["normalized_silu"] = _worst(normalized_silu(x), _get(arrays, "normalized_silu"))
    softplus = normalized_shifted_softplus(x)
    result["normalized_ssp"] = _worst(softplus, _get(arrays, "normalized_ssp"))
    return result


def _harmonics(arrays: Arrays) -> dict[str, float]:
    vectors = _get(arrays, "edge_vec")[:, [2, 1, 0]]
    result = {"edge_sh_l3": _worst(spherical_harmonics(3, vectors), _get(arrays, "edge_sh_l3"))}
    for name in arrays:
        match = re.fullmatch(r"cg_(\d)(\d)(\d)", name)
        if match:
            degrees = int(match[1]), int(match[2]), int(match[3])
            result[name] = _worst(clebsch_gordan(*degrees), _get(arrays, name))
    return result


def _grids(arrays: Arrays) -> dict[str, float]:
    result = {}
    for name in arrays:
        match = re.fullmatch(r"to_grid_L(\d)_(\d+)x(\d+)_(\w+)", name)
        if match:
            lmax, n_latitude, n_longitude = (int(match[i]) for i in (1, 2, 3))
            quadrature = "soft" if match[4] == "soft" else "gauss_legendre"
            grid = latitude_longitude_grid(lmax, n_latitude, n_longitude, quadrature)  # type: ignore[arg-type]
            to_grid = _get(arrays, name).flatten(1).T
            from_grid = _get(arrays, name.replace("to_grid", "from_grid")).flatten(0, 1).T
            result[name] = _worst(grid.to_grid, to_grid)
            result[name.replace("to_grid", "from_grid")] = _worst(grid.from_grid, from_grid)
    return result


def _set_linear(linear: EquivariantLinear, arrays: Arrays, prefix: str) -> None:
    for name in arrays:
        match = re.fullmatch(re.escape(prefix) + r"w\[\d+,\d+\] \d+x\d+e,\d+x(\d+)e", name)
        if match:
            linear.weights[int(match[1])].copy_(_get(arrays, name))


def _grid_update(arrays: Arrays) -> dict[str, float]:
    grid = (18, 17, "soft")
    update = SphereGridUpdate(
        (6, 4, 3, 2), (7, 5, 2, 2), grid, (5,), 2, "silu", "silu", False
    ).double()
    _set_linear(update.up, arrays, "s2_w:params/proj_up/")
    _set_linear(update.down, arrays, "s2_w:params/proj_down/")
    for i, kernel in enumerate(update.mlp.kernels):
        kernel.copy_(_get(arrays, f"s2_w:params/mlp/Dense_{i}/kernel"))
    ours = flatten(update(unflatten(_get(arrays, "s2_in"), (6, 4, 3, 2))))
    return {"s2_out": _worst(ours, _get(arrays, "s2_out"))}


def _layers(arrays: Arrays) -> dict[str, float]:
    gated = gate(unflatten(_get(arrays, "gate_in"), (10, 3, 2)), (5, 3, 2))
    linear = EquivariantLinear((5, 3), (4, 2, 3)).double()
    _set_linear(linear, arrays, "lin_w:params/")
    mapped = linear(unflatten(_get(arrays, "lin_in"), (5, 3)))
    adapted = pad_or_truncate(unflatten(_get(arrays, "adapter_in"), (5, 3)), (3, 5, 2))
    gains = _get(arrays, "e3ln_scale").split([5, 3, 2])

    def layer_norm(x: Features) -> Features:
        normal = equivariant_layer_norm(x)
        return tuple(part * gain for part, gain in zip(normal, gains, strict=True))

    features = unflatten(_get(arrays, "e3ln_in"), (5, 3, 2))
    zeros = tuple(torch.zeros_like(part) for part in features)
    return {
        "gate_out": _worst(flatten(gated), _get(arrays, "gate_out")),
        "lin_out": _worst(flatten(mapped), _get(arrays, "lin_out")),
        "adapter_out": _worst(flatten(adapted), _get(arrays, "adapter_out")),
        "e3ln_out": _worst(flatten(layer_norm(features)), _get(arrays, "e3ln_out")),
        "e3ln_zero_out": _worst(flatten(layer_norm(zeros)), _get(arrays, "e3ln_zero_out")),
    }


def _convolution(arrays: Arrays) -> dict[str, float]:
    receivers = _get(arrays, "conv_receivers")
    n_nodes, n_edges = receivers.shape
    source = torch.arange(n_nodes).repeat_interleave(n_edges)
    target = receivers.reshape(-1).to(torch.int64)
    order = torch.argsort(target, stable=True)
    neighbors = neighborhood(torch.stack([source[order], target[order]]), n_nodes)
    harmonics = _get(arrays, "conv_sh").flatten(0, 1)[order]
    basis = _get(arrays, "conv_rad").flatten(0, 1)[order]
    kernel = nn.Parameter(_get(arrays, "conv_w:params/LazyInMLP_0/Dense_0/kernel"))
    x = unflatten(_get(arrays, "conv_x"), (4, 3, 2))
    signature = ConvolutionSignature((4, 3, 2), 2, (0, 1, 2))
    scale = 7.0**-0.7
    truth = _get(arrays, "conv_out")
    slow = convolution(signature, x, harmonics, basis @ kernel, neighbors)
    fast = radial_convolution(signature, x, harmonics, basis, kernel, neighbors)
    return {
        "conv_out (definition)": _worst(flatten(slow) * scale, truth),
        "conv_out (moments)": _worst(flatten(fast) * scale, truth),
    }
