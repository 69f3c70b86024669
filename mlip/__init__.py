"""Machine-learning interatomic potentials: data in, potentials trained, crystals simulated.

Public names are loaded on first use, so that ``import mlip`` stays fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AtomicGraph": "mlip.graph",
    "atoms_to_graph": "mlip.graph",
    "Potential": "mlip.potential",
    "load_potential": "mlip.potential",
    "Calculator": "mlip.simulation.calculator",
    "relax": "mlip.simulation.relax",
    "run_md": "mlip.simulation.md",
    "predict": "mlip.simulation.predict",
    "evaluate": "mlip.simulation.evaluate",
    "open_dataset": "mlip.datasets",
    "convert": "mlip.datasets.convert",
    "train": "mlip.training.run",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
