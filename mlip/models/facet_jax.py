"""Import weights of the official JAX Facet into the published setting of our implementation.

Reads flattened parameter names ("params/mace/layer_0/…") and the model section of the official
configuration; never runs or unpickles foreign code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.errors import CheckpointError, InputError
from mlip.models.facet import Facet
from mlip.models.facet_config import FacetConfig
from mlip.models.official_files import load_weights

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "normalized_silu": "normalized_silu",
    "normalized_ssp": "normalized_shifted_softplus",
    "Identity": "identity",
}
ENVELOPE_NAMES = {"exp": "exponential", "xplor": "xplor"}
UPDATE_NAMES = {"s2-mlp-mixer": "sphere_grid", "gate": "gate", "linear": "linear"}
RESCALE_NAMES = {"species-wise": "species_sum", "sevennet": "sevennet"}


def facet_config_from_jax(
    official: Mapping[str, Any], elements: Sequence[int], average_neighbors: float, cutoff: float
) -> FacetConfig:
    """Translate the model section of an official configuration.

    Args:
        official: the section as a dictionary.
        elements: atomic number of each row of the species table after the padding row.
        average_neighbors: neighbour count the messages are divided by, at the learned cutoff.
        cutoff: learned cutoff, Å.

    Raises:
        InputError: an option that the published models do not use.
    """
    try:
        return FacetConfig(
            elements=tuple(elements),
            cutoff=cutoff,
            average_neighbors=average_neighbors,
            natural_parity=False,
            trainable_cutoff=True,
            hidden=tuple(_channels(irreps) for irreps in official["hidden_irreps"]),
            embedding=official["node_embed"]["embed_dim"],
            outputs=official["outs_per_node"],
            **_radial_fields(official),
            **_update_fields(official["self_connection"]),
            **_block_fields(official),
        )
    except KeyError as error:
        raise InputError(
            f"the official configuration has no entry or no known value for {error}: it is not "
            "one of the published Facet or SevenNet configurations"
        ) from error


def _radial_fields(official: Mapping[str, Any]) -> dict[str, Any]:
    basis = official["edge_embed"]["radial_basis"]
    envelope = official["edge_embed"]["envelope"]
    message = official["interaction"]["message"]
    return {
        "n_radial": basis["num_basis"],
        "radial_basis": "gaussian" if basis["kind"] == "gauss" else "sine",
        "radial_hidden": tuple(message["radial_weight"]["inner_dims"]),
        "radial_activation": ACTIVATION_NAMES[message["radial_weight"]["activation"]],
        "envelope": ENVELOPE_NAMES[envelope["kind"]],
        "envelope_start": envelope["cutoff_start"],
        "envelope_curvature": envelope.get("c", 0.1),
        "lmax_edge": message["max_ell"],
        "neighbor_power": float(message["radial_power"]),
    }


def _update_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"node_update": UPDATE_NAMES[section["kind"]]}
    if section["kind"] == "s2-mlp-mixer":
        grid, mlp = section["s2_grid"], section["mlp"]
        fields |= {
            "grid": (grid["res_beta"], grid["res_alpha"]),
            "quadrature": {"soft": "soft", "gausslegendre": "gauss_legendre"}[grid["quadrature"]],
            "mixer_hidden": tuple(mlp["inner_dims"]),
            "mixer_heads": mlp["num_heads"],
            "activation": ACTIVATION_NAMES[mlp["activation"]],
            "final_activation": ACTIVATION_NAMES[mlp["final_activation"]],
            "mixer_normalization": mlp["normalization"] == "layer",
        }
    return fields


def _block_fields(official: Mapping[str, Any]) -> dict[str, Any]:
    head = official["head"]
    return {
        "linear_before": official["interaction"]["linear_intro"],
        "block_residual": official["residual"],
        "residual_normalization": official["residual"],
        "output_normalization": official["norm"] == "layer",
        "readout": official["block_reduction"],
        "readout_linear": official["readout"]["kind"] == "linear",
        "head_hidden": tuple(head["inner_dims"]),
        "head_activation": ACTIVATION_NAMES[head["activation"]],
        "head_normalization": head["normalization"] == "layer",
        "rescale": RESCALE_NAMES[official["rescale"]["kind"]],
    }


def facet_from_jax(
    weights: Mapping[str, np.ndarray],
    official: Mapping[str, Any],
    elements: Sequence[int],
    average_neighbors: float,
    constants: Mapping[str, np.ndarray] | None = None,
) -> Facet:
    """Build a Facet (float64) from official weights.

    Args:
        weights: arrays by flattened name, ``"params/"`` included.
        official: model section of the official configuration.
        elements: atomic number of each row of the species table after the padding row.
        average_neighbors: neighbour count at the learned cutoff.
        constants: data-set constants used where the rescaling is not trainable:
            ``atomwise_scale``, ``atomwise_shift`` (rows), ``scale_energy``, ``shift_energy``.

    Raises:
        InputError: an option that the published models do not use.
        CheckpointError: a weight is missing, left over or of another shape.
    """
    weights = _untrained(official) | dict(weights)
    cutoff = float(weights["params/edge_embedding/rmax"][0])
    config = facet_config_from_jax(official, elements, average_neighbors, cutoff)
    state = {
        _our_name(name): torch.from_numpy(np.array(array, dtype=np.float64))
        for name, array in weights.items()
    }
    _trim_species(state, constants or {}, config)
    with torch.random.fork_rng(devices=[]):
        model = Facet(config).double()
    load_weights(model, state)
    return model


def _untrained(official: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Radial parameters by the configuration, for those that were not trained."""
    section = official["edge_embed"]
    basis, prefix = section["radial_basis"], "params/edge_embedding/"
    values = {f"{prefix}rmax": np.array([section["r_max"]], dtype=np.float64)}
    count = int(basis["num_basis"])
    if basis["kind"] == "gauss":
        values[f"{prefix}basis/mu"] = np.linspace(0.0, basis["mu_max"], count)
        values[f"{prefix}basis/sigma"] = np.array([basis["sd"]], dtype=np.float64)
    else:
        values[f"{prefix}basis/freq"] = np.arange(1.0, count + 1)
    return values


