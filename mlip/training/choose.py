"""Choose the settings that a user left open from what the training set holds."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip.errors import InputError
from mlip.models import config_class
from mlip.training.config import TrainConfig
from mlip.training.survey import Survey

DEFAULT_CUTOFF = 5.0  # Å
_TARGET_STEPS = 20_000  # of a run without `epochs`
_SIZES: tuple[tuple[float, dict[str, Any]], ...] = (  # below so many force components: Facet size
    (3_000, {"hidden": ((16, 8),), "message": (16, 16, 16)}),
    (100_000, {"hidden": ((32, 16),), "message": (32, 32, 32)}),
    (float("inf"), {"hidden": ((32, 16),), "message": (32, 32, 32, 32)}),
)


def cutoff_of(config: TrainConfig) -> float:
    """Return the neighbour cutoff of the model that will be trained, Å.

    Raises:
        InputError: not a positive number.
    """
    cutoff = config.model.get("cutoff", DEFAULT_CUTOFF)
    if not isinstance(cutoff, int | float) or not cutoff > 0:
        raise InputError(f"model.cutoff is {cutoff!r}: expected a length in Å, e.g. 5.0")
    return float(cutoff)


def choose_settings(
    config: TrainConfig, train: Survey, weights: NDArray[np.float32] | None = None
) -> TrainConfig:
    """Fill in model size, elements, batch size and number of epochs.

    Args:
        config: settings as the user gave them; what is set stays.
        train: survey of the training set.
        weights: [n] expected appearances of each structure in an epoch; None: once each.
    """
    batch = config.batch
    if batch.max_edges is None:
        batch = batch.model_copy(update={"max_edges": _edge_budget(train)})
    epochs = config.epochs
    if epochs is None:
        edges = train.n_edges.sum() if weights is None else weights @ train.n_edges
        steps = max(1, int(edges) // (batch.max_edges or 1))
        limited = config.max_steps is not None or config.max_time_minutes is not None
        epochs = 1_000_000 if limited else int(np.clip(_TARGET_STEPS // steps, 20, 1000))
    out = config.out if config.out is not None else default_folder(config)
    return config.model_copy(
        update={
            "batch": batch,
            "epochs": epochs,
            "model": _model_settings(config.model, train),
            "out": str(Path(out).resolve()),
        }
    )


def default_folder(config: TrainConfig) -> str:
    """Name a run folder after the training data."""
    first = config.data.sets("train")[0].paths[0]
    return str(Path("runs") / Path(first).name.split(".")[0])


def _edge_budget(train: Survey) -> int:
    """Aim at 100 batches an epoch of 1 to 32 structures; the largest structure must fit."""
    structures = float(np.clip(len(train.n_atoms) / 100, 1, 32))
    wanted = structures * float(train.n_edges.mean())
    return max(int(np.ceil(wanted)), int(train.n_edges.max()), 1)


def check_model_settings(given: dict[str, Any]) -> None:
    """Refuse settings that the model does not have, naming the nearest one.

    Raises:
        InputError: unknown model or setting.
    """
    known = list(config_class(given["name"]).model_fields)
    for key in given:
        if key != "name" and key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise InputError(f"model {given['name']!r} has no setting {key!r}: {hint}")


def _model_settings(given: dict[str, Any], train: Survey) -> dict[str, Any]:
    fields = config_class(given["name"]).model_fields
    settings: dict[str, Any] = {
        "elements": train.elements,
        "cutoff": DEFAULT_CUTOFF,
        "average_neighbors": max(train.average_neighbors, 1.0),
    }
    if "hidden" not in given and "message" not in given:
        settings |= next(size for limit, size in _SIZES if train.forces_count < limit)
    return {**{k: v for k, v in settings.items() if k in fields}, **given}
