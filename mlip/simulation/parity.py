"""Parity plots: predicted against reference energies, forces and stress."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip.errors import require
from mlip.files import atomic_write

MAX_POINTS = 50_000
LABELS = {
    "energy": "energy (eV/atom)",
    "forces": "force component (eV/Å)",
    "stress": "stress (GPa)",
}


class ParityPoints:
    """An evenly thinned sample of pairs, bounded in memory however many are added."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._kept = 0
        self._seen = 0
        self._stride = 1

    def add(self, reference: np.ndarray, predicted: np.ndarray) -> None:
        """Add pairs of any equal shape; pairs with NaN are left out."""
        pairs = np.stack([reference.ravel(), predicted.ravel()], axis=1)
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        first = -self._seen % self._stride
        self._seen += len(pairs)
        self._pieces.append(pairs[first :: self._stride])
        self._kept += len(self._pieces[-1])
        while self._kept > MAX_POINTS:
            self._stride *= 2
            self._pieces = [self.array()[::2]]
            self._kept = len(self._pieces[0])

    def array(self) -> np.ndarray:
        """Return the sample, [n, 2]: reference, predicted."""
        return np.concatenate(self._pieces) if self._pieces else np.zeros((0, 2))


def save_parity_plot(
    points: Mapping[str, ParityPoints], errors: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Draw one panel for each quantity that has points.

    Args:
        points: by ``energy``, ``forces``, ``stress``.
        errors: ``mae`` and ``rmse`` of each, in the plotted units.
        path: PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", extra="train")
    canvas = require("matplotlib.backends.backend_agg", extra="train")
    shown = [name for name in LABELS if len(points[name].array())]
    figure = figure_module.Figure(figsize=(4.6 * max(1, len(shown)), 4.4), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    for k, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), k + 1)
        _panel(axes, points[name].array(), LABELS[name], errors[name])
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _panel(axes: Any, pairs: np.ndarray, label: str, errors: Mapping[str, Any]) -> None:
    low, high = float(pairs.min()), float(pairs.max())
    margin = 0.04 * (high - low) or 0.1
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color="0.6", linewidth=1, zorder=1)
    axes.plot(pairs[:, 0], pairs[:, 1], ".", markersize=3, alpha=0.5, rasterized=True)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel(f"reference {label}")
    axes.set_ylabel(f"predicted {label}")
    text = f"MAE {errors['mae']:.4g}\nRMSE {errors['rmse']:.4g}\nn = {errors['count']}"
    axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top")
