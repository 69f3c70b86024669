"""Files of potentials: one safetensors file, its header holding JSON. No pickle anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mlip import __version__
from mlip.errors import CheckpointError
from mlip.files import atomic_write

FORMAT = "mlip-potential"
FORMAT_VERSION = 1

# Upgrades of older headers and weights, one for each version step: {1: upgrade_1_to_2, …}.
Upgrade = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
UPGRADES: dict[int, Upgrade] = {}


def save(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write weights and header, all or nothing.

    Args:
        path: final name.
        tensors: weights by name.
        header: JSON-able description; format and versions are added.

    Raises:
        MlipError: the file cannot be written.
    """
    full = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        **header,
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = serialize(contiguous, metadata={"mlip": json.dumps(full, ensure_ascii=False)})
    with atomic_write(path) as file:
        file.write(data)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON header without the weights.

    Raises:
        CheckpointError: missing, corrupt, truncated, foreign or newer file.
    """
    return _read(path, with_tensors=False)[1]


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and header, upgraded to the present format.

    Raises:
        CheckpointError: missing, corrupt, truncated, foreign or newer file.
    """
    tensors, header = _read(path, with_tensors=True)
    while header["format_version"] < FORMAT_VERSION:
        tensors, header = UPGRADES[header["format_version"]](tensors, header)
    return tensors, header


def _read(
    path: str | os.PathLike[str], with_tensors: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .safetensors potential")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); it may be truncated, an "
            "interrupted download, or of another kind: fetch or write it again"
        ) from error
    try:
        header = json.loads(metadata["mlip"])
        version = int(header["format_version"])
        known = header["format"] == FORMAT and version >= 1
    except (KeyError, ValueError, TypeError):
        known, version, header = False, 0, {}
    if not known:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a potential of this package "
            "(its header has no 'mlip' entry); use a file written by Potential.save"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version} is newer than this package reads "
            f"({FORMAT_VERSION}); upgrade to mlip >= {header.get('package_version', '?')}"
        )
    return tensors, header
