"""Errors of energy per atom, force components and stress: sums that add up over batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlip.training.config import LossConfig
from mlip.training.losses import (
    PLAIN,
    Residuals,
    Units,
    Weights,
    label_counts,
    loss_terms,
)

GPA = 160.21766208  # eV/Å³ in GPa

_COLUMNS = (  # name, unit, eV-based residual to that unit
    ("energy", "meV_per_atom", 1e3),
    ("forces", "meV_per_A", 1e3),
    ("stress", "GPa", GPA),
)

COLUMNS = (
    "loss",
    *(f"{name}_{kind}_{unit}" for name, unit, _ in _COLUMNS for kind in ("mae", "rmse")),
)


class ErrorSums:
    """Running sums behind MAE, RMSE and loss; sums of two processes add up to the total.

    Attributes:
        values: [5, 4] float64, the columns being energy, forces, stress and noise; the rows the
            sum of |x|, of x², the number of components, the sum of the penalties, the number of
            rows that the loss is a mean over.
    """

    def __init__(self) -> None:
        self.values = torch.zeros(5, 4, dtype=torch.float64)

    def add(self, sums: Tensor) -> None:
        """Add what `batch_sums` gave for a batch."""
        self.values += sums.to(self.values.device)

    def result(self, weights: Weights) -> dict[str, float]:
        """Return loss and errors by the names of `COLUMNS`; NaN where there was no label."""
        absolute, square, components, penalties, labels = self.values.tolist()
        found = {
            "loss": sum(w * p / n for w, p, n in zip(weights, penalties, labels, strict=True) if n)
        }
        for i, (name, unit, scale) in enumerate(_COLUMNS):
            n = components[i] or math.nan
            found[f"{name}_mae_{unit}"] = scale * absolute[i] / n
            found[f"{name}_rmse_{unit}"] = scale * math.sqrt(square[i] / n)
        return found


def combined(parts: Sequence[ErrorSums]) -> ErrorSums:
    """Give the sums over several sets."""
    whole = ErrorSums()
    for part in parts:
        whole.add(part.values)
    return whole


def results_of(
    names: Sequence[str], parts: Sequence[ErrorSums], weights: Weights
) -> dict[str, float]:
    """Return the errors over several sets, and if there are several, ``<name>_…`` of each."""
    found = combined(parts).result(weights)
    for name, part in zip(names, parts, strict=True) if len(parts) > 1 else ():
        found |= {f"{name}_{key}": value for key, value in part.result(weights).items()}
    return found


def batch_sums(
    found: Residuals, terms: Tensor | None, config: LossConfig, units: Units = PLAIN
) -> Tensor:
    """Sum errors and penalties of a batch, [5, 4] as in `ErrorSums.values`.

    Args:
        found: residuals of the batch.
        terms: summed penalties [4] if they are known already.
        config: shape of the penalties.
        units: of the potential.
    """
    with torch.no_grad():
        terms = loss_terms(found, config, units) if terms is None else terms.detach()
        counted = label_counts(found)
        zero = counted.new_zeros(())
        absolute, square, components = [zero] * 4, [zero] * 4, [zero] * 4
        for i, residual in enumerate(found):
            if residual is not None:
                absolute[i] = residual.values.abs().sum()
                square[i] = residual.values.square().sum()
                per_row = residual.values[:1].numel()
                components[i] = (residual.known.sum() * per_row).to(torch.float64)
        rows = [torch.stack(row) for row in (absolute, square, components)]
        return torch.stack([*rows, terms, counted])
