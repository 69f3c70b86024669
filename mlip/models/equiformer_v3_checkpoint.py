"""Read checkpoints of the official EquiformerV3 trainer without running anything in them.

A checkpoint is a dictionary pickled by torch: raw weights (``state_dict``), averaged weights
(``ema``: a list without names, in the order of the parameters), ``normalizers``, ``elementrefs``
and the training ``config``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from torch import Tensor

from mlip.errors import CheckpointError, InputError
from mlip.files import file_sha256
from mlip.models.official_files import read_checkpoint_file, state_of

NAMES = ("equiformer_v3", "equiformer_v3_dens")
_BUFFERS = re.compile(
    r"(^|\.)(so3_rotation\.\w+|so3_grid\.\w+|expand_index|balance_degree_weight"
    r"|zero_padded_change_matrix|distance_expansion\.offset)$"
)


class Normalizer(NamedTuple):
    """A target in physical units is ``scale`` · output + ``mean``."""

    mean: float
    scale: float


class OfficialCheckpoint(NamedTuple):
    """What a file of the official trainer holds.

    weights: raw ones, by official name without prefixes and buffers. averaged: of the moving
    average, in the order of the parameters, or None. normalizers: by target. references: eV by
    atomic number, or None. config: the training configuration, or None. facts: file name, SHA-256,
    epoch and step.
    """

    weights: dict[str, Tensor]
    averaged: list[Tensor] | None
    normalizers: dict[str, Normalizer]
    references: list[float] | None
    config: dict[str, Any] | None
    facts: dict[str, Any]


def read_checkpoint(
    path: str | os.PathLike[str], content: Mapping[str, Any] | None = None
) -> OfficialCheckpoint:
    """Read tensors and plain values; no code in the file runs.

    Args:
        path: of the file.
        content: what ``read_checkpoint_file`` found in it, if that was called before.

    Raises:
        CheckpointError: missing or damaged file, one that holds more than tensors and plain
            values, or one of another layout.
    """
    if content is None:
        content = read_checkpoint_file(path)
    weights = state_of(content, path)
    config = content.get("config")
    return OfficialCheckpoint(
        {name: tensor for name, tensor in weights.items() if not _BUFFERS.search(name)},
        _averaged(content.get("ema"), path),
        _normalizers(content.get("normalizers"), str(path)),
        _references(content.get("elementrefs"), path),
        dict(config) if isinstance(config, Mapping) else None,
        {"file": Path(path).name, "sha256": file_sha256(path)}
        | {k: content[k] for k in ("epoch", "step") if isinstance(content.get(k), int | float)},
    )


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the YAML file of a training run.

    Raises:
        InputError: missing file, not YAML, or not a mapping.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected the settings of a training run, with a model section")
    return found


def read_references(path: str | os.PathLike[str]) -> list[float]:
    """Read an official npz file of reference energies: ``coeff``, eV by atomic number.

    Raises:
        InputError: missing or damaged file, or no such array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            values = np.asarray(file["coeff"], dtype=np.float64)
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise InputError(
            f"{path}: expected an npz file with the array 'coeff' (eV by atomic number): {error}"
        ) from error
    if values.ndim != 1:
        raise InputError(f"{path}: coeff has {values.ndim} axes; expected one, by atomic number")
    return [float(v) for v in values]


def model_section(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Find the constructor arguments of the model in a training configuration.

    Raises:
        InputError: there are none, or they are of another model.
    """
    model = config.get("model", config)
    if isinstance(model, str):  # an older layout
        model = {"name": model, **(config.get("model_attributes") or {})}
    if not isinstance(model, Mapping) or "name" not in model:
        hint = (
            f" (it includes {config['includes']}: give that file)" if "includes" in config else ""
        )
        raise InputError(f"{source}: no model section with a name{hint}")
    if model["name"] not in NAMES:
        raise InputError(
            f"{source}: the model is {model['name']!r}; only {' and '.join(NAMES)} can be converted"
        )
    return dict(model)


def normalizers_of(config: Mapping[str, Any], source: str) -> dict[str, Normalizer]:
    """Find the normalisers in a training configuration; empty if it has none."""
    dataset = config.get("dataset")
    for section in (dataset, dataset.get("train") if isinstance(dataset, Mapping) else None):
        transforms = section.get("transforms") if isinstance(section, Mapping) else None
        if isinstance(transforms, Mapping) and isinstance(transforms.get("normalizer"), Mapping):
            values = transforms["normalizer"]
            return _normalizers({k: v for k, v in values.items() if k != "fit"}, source)
    return {}


def _averaged(ema: Any, path: str | os.PathLike[str]) -> list[Tensor] | None:
    if not ema:
        return None
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list | tuple) or not all(isinstance(t, Tensor) for t in shadow):
        raise CheckpointError(f"{path}: its 'ema' holds no list of tensors 'shadow_params'")
    return list(shadow)


def _normalizers(found: Any, source: str) -> dict[str, Normalizer]:
    result = {}
    for target, values in (found or {}).items():
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{source}: normaliser of {target} is not a mapping")
        scale = next((values[k] for k in ("rmsd", "std", "stdev") if values.get(k) is not None), 1)
        numbers = [float(v) for v in (values.get("mean") or 0.0, scale)]
        if not np.isfinite(numbers).all() or numbers[1] <= 0:
            raise CheckpointError(f"{source}: normaliser of {target} has mean, scale {numbers}")
        result[str(target)] = Normalizer(*numbers)
    return result


def _references(found: Any, path: str | os.PathLike[str]) -> list[float] | None:
    values = found.get("energy") if isinstance(found, Mapping) else None
    if values is None:
        return None
    values = values.get("element_references") if isinstance(values, Mapping) else values
    if not isinstance(values, Tensor) or values.ndim != 1:
        raise CheckpointError(
            f"{path}: its 'elementrefs' for energy are not one number for each atomic number"
        )
    return [float(v) for v in values]
