"""Compare the layers of EquiformerV3 with unit-level numbers of the official code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlip.models.equiformer_v3_official import our_name
from mlip.nn.attention_edges import AttentionEdges
from mlip.nn.edge_frames import EdgeFrameBuilder
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.equiformer_heads import EnergyHead, StressHead
from mlip.nn.graph_attention import (
    AttentionShape,
    EquivariantGraphAttention,
    smooth_leaky_relu,
)
from mlip.nn.radial import polynomial_envelope, uniform_gaussians
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import MergedLayerNorm, SO3Linear
from mlip.nn.sphere_feed_forward import SphereFeedForward
from mlip.nn.sphere_product import SphereBasis, gate_by_degree, grid_matrices, swiglu_s2
from mlip.ops import envelope_softmax
from mlip.so3 import degree_major, order_major, order_sizes, spherical_harmonics, wigner_matrices

Arrays = Mapping[str, np.ndarray]


def compare_parts(arrays: Arrays) -> dict[str, float]:
    """Return the worst absolute deviation of each stored part, float64."""
    comparisons: tuple[Callable[[Arrays], dict[str, float]], ...] = (
        _rotations,
        _frames,
        _grids,
        _radial,
        _linear_layers,
        _activations,
        _softmax,
        _heads_and_feed_forward,
        _attention,
    )
    result: dict[str, float] = {}
    with torch.no_grad():
        for compare in comparisons:
            result |= compare(arrays)
    return result


def _get(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(arrays[name]))


def _worst(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max()) if ours.shape == truth.shape else float("inf")


def _load(module: nn.Module, arrays: Arrays, group: str, prefix: str, ours: str) -> Any:
    """Fill a module with weights that official code keeps under ``prefix``, we under ``ours``."""
    own = module.double().state_dict()
    state = {}
    for name in arrays:
        if name.startswith(f"{group}/sd/"):
            key = our_name(prefix + name.removeprefix(f"{group}/sd/")).removeprefix(ours)
            state[key] = _get(arrays, name).reshape(own[key].shape)
    module.load_state_dict(state)
    return module.eval()


def _rotations(arrays: Arrays) -> dict[str, float]:
    rotation = _get(arrays, "wigner_D_angles/D1")
    result = {
        f"wigner D{degree}": _worst(matrix, _get(arrays, f"wigner_D_angles/D{degree}"))
        for degree, matrix in enumerate(wigner_matrices(6, rotation))
    }
    degrees = wigner_matrices(6, _get(arrays, "rot/R"))
    whole = torch.stack([torch.block_diag(*parts) for parts in zip(*degrees, strict=True)])
    result["rot/D_l0to6"] = _worst(whole, _get(arrays, "rot/D_l0to6"))
    harmonics = spherical_harmonics(6, _get(arrays, "sh/vec"))
    result["sh/Y_component"] = _worst(harmonics, _get(arrays, "sh/Y_component_l0to6"))
    return result


def _frames(arrays: Arrays) -> dict[str, float]:
    """Compare Wigner matrices there, and back with the factors of the orders left out."""
    result = {}
    rotation = _get(arrays, "rot/R")
    for name in arrays:
        match = re.fullmatch(r"rot/wigner_L(\d)M(\d)", name)
        if not match:
            continue
        lmax, mmax = int(match[1]), int(match[2])
        frames = EdgeFrameBuilder(lmax, mmax).from_rotations(rotation)
        back = frames.matrix.mT * frames.rescale[:, None]
        inverse = _get(arrays, name.replace("wigner_", "wigner_inv_"))
        axial = torch.eye(lmax + 1, dtype=torch.float64).expand(len(rotation), -1, -1)
        result[name] = _worst(frames.matrix, _get(arrays, name))
        result[f"{name} inverse"] = _worst(back, inverse)
        result[f"{name} axial"] = _worst(frames.rotate_back_axial(axial), inverse[:, :, : lmax + 1])
    return result


def _grids(arrays: Arrays) -> dict[str, float]:
    """Compare matrices after sorting latitudes: ours run from south to north, theirs back."""
    result = {}
    for name in arrays:
        match = re.fullmatch(r"grid/L(\d)M(\d)_(\d+)x(\d+)_([lm])/to_grid", name)
        if not match:
            continue
        lmax, mmax, n_latitude, n_longitude = (int(match[i]) for i in range(1, 5))
        basis = SphereBasis(lmax, mmax, match[5] == "m", (n_latitude, n_longitude))
        to_grid, from_grid = grid_matrices(basis)
        back = name.replace("to_grid", "from_grid")
        shape = (n_latitude, n_longitude, to_grid.shape[1])
        ours = to_grid.view(shape).flip(0)
        result[name] = _worst(ours, _get(arrays, name).view(shape))
        ours = from_grid.T.reshape(shape).flip(0)
        result[back] = _worst(ours, _get(arrays, back).T.reshape(shape))
    return result


def _radial(arrays: Arrays) -> dict[str, float]:
    x = _get(arrays, "smooth_leaky_relu/x")
    distance = _get(arrays, "envelope_rc6/dist")
    result = {
        "smooth_leaky_relu": _worst(smooth_leaky_relu(x), _get(arrays, "smooth_leaky_relu/y")),
        "envelope_rc6": _worst(
            polynomial_envelope(distance / 6, 5)[:, None], _get(arrays, "envelope_rc6/value")
        ),
    }
    for name in arrays:
        match = re.fullmatch(r"gauss_n(\d+)_rc(\d+)/value", name)
        if match:
            distance = _get(arrays, name.replace("value", "dist"))
            ours = uniform_gaussians(distance, int(match[1]), float(match[2]))
            result[name] = _worst(ours, _get(arrays, name))
    group = "radial_function_L4_C4"
    x = _get(arrays, f"{group}/x")
    width, n_in = arrays[f"{group}/sd/net.0.weight"].shape
    mlp = EdgeRadialMLP(1, n_in, width, arrays[f"{group}/sd/net.6.weight"].shape[0]).double()
    state = mlp.state_dict()
    padding = torch.zeros(width, 2 * width, dtype=torch.float64)  # inputs are radial alone here
    for name in (name for name in arrays if name.startswith(f"{group}/sd/")):
        key = our_name("x.rad_func." + name.removeprefix(f"{group}/sd/")).removeprefix("x.radial.")
        value = _get(arrays, name)
        state[key] = torch.cat([value, padding], 1) if key == "first.weight" else value
    mlp.load_state_dict(state)
    none = torch.zeros(len(x), dtype=torch.int64)
    degrees = torch.tensor([degree for degree, _ in degree_major(4, 4)])
    ours = mlp(x, none, none).view(len(x), 5, -1)[:, degrees]
    return result | {group: _worst(ours, _get(arrays, f"{group}/y"))}


def _linear_layers(arrays: Arrays) -> dict[str, float]:
    result = {}
    group = "merge_layer_norm_L4_C6"
    norm = _load(MergedLayerNorm(4, 6), arrays, group, "norm.", "norm.")
    result[group] = _worst(norm(_get(arrays, f"{group}/x")), _get(arrays, f"{group}/y"))
    group = "so3_linear_L4_6to5"
    linear = _load(SO3Linear(4, 6, 5), arrays, group, "x.so3_linear_1.", "x.linear_1.")
    result[group] = _worst(linear(_get(arrays, f"{group}/x")), _get(arrays, f"{group}/y"))
    for group, extra in (("so2_linear_L4M2_6to5_extra7", 7), ("so2_linear_L4M2_6to5", 0)):
        linear = _load(
            SO2Linear(4, 2, 6, 5, extra), arrays, group, "x.so2_linear_1.", "x.linear_1."
        )
        y = torch.cat(linear(_get(arrays, f"{group}/x").split(order_sizes(4, 2), dim=1)), dim=1)
        result[group] = _worst(y[:, extra:], _get(arrays, f"{group}/y").flatten(1))
        if extra:
            result[f"{group} extra"] = _worst(y[:, :extra], _get(arrays, f"{group}/extra"))
    return result


def _activations(arrays: Arrays) -> dict[str, float]:
    """Exact grids of any shape must give the official numbers; the smallest is compared too."""
    result = {}
    group = "act_gates2_attn_L4M2"
    inputs, scalars = _get(arrays, f"{group}/inputs"), _get(arrays, f"{group}/scalars")
    for points in (None, (14, 8)):
        ours = swiglu_s2(SphereBasis(4, 2, True, points), inputs, scalars)
        result[f"{group} {points or 'smallest'}"] = _worst(ours, _get(arrays, f"{group}/y"))
    for group, pairs in (
        ("act_gate_attn_L4M2", order_major(4, 2)),
        ("act_gate_node_L4", degree_major(4, 4)),
    ):
        degrees = torch.tensor([degree for degree, _ in pairs])
        inputs, scalars = _get(arrays, f"{group}/inputs"), _get(arrays, f"{group}/scalars")
        ours = gate_by_degree(inputs, scalars, degrees)
        result[group] = _worst(ours, _get(arrays, f"{group}/y"))
    return result


def _softmax(arrays: Arrays) -> dict[str, float]:
    ours = envelope_softmax(
        _get(arrays, "graph_softmax/src"),
        _get(arrays, "graph_softmax/env")[:, 0],
        _get(arrays, "graph_softmax/index"),
        int(arrays["graph_softmax/num_nodes"]),
        1e-16,
    )
    return {"graph_softmax": _worst(ours, _get(arrays, "graph_softmax/y"))}


def _heads_and_feed_forward(arrays: Arrays) -> dict[str, float]:
    result = {}
    for points in (None, (14, 14)):
        group = "ffn_L4_C6_H8"
        layer = SphereFeedForward(SphereBasis(4, 4, False, points), 6, 8)
        y = _load(layer, arrays, group, "blocks.0.ffn.", "blocks.0.feed_forward.")(
            _get(arrays, f"{group}/x")
        )
        result[f"{group} {points or 'smallest'}"] = _worst(y, _get(arrays, f"{group}/y"))
    group = "stress_head_L4_C6_H8"
    stress = _load(StressHead(4, 6, 8), arrays, group, "stress_block.", "stress_head.")
    y = stress(_get(arrays, f"{group}/x"), _get(arrays, f"{group}/batch"), 2)
    result[group] = _worst(y.flatten(1), _get(arrays, f"{group}/y"))
    group = "energy_head_C6_H8"
    energy = _load(EnergyHead(6, 8), arrays, group, "energy_block.", "energy_head.")
    y = energy(_get(arrays, f"{group}/x"))[:, None]
    return result | {group: _worst(y, _get(arrays, f"{group}/y"))}


def _attention(arrays: Arrays) -> dict[str, float]:
    group = "attention_L4M2"
    heads, alpha = arrays[f"{group}/sd/alpha_dot"].shape
    basis, x = _get(arrays, f"{group}/edge_rbf"), _get(arrays, f"{group}/x")
    n_elements, width = arrays[f"{group}/sd/source_embedding.weight"].shape
    value = arrays[f"{group}/sd/proj.weight"].shape[2] // heads
    hidden = arrays[f"{group}/sd/so2_linear_2.fc_m0.weight"].shape[1] // 5
    sphere = SphereBasis(4, 2, in_frame=True)
    shape = AttentionShape(
        sphere, x.shape[2], hidden, heads, alpha, value, n_elements, basis.shape[1], width
    )
    layer = EquivariantGraphAttention(shape, arrays[f"{group}/sd/proj.weight"].shape[1])
    layer = _load(layer, arrays, group, "blocks.0.ga.", "blocks.0.attention.")
    source, target = _get(arrays, f"{group}/edge_index")
    numbers = _get(arrays, f"{group}/numbers")
    edges = AttentionEdges(
        source,
        target,
        numbers[source],
        numbers[target],
        EdgeFrameBuilder(4, 2).from_rotations(_get(arrays, f"{group}/R")),
        basis,
        _get(arrays, f"{group}/env")[:, 0],
    )
    return {group: _worst(layer(x, edges), _get(arrays, f"{group}/y"))}
