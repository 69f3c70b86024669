"""Translate weights of the official TDN code into ours; nothing in a file is executed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip.errors import CheckpointError, InputError
from mlip.models.official_files import (
    load_weights,
    read_checkpoint_file,
    state_of,
    without_wrappers,
)
from mlip.models.tdn import TDN, TDNConfig
from mlip.ops.tensor_products import Factors
from mlip.ops.tensor_products.factors import NAMES

OFFICIAL_AVERAGES = {  # atoms of a structure, neighbours of an atom: constants of the official code
    "PubChemQCR-S": (36.6, 18.6),
    "PubChemQCR": (30.0, 16.7),
}
AVERAGE_ATOMS, AVERAGE_DEGREE = OFFICIAL_AVERAGES["PubChemQCR-S"]
DROPOUT = 0.2

OFFICIAL_OPTIONS = {
    "hidden_channels": "channels",
    "num_interactions": "layers",
    "num_gaussians": "n_radial",
    "lmax": "lmax",
    "fc_neurons": "radial_hidden",
    "num_heads": "heads",
    "cutoff": "cutoff",
}
_IGNORED = {"compile_blocks", "gradient_force"}  # how it runs; forces are chosen by `prediction`
_LEGACY = re.compile(r"\.cp_[uvt]$")
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^rbf\.", "radial_basis."),
        (r"^edge_embed\.exp\.", "edge_degree.expand."),
        (r"^edge_embed\.", "edge_degree."),
        (r"\.tp\.cp_tp\.", ".operator."),
        (r"\.tp([12])\.cp_tp\.", r".product_\1."),
        (r"^blocks\.(\d+)\.attn\.", r"blocks.\1.attention."),
        (r"^blocks\.(\d+)\.norm([12])\.", r"blocks.\1.norm_\2."),
        (r"^blocks\.(\d+)\.ffn\.0\.", r"blocks.\1.expand."),
        (r"^blocks\.(\d+)\.ffn\.2\.", r"blocks.\1.contract."),
        (r"^head\.0\.", "head_hidden."),
        (r"^head\.2\.", "head."),
        (r"^force_proj\.", "force_projection."),
        (r"\.merge_src\.", ".merge_source."),
        (r"\.merge_dst\.", ".merge_target."),
        (r"\.lin_(alpha|value)\.", r".\1."),
        (r"\.proj\.", ".projection."),
        (r"\.linear\.weight$", ".weight"),
        (r"\.affine_(weight|bias)$", r".\1"),
        (r"\.rad\.", ".radial."),
        (r"\.radial\.offset$", ".radial.last.bias"),
    )
)
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_RADIAL_WEIGHT = re.compile(r"edge_embed\.rad\.net\.(\d+)\.weight$")
_RADIAL_LAYER = re.compile(r"\.radial\.net\.(\d+)\.(weight|bias)$")


def read_official(path: str | Path) -> dict[str, Tensor]:
    """Read an official checkpoint: a bare state dict or one inside a training checkpoint.

    Raises:
        CheckpointError: missing, unreadable or foreign file, or one that holds more than tensors
            and plain containers.
    """
    return state_of(read_checkpoint_file(path), path)


def official_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read constructor arguments of the official model off its weights: all but ``cutoff``.

    Args:
        weights: tensors by official name, with or without prefixes of wrappers.

    Raises:
        CheckpointError: they are not weights of a TDN.
    """
    shapes = {without_wrappers(name): tuple(tensor.shape) for name, tensor in weights.items()}
    layers = [int(match[1]) for name in shapes if (match := _BLOCK.match(name))]
    widths = {
        int(match[1]): shape[0]
        for name, shape in shapes.items()
        if len(shape) == 2 and (match := _RADIAL_WEIGHT.match(name))
    }
    try:
        return {
            "hidden_channels": shapes["atom_embed.atom_type_lin.weight"][0],
            "num_interactions": max(layers) + 1,
            "num_gaussians": math.prod(shapes["rbf.mean"]),
            "lmax": shapes["norm.affine_weight"][0] - 1,
            "fc_neurons": [widths[i] for i in sorted(widths)[:-1]],
            "num_heads": shapes["blocks.0.attn.alpha_dot"][0],
        }
    except (KeyError, ValueError, IndexError) as error:
        some = ", ".join(sorted(shapes)[:4])
        raise CheckpointError(
            f"not the weights of an official TDN: {error} not found among its names ({some}, …)"
        ) from error


