"""Turn a checkpoint of the official EquiformerV3 into a potential of ours."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip.errors import CheckpointError, InputError
from mlip.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from mlip.models.equiformer_v3_checkpoint import (
    Normalizer,
    OfficialCheckpoint,
    model_section,
    normalizers_of,
    read_checkpoint,
    read_config,
    read_references,
)
from mlip.models.equiformer_v3_official import config_from_official, model_from_official, our_name
from mlip.potential import Potential

GARBAGE = 1e6  # eV; fitted references of elements without data are zero or about 1e11


def import_potential(
    checkpoint: str | os.PathLike[str],
    *,
    content: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | None = None,
    weights: Literal["ema", "raw"] | None = None,
    references: str | os.PathLike[str] | None = None,
    elements: Sequence[int] | None = None,
    published: bool = False,
) -> Potential:
    """Read an official checkpoint.

    Args:
        checkpoint: file of the official trainer, or of a bare state dict.
        content: what ``read_checkpoint_file`` found in it, if that was called before.
        config: training YAML; default the configuration in the checkpoint.
        weights: averaged or raw; default the averaged ones, as in the official inference, and raw
            if there are no others.
        references: npz file of reference energies, in place of those in the checkpoint.
        elements: atomic numbers to keep; default those with a reference energy, or all.
        published: keep the official treatment of edges along ±y.

    Raises:
        CheckpointError: a damaged file, one with more than tensors and plain values, or weights
            that do not fit the configuration.
        InputError: another model, unsupported settings or elements.
    """
    found = read_checkpoint(checkpoint, content)
    settings = found.config if config is None else read_config(config)
    source = str(checkpoint if config is None else config)
    if settings is None:
        raise InputError(
            f"{checkpoint}: holds no configuration; give the YAML file of its training (--config)"
        )
    official = model_section(settings, source)
    table = found.references if references is None else read_references(references)
    known = _elements(found, table, elements, str(references or checkpoint))
    own = config_from_official(official, known, published=published)
    kind = weights or ("raw" if found.averaged is None else "ema")
    state = found.weights if kind == "raw" else _named_averages(found, own, str(checkpoint))
    model = model_from_official(state, own, torch.float32)
    normalizers = found.normalizers or normalizers_of(settings, source)
    scale, direct_scale = _scales(model, normalizers, source)
    return Potential(
        model,
        reference_energies={z: table[z] for z in known} if table is not None else None,
        scale=scale,
        direct_scale=direct_scale,
        metadata=_card(found, settings, official, kind, normalizers, table is not None),
    ).eval()


def _elements(
    found: OfficialCheckpoint,
    table: Sequence[float] | None,
    wanted: Sequence[int] | None,
    source: str,
) -> tuple[int, ...]:
    """Choose the elements and check that weights and references know them."""
    embedding = found.weights.get("sphere_embedding.weight")
    if embedding is None:
        raise CheckpointError(
            f"{found.facts['file']}: no weight is named sphere_embedding.weight: not EquiformerV3"
        )
    rows = range(1, min(int(embedding.shape[0]), 119))
    fitted = [
        z for z in rows
        if table is None or (z < len(table) and 0 < abs(table[z]) < GARBAGE)
    ]  # fmt: skip
    if wanted is None:
        if not fitted:
            raise CheckpointError(f"{source}: no element has a usable reference energy")
        return tuple(fitted)
    if unknown := [z for z in wanted if z not in fitted]:
        names = ", ".join(chemical_symbols[z] for z in unknown)
        raise InputError(
            f"{source}: nothing is known of {names} (no row among the embeddings, or no usable "
            "reference energy): leave them out of --elements"
        )
    return tuple(sorted(set(wanted)))


def _named_averages(
    found: OfficialCheckpoint, config: EquiformerV3Config, path: str
) -> dict[str, Tensor]:
    """Give the averaged weights, a list in the order of parameters, their official names."""
    assert found.averaged is not None
    official = {our_name(name): name for name in found.weights}
    with torch.device("meta"):
        order = [name for name, _ in EquiformerV3(config).named_parameters()]
    if sorted(order) != sorted(official):
        return dict(found.weights)  # do not fit the configuration: which ones is told there
    if len(found.averaged) != len(order):
        raise CheckpointError(
            f"{path}: {len(found.averaged)} averaged weights and {len(order)} parameters; "
            "convert the raw weights (--weights raw)"
        )
    named = {official[name]: average for name, average in zip(order, found.averaged, strict=True)}
    if wrong := [name for name in named if named[name].shape != found.weights[name].shape]:
        raise CheckpointError(
            f"{path}: the averaged weights are not in the order of the parameters: {wrong[0]} has "
            f"shape {tuple(found.weights[wrong[0]].shape)}, its average "
            f"{tuple(named[wrong[0]].shape)}; convert the raw weights (--weights raw)"
        )
    return named


def _scales(
    model: EquiformerV3, normalizers: Mapping[str, Normalizer], source: str
) -> tuple[float, float | None]:
    """Find the units of energy and of direct forces; a unit of stress goes into its head."""
    one = Normalizer(0.0, 1.0)
    energy, forces, stress = (normalizers.get(k, one) for k in ("energy", "forces", "stress"))
    for target, given in (("energy", energy), ("forces", forces), ("stress", stress)):
        if given.mean != 0.0:
            raise InputError(
                f"{source}: the normaliser of {target} has mean {given.mean:g}; the published "
                "models have 0, and nothing else can be converted (not extensive, not equivariant)"
            )
    if model.conservative:
        for target, given in (("forces", forces), ("stress", stress)):
            if target in normalizers and not math.isclose(given.scale, energy.scale, rel_tol=1e-6):
                raise InputError(
                    f"{source}: energies are scaled by {energy.scale:g} and {target} by "
                    f"{given.scale:g}: these are not the derivatives of that energy"
                )
        return energy.scale, None
    if model.config.direct_stress and stress.scale != forces.scale:
        with torch.no_grad():
            for parameter in model.stress_head.linear_2.parameters():
                parameter.mul_(stress.scale / forces.scale)
    return energy.scale, forces.scale


def _card(
    found: OfficialCheckpoint,
    settings: Mapping[str, Any],
    official: Mapping[str, Any],
    kind: str,
    normalizers: Mapping[str, Normalizer],
    with_references: bool,
) -> dict[str, Any]:
    """Tell where the potential comes from and what its energies mean."""
    training = {k: settings[k] for k in ("dataset", "loss_functions", "optim") if k in settings}
    return {
        "origin": "converted from a checkpoint of the official EquiformerV3 (arXiv 2604.09130)",
        "source": {**found.facts, "weights": "moving average" if kind == "ema" else "raw"},
        "energies": "total, with the reference energies of its training"
        if with_references
        else "relative to whatever was subtracted from the training labels: no references given",
        "normalizers": {k: {"mean": v.mean, "scale": v.scale} for k, v in normalizers.items()}
        or "none in the file: outputs are taken as eV, eV/Å and eV/Å³",
        "licence": "that of the original: ask its publisher",
        "official_model": _plain(official),
        "official_training": _plain(training),
    }


def _plain(value: Any) -> Any:
    """Reduce settings to what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
