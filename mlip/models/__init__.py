"""Models by name: each maps a graph with edge vectors to one energy for each atom."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from mlip.errors import InputError

_MODELS = {
    "equiformer_v3": ("mlip.models.equiformer_v3", "EquiformerV3", "EquiformerV3Config"),
    "facet": ("mlip.models.facet", "Facet", "FacetConfig"),
    "tdn": ("mlip.models.tdn", "TDN", "TDNConfig"),
}


def model_names() -> tuple[str, ...]:
    """List the names that :func:`create_model` knows."""
    return tuple(sorted(_MODELS))


def config_class(name: str) -> Any:
    """Return the pydantic configuration class of a model.

    Raises:
        InputError: no model has this name.
    """
    return getattr(*_entry(name, 2))


def model_name(model: nn.Module) -> str:
    """Return the name under which the class of a model is registered, or its own in lower case."""
    own = type(model).__name__
    return next((name for name, (_, kind, _) in _MODELS.items() if kind == own), own.lower())


def create_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a model with random weights (drawn from torch's default generator).

    Args:
        name: registered name, for instance ``"facet"``.
        config: fields of the model's configuration class.

    Raises:
        InputError: unknown model, unknown field or invalid value.
    """
    try:
        validated = config_class(name)(**config)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise InputError(f"configuration of model {name!r}: {problems}") from error
    return getattr(*_entry(name, 1))(validated)


def _entry(name: str, position: int) -> tuple[Any, str]:
    if name not in _MODELS:
        raise InputError(f"no model is named {name!r}: use one of {', '.join(model_names())}")
    return importlib.import_module(_MODELS[name][0]), _MODELS[name][position]
