"""Weights that other programs wrote: read without running anything, loaded without gaps."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mlip.errors import CheckpointError

Architecture = Literal["equiformer_v3", "tdn"]
_MARKS: dict[Architecture, str] = {  # a weight that the architecture alone has
    "equiformer_v3": "sphere_embedding.weight",
    "tdn": "atom_embed.atom_type_lin.weight",
}
_STATES = ("state_dict", "model_state_dict")
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # of DDP and torch.compile


def read_checkpoint_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``torch.save`` wrote: tensors and plain values; no code in the file runs.

    Raises:
        CheckpointError: missing or damaged file, one that holds more than tensors and plain
            values, or something other than a dictionary.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; give an official checkpoint")
    try:
        with torch.serialization.safe_globals(_plain_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path}: not a plain file of tensors{what}. Reading it fully could run code in it, so "
            "nothing was read: it is damaged, malicious, or holds objects of other programs; get "
            "the file again from its publisher, or one with weights and plain values alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, IndexError,
            AttributeError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a complete file of torch.save ({reason}); it may be truncated or of "
            "another kind: fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def state_of(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Find the weights in a training checkpoint, or in a bare state dict; prefixes are dropped.

    Raises:
        CheckpointError: there are none, a name stands twice, or something is not a tensor.
    """
    bare = bool(content) and all(isinstance(value, Tensor) for value in content.values())
    state = content if bare else next((content[k] for k in _STATES if k in content), None)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{path}: no {' or '.join(map(repr, _STATES))} among its entries "
            f"({_some(map(str, content))}); give an official checkpoint"
        )
    weights = {without_wrappers(str(name)): tensor for name, tensor in state.items()}
    if len(weights) < len(state) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(f"{path}: state_dict holds a name twice, or something not a tensor")
    return weights


def recognise(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Architecture:
    """Tell of which architecture an official checkpoint is.

    Raises:
        CheckpointError: it holds no weights, or none of a model that can be converted.
    """
    weights = state_of(content, path)
    for architecture, mark in _MARKS.items():
        if mark in weights:
            return architecture
    raise CheckpointError(
        f"{path}: its weights ({_some(weights)}) are not of a model that can be converted: "
        f"{', '.join(f'{name} has {mark}' for name, mark in _MARKS.items())}"
    )


def without_wrappers(name: str) -> str:
    """Drop what parallel and compiled modules put before the names of their weights."""
    return _WRAPPERS.sub("", name)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load translated weights, all of them and nothing else; empty ones need not be there.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape.
    """
    own = model.state_dict()
    missing = [name for name, tensor in own.items() if name not in state and tensor.numel()]
    unknown = [name for name in state if name not in own]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    if missing or unknown or wrong:
        problems = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        raise CheckpointError(
            "official weights do not fit the configuration (names are ours): "
            + "; ".join(f"{what}: {_some(names)}" for what, names in problems if names)
        )
    model.load_state_dict(own | dict(state))


def _plain_numbers() -> list[Any]:
    """Numbers of NumPy, which trainers leave among metrics, in the names of NumPy 1 and 2."""
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [np.dtype, *kinds, *((scalar, f"{module}.scalar") for module in modules)]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
