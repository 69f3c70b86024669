"""Structures on disk: the native store, anything ASE reads, conversion and its report."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Structure": "mlip.datasets.structure",
    "structure_to_graph": "mlip.datasets.structure",
    "LabelKeys": "mlip.datasets.labels",
    "StructureStore": "mlip.datasets.store",
    "StructureWriter": "mlip.datasets.writer",
    "open_dataset": "mlip.datasets.collection",
    "ConversionReport": "mlip.datasets.report",
    "split_indices": "mlip.datasets.split",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlip.datasets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
