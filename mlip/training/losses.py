"""Loss on energy per atom, forces and stress: masked where labels are missing, summed by count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip.graph import AtomicGraph, batch_index
from mlip.potential import Prediction
from mlip.training.config import LossConfig


class Residual(NamedTuple):
    """Prediction minus label of one quantity.

    Attributes:
        values: [n, ...] zero in rows without a label.
        known: [n] which rows have a label.
    """

    values: Tensor
    known: Tensor


class Residuals(NamedTuple):
    """Residuals of the three quantities; None where nothing was predicted."""

    energy: Residual  # [B] eV/atom
    forces: Residual | None  # [N, 3] eV/Å
    stress: Residual | None  # [B, 3, 3] eV/Å³


class Weights(NamedTuple):
    """Weights of the three terms at one moment of the run."""

    energy: float
    forces: float
    stress: float


def weights_at(config: LossConfig, progress: float) -> Weights:
    """Return the weights when the fraction `progress` of the run is done."""
    energy = config.energy_weight
    if config.energy_weight_final is not None and progress >= config.switch_fraction:
        energy = config.energy_weight_final
    return Weights(energy, config.forces_weight, config.stress_weight)


def atoms_per_graph(graph: AtomicGraph) -> Tensor:
    """Return the number of atoms of each structure, [B] int64."""
    return torch.bincount(batch_index(graph), minlength=graph.energy.shape[0])


def labelled(label: Tensor) -> Tensor:
    """Say which rows of a label [n, ...] are complete, [n] bool."""
    return ~torch.isnan(label.reshape(label.shape[0], -1)).any(-1)


def label_masks(graph: AtomicGraph) -> tuple[Tensor, Tensor, Tensor]:
    """Say where energies [B], forces [N] and stresses [B] have labels.

    A stress counts only if the structure is periodic in three directions: only then is one
    predicted.
    """
    periodic = graph.pbc.reshape(-1, 3).all(-1)
    return labelled(graph.energy), labelled(graph.forces), labelled(graph.stress) & periodic


def residuals(prediction: Prediction, graph: AtomicGraph) -> Residuals:
    """Subtract the labels of `graph` from a prediction (float64).

    The mask looks at the labels only, so that a NaN prediction is seen and not masked away.
    """
    energy, forces, stress = label_masks(graph)
    per_atom = prediction.energy / atoms_per_graph(graph)
    reference = graph.energy / atoms_per_graph(graph)
    return Residuals(
        _residual(per_atom, reference, energy),
        None if prediction.forces is None else _residual(prediction.forces, graph.forces, forces),
        None if prediction.stress is None else _residual(prediction.stress, graph.stress, stress),
    )


def _residual(prediction: Tensor, label: Tensor, known: Tensor) -> Residual:
    mask = known.reshape(-1, *(1,) * (label.dim() - 1))
    return Residual(torch.where(mask, prediction - label, 0.0), known)


def penalty(values: Tensor, kind: str, delta: float) -> Tensor:
    """Return the penalty of each row of residuals [n, ...], [n].

    It acts on the length of the row (a force vector, a stress tensor), so that the loss does
    not depend on the orientation of the structure. See `LossConfig` for the formulas.
    """
    square = values.reshape(values.shape[0], -1).square().sum(-1)
    if kind == "mse":
        return square
    small = square <= (delta * delta if kind == "huber" else 0.0)
    length = torch.where(small, 1.0, square).sqrt()  # no 0/0 in the gradient
    if kind == "l1":
        return torch.where(small, 0.0, length)
    return torch.where(small, square / (2 * delta), length - delta / 2)


def loss_terms(found: Residuals, config: LossConfig) -> Tensor:
    """Sum the penalties of energy, forces and stress over the rows that have labels, [3]."""
    deltas = (config.energy_delta, config.forces_delta, config.stress_delta)
    terms = [
        found.energy.values.new_zeros(())
        if residual is None
        else penalty(residual.values, config.kind, delta).sum()
        for residual, delta in zip(found, deltas, strict=True)
    ]
    return torch.stack(terms)


def label_counts(found: Residuals) -> Tensor:
    """Count the labels behind the three terms, [3] float64."""
    zero = found.energy.values.new_zeros(())
    counts = [zero if residual is None else residual.known.sum() for residual in found]
    return torch.stack([count.to(torch.float64) for count in counts])


def weighted_loss(terms: Tensor, counts: Tensor, weights: Weights) -> Tensor:
    """Combine summed terms [3] with the number of labels behind them [3].

    Each term is a mean over the labels that exist. With several processes `counts` are those
    of all of them, so that the sum of the processes' losses is the loss of one process.
    """
    factors = terms.new_tensor(weights)
    return (factors * terms / counts.clamp(min=1)).sum()


def structure_losses(found: Residuals, graph: AtomicGraph, config: LossConfig) -> Tensor:
    """Return the three penalties of each structure, [B, 3]: used to name offenders."""
    owner = batch_index(graph)
    size = graph.energy.shape[0]
    table = found.energy.values.new_zeros(size, 3)
    table[:, 0] = penalty(found.energy.values, config.kind, config.energy_delta)
    if found.forces is not None:
        rows = penalty(found.forces.values, config.kind, config.forces_delta)
        table[:, 1] = table[:, 1].index_add(0, owner, rows)
    if found.stress is not None:
        table[:, 2] = penalty(found.stress.values, config.kind, config.stress_delta)
    return table
