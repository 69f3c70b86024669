"""Translate configuration and weights of the official EquiformerV3 code into ours.

Works on dictionaries and tensors; reads no file and runs no foreign code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlip.errors import CheckpointError, InputError
from mlip.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from mlip.models.official_files import load_weights

_FIELDS = {
    "max_radius": "cutoff",
    "max_neighbors": "max_neighbors",
    "num_layers": "layers",
    "lmax": "lmax",
    "mmax": "mmax",
    "num_channels": "channels",
    "attn_hidden_channels": "attention_hidden",
    "num_heads": "heads",
    "attn_alpha_channels": "alpha_channels",
    "attn_value_channels": "value_channels",
    "ffn_hidden_channels": "feed_forward_hidden",
    "edge_channels": "edge_channels",
    "num_radial_basis": "n_radial",
    "attn_grid_resolution_list": "attention_grid",
    "ffn_grid_resolution_list": "feed_forward_grid",
    "avg_num_nodes": "average_atoms",
    "avg_degree": "average_degree",
    "attn_eps": "attention_epsilon",
    "attn_weights_drop": "attention_dropout",
    "drop_path_rate": "drop_path",
}
_REQUIRED = {  # what every published model has
    "norm_type": "merge_layer_norm",
    "use_atom_edge_embedding": True,
    "use_envelope": True,
    "attn_activation": "sep-merge_gates2_swiglu",
    "ffn_activation": "sep-merge_gates2_swiglu",
    "use_attn_renorm": True,
    "use_add_merge": False,
    "use_rad_l_parametrization": True,
    "use_grid_mlp": True,
    "softcap": None,
    "enforce_max_neighbors_strictly": True,
}
_UNUSED = ("alpha_drop", "attn_mask_rate", "value_drop", "proj_drop", "ffn_drop")
_IGNORED = {  # how the official code builds graphs and names things, and defaults that follow
    "cls",
    "name",
    "use_pbc",
    "use_pbc_single",
    "otf_graph",
    "max_num_elements",
    "use_gate_force_head",
    "direct_prediction",
    "regress_forces",
    "regress_stress",
}

_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^sphere_embedding\.", "embedding."),
        (r"^edge_degree_embedding\.", "edge_degree."),
        (r"^blocks\.(\d+)\.ga\.", r"blocks.\1.attention."),
        (r"^blocks\.(\d+)\.ffn\.", r"blocks.\1.feed_forward."),
        (r"^(energy|force|stress)_block\.", r"\1_head."),
        (r"^dens_block\.", "noise_head."),
        (r"\.(source|target)_embedding\.", r".radial.\1_embedding."),
        (r"\.rad_func\.net\.0\.", ".radial.first."),
        (r"\.so2_linear_([12])\.fc_m0\.", r".linear_\1.axial."),
        (r"\.so2_linear_([12])\.so2_m_linear\.(\d+)\.fc\.weight$", r".linear_\1.orders.\2"),
        (r"\.so3_linear_([12])\.", r".linear_\1."),
        (r"\.proj\.", ".projection."),
        (r"\.affine_(weight|bias)$", r".\1"),
        (r"\.scalar_mlp\.0\.linear\.", ".scalars."),
        (r"\.grid_mlp\.gating_linear\.", ".gate."),
        (r"\.gating_linear\.", ".gate."),
        (r"\.grid_mlp\.grid_linear_1\.", ".expand."),
        (r"\.grid_mlp\.grid_linear_2\.", ".contract."),
    )
)
_RADIAL_LAYER = re.compile(r"\.rad_func\.net\.([1-9]\d*)\.")


def config_from_official(
    official: Mapping[str, Any], elements: Sequence[int], *, published: bool = False
) -> EquiformerV3Config:
    """Translate the constructor arguments of the official model.

    Args:
        official: keyword arguments; ``cls`` or ``name`` tells the model with DeNS.
        elements: atomic numbers that the model shall know.
        published: copy the official treatment of edges along ±y.

    Raises:
        InputError: an option that no published model uses, or an unknown one.
    """
    known = {*_FIELDS, *_REQUIRED, *_UNUSED, *_IGNORED}
    if unknown := sorted(set(official) - known):
        raise InputError(f"unknown options of the official EquiformerV3: {', '.join(unknown)}")
    for key, value in _REQUIRED.items():
        if official.get(key, value) != value:
            raise InputError(
                f"option {key} is {official[key]!r}; the published models have {value!r} and "
                "nothing else is supported"
            )
    if used := [key for key in _UNUSED if official.get(key)]:
        raise InputError(f"options no published model uses are set: {', '.join(used)}")
    fields = {ours: official[theirs] for theirs, ours in _FIELDS.items() if theirs in official}
    for name in ("attention_grid", "feed_forward_grid"):
        if name in fields:
            fields[name] = tuple(fields[name])
    direct = bool(official.get("direct_prediction", True))
    return EquiformerV3Config(
        elements=tuple(elements),
        prediction="direct" if direct else "gradient",
        direct_stress=bool(official.get("regress_stress", False)),
        denoising="dens" in str(official.get("cls", official.get("name", ""))) and direct,
        published=published,
        **fields,
    )


def model_from_official(
    weights: Mapping[str, Tensor], config: EquiformerV3Config, dtype: torch.dtype = torch.float64
) -> EquiformerV3:
    """Build a model from official weights.

    Args:
        weights: parameters by official name without prefixes; no buffers.
        config: translated configuration; rows of element tables are picked by its elements.
        dtype: precision of the model.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        model = EquiformerV3(config).to(dtype)
    own = model.state_dict()
    state = {
        name: _fit(name, tensor, own, config).to(dtype)
        for name, tensor in ((our_name(key), value) for key, value in weights.items())
    }
    load_weights(model, state)
    return model


def our_name(official: str) -> str:
    """Translate the name of one official parameter."""
    name = _RADIAL_LAYER.sub(lambda match: f".radial.rest.{int(match[1]) - 1}.", official)
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def _fit(
    name: str, tensor: Tensor, own: Mapping[str, Tensor], config: EquiformerV3Config
) -> Tensor:
    """Pick the rows of our elements from element tables, and drop axes of length one of biases."""
    if name.endswith("embedding.weight") and tensor.ndim == 2:
        if tensor.shape[0] <= max(config.elements):
            raise CheckpointError(
                f"{name}: the official table has {tensor.shape[0]} rows, none for atomic number "
                f"{max(config.elements)}: name fewer elements"
            )
        return tensor[list(config.elements)]
    if name.endswith(".bias") and name in own:
        return tensor.reshape(-1)
    return tensor