def config_from_official(
    official: Mapping[str, Any],
    elements: Sequence[int],
    *,
    rank: int | None = None,
    average_atoms: float = AVERAGE_ATOMS,
    average_degree: float = AVERAGE_DEGREE,
    prediction: str = "direct",
) -> TDNConfig:
    """Translate the constructor arguments of the official model.

    Args:
        official: keyword arguments of the official constructor.
        elements: atomic numbers that the model shall know, 79 at most.
        rank: of the factors; by default 7 lmax².
        average_atoms: constant of the official code; 30.0 for models of the full PubChemQCR.
        average_degree: likewise, 16.7.
        prediction: "direct" or "gradient", as the official ``gradient_force``.

    Raises:
        InputError: an unknown option.
    """
    if unknown := sorted(set(official) - set(OFFICIAL_OPTIONS) - _IGNORED):
        raise InputError(f"unknown options of the official TDN: {', '.join(unknown)}")
    fields = {
        ours: official[theirs] for theirs, ours in OFFICIAL_OPTIONS.items() if theirs in official
    }
    fields = {"lmax": 1, **fields}
    fields["radial_hidden"] = tuple(fields.get("radial_hidden", (64, 64)))
    return TDNConfig(
        elements=tuple(elements),
        average_atoms=average_atoms,
        average_degree=average_degree,
        product="low_rank",
        rank=rank,
        norm="degree",
        attention_dropout=DROPOUT,
        prediction=prediction,  # type: ignore[arg-type]
        published=True,
        **fields,
    )


def model_from_official(
    weights: Mapping[str, Tensor],
    config: TDNConfig,
    factors: Factors | None = None,
    dtype: torch.dtype = torch.float64,
) -> TDN:
    """Build a model from official weights.

    With ``product: exact`` the factors are left out: the same network with the exact tensor.

    Args:
        weights: tensors by official name; prefixes of wrappers are dropped. Weights of the force
            head are ignored in gradient mode.
        config: translated configuration; columns of the element table are picked by its elements.
        factors: for weights that come without.
        dtype: precision of the model.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape.
    """
    state = {}
    for key, tensor in weights.items():
        name = our_name(key, len(config.radial_hidden))
        unused = config.prediction == "gradient" and name.startswith("force_")
        if not (unused or _LEGACY.search(key) or (is_factor(name) and config.product == "exact")):
            state[name] = tensor.to(dtype)
    found = {name[-4:]: tensor for name, tensor in state.items() if is_factor(name)}
    if len(found) == len(NAMES):  # of any one product: only sizes matter here
        factors = Factors(*(found[name] for name in NAMES))
    if factors is not None and config.product == "low_rank":
        config = config.model_copy(update={"rank": factors.rank})
    _pick_elements(state, config)
    with torch.random.fork_rng(devices=[]):
        model = TDN(config, factors).to(dtype)
    own = model.state_dict()
    state = {name: _like(tensor, own.get(name)) for name, tensor in state.items()}
    load_weights(model, {name: tensor for name, tensor in own.items() if is_factor(name)} | state)
    return model


def our_name(official: str, n_hidden: int) -> str:
    """Translate the name of one official parameter; radial MLPs have ``n_hidden`` layers."""
    name = without_wrappers(official)
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    if match := _RADIAL_LAYER.search(name):  # linear map, layer norm, activation take turns
        layer, norm = divmod(int(match[1]), 3)
        own = "last" if layer == n_hidden else f"{'norms' if norm else 'layers'}.{layer}"
        name = f"{name[: match.start()]}.radial.{own}.{match[2]}"
    return name


def _pick_elements(state: dict[str, Tensor], config: TDNConfig) -> None:
    """Replace linear map and bias of one-hot elements by one row for each of ours."""
    names = "atom_embed.atom_type_lin.weight", "atom_embed.atom_type_lin.bias"
    if not set(names) <= set(state):
        return  # reported as missing
    table, bias = (state.pop(name) for name in names)
    if max(config.elements) >= table.shape[1]:
        raise CheckpointError(
            f"the official table ends before atomic number {max(config.elements)} (it has "
            f"{table.shape[1]} columns): name fewer elements"
        )
    state["embedding"] = table.T[list(config.elements)] + bias


def is_factor(name: str) -> bool:
    """Whether a weight is one of the factors of a low-rank product."""
    return name.endswith(NAMES)


def _like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """Drop axes of length one, which ours do not have."""
    if own is not None and tensor.numel() == own.numel():
        squeezed = [n for n in tensor.shape if n != 1]
        if squeezed == [n for n in own.shape if n != 1]:
            return tensor.reshape(own.shape)
    return tensor