def _trim_species(
    state: dict[str, Tensor], constants: Mapping[str, np.ndarray], config: FacetConfig
) -> None:
    """Drop the padding row of species tables; fill constants that were not trained."""
    names = {"species_scale": "atomwise_scale", "species_shift": "atomwise_shift"}
    if config.rescale == "species_sum":
        names |= {"global_scale": "scale_energy", "global_shift": "shift_energy"}
    for ours, theirs in names.items():
        if ours not in state and theirs in constants:
            values = np.array(constants[theirs], dtype=np.float64).reshape(-1)
            state[ours] = torch.from_numpy(values)
    for name in ("embedding", "species_scale", "species_shift"):
        if name in state:
            state[name] = state[name][1:]


def _channels(irreps: str) -> tuple[int, ...]:
    """Read "8x0e + 4x1e + 2x2e" as (8, 4, 2)."""
    pairs = [re.fullmatch(r"\s*(\d+)x(\d+)e\s*", part) for part in irreps.split("+")]
    if any(pair is None for pair in pairs):
        raise InputError(f"irreps {irreps!r}: expected even parity like '8x0e + 4x1e'")
    table = {int(pair[2]): int(pair[1]) for pair in pairs if pair}
    return tuple(table.get(degree, 0) for degree in range(max(table) + 1))


_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"params/node_embedding/embed/embedding", "embedding"),
        (r"params/edge_embedding/rmax", "radius"),
        (r"params/edge_embedding/basis/freq", "radial_basis.frequencies"),
        (r"params/edge_embedding/basis/mu", "radial_basis.centres"),
        (r"params/edge_embedding/basis/sigma", "radial_basis.width"),
        (r"params/head/Dense_(\d+)/kernel", r"head.kernels.\1"),
        (r"params/head/LayerNorm_(\d+)/scale", r"head.norm_scales.\1"),
        (r"params/rescale/(scale|shift)", r"species_\1"),
        (r"params/rescale/global_(scale|shift)", r"global_\1"),
        (
            r"params/mace/layer_(\d+)/interaction/SimpleInteraction_0/SevenNetConv_0"
            r"/LazyInMLP_0/Dense_(\d+)/kernel",
            r"blocks.\1.radial.kernels.\2",
        ),
        (
            r"params/mace/layer_(\d+)/interaction/SimpleInteraction_0/linear_intro"
            r"/w\[\d+,\d+\] \d+x\d+e,\d+x(\d+)e",
            r"blocks.\1.before.weights.\2",
        ),
        (
            r"params/mace/layer_(\d+)/interaction/SimpleInteraction_0/linear_outro"
            r"/w\[\d+,\d+\] \d+x\d+e,\d+x(\d+)e",
            r"blocks.\1.after.weights.\2",
        ),
        (
            r"params/mace/layer_(\d+)/interaction/resid_adapter/w\[\d+,\d+\] \d+x\d+e,\d+x(\d+)e",
            r"blocks.\1.skip.weights.\2",
        ),
        (r"params/mace/layer_(\d+)/resid_ln/ln_scale", r"blocks.\1.residual_gain.gain"),
        (r"params/mace/layer_(\d+)/E3LayerNorm_0/ln_scale", r"blocks.\1.output_gain.gain"),
        (
            r"params/mace/layer_(\d+)/self_connection/proj_(up|down)"
            r"/w\[\d+,\d+\] \d+x\d+e,\d+x(\d+)e",
            r"blocks.\1.update.\2.weights.\3",
        ),
        (
            r"params/mace/layer_(\d+)/self_connection/(?:mlp|LazyInMLP_0)/Dense_(\d+)/kernel",
            r"blocks.\1.update.mlp.kernels.\2",
        ),
        (
            r"params/mace/layer_(\d+)/self_connection/(?:mlp|LazyInMLP_0)/LayerNorm_(\d+)/scale",
            r"blocks.\1.update.mlp.norm_scales.\2",
        ),
        (
            r"params/mace/layer_(\d+)/readout/Linear_0/w\[\d+,\d+\] \d+x0e,\d+x(0)e",
            r"readouts.\1.weights.\2",
        ),
    )
)


def _our_name(name: str) -> str:
    for pattern, replacement in _RULES:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    raise CheckpointError(f"official weight {name!r} is unknown: not a published Facet model")
