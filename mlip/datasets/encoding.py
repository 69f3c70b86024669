"""Turn a structure into the bytes of one store entry and back: safetensors, no pickle.

Reals are float64, so that a round trip keeps every bit; flags and element numbers take one byte.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mlip.datasets.structure import Structure
from mlip.errors import DataError

_OPTIONAL = ("forces", "stress", "fixed")
_SCALARS = ("energy", "charge", "spin")


def encode(structure: Structure) -> bytes:
    """Give the bytes of a structure."""
    s = structure
    arrays: dict[str, Any] = {
        "numbers": s.numbers.astype(np.uint8), "positions": s.positions, "cell": s.cell,
        "pbc": s.pbc,
    }  # fmt: skip
    for name in _OPTIONAL:
        if getattr(s, name) is not None:
            arrays[name] = getattr(s, name)
    for name in _SCALARS:
        if getattr(s, name) is not None:
            arrays[name] = np.array(getattr(s, name))
    if s.tags is not None:
        small = s.tags.astype(np.int8)
        arrays["tags"] = small if (small == s.tags).all() else s.tags
    if s.info:
        arrays["info"] = np.frombuffer(json.dumps(s.info).encode(), dtype=np.uint8)
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def decode(data: bytes) -> Structure:
    """Read a structure from its bytes.

    Raises:
        DataError: the bytes are damaged.
    """
    try:
        fields: dict[str, Any] = load(data)
        n = len(fields["numbers"])
        shapes = {"positions": (n, 3), "cell": (3, 3), "pbc": (3,), "forces": (n, 3)}
        for name, shape in shapes.items():
            if name in fields and fields[name].shape != shape:
                raise DataError(f"{name} has shape {fields[name].shape}, expected {shape}")
        fields["numbers"] = fields["numbers"].astype(np.int64)
        for name in _SCALARS:
            if name in fields:
                fields[name] = float(fields[name])
        if "tags" in fields:
            fields["tags"] = fields["tags"].astype(np.int64)
        if "info" in fields:
            fields["info"] = json.loads(fields["info"].tobytes())
        return Structure.trusted(**fields)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the entry is damaged ({error})") from None
