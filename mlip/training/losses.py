"""Loss on energy per atom, forces, stress and noise: masked where labels are missing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.graph import AtomicGraph, batch_index
from mlip.penalty import penalty
from mlip.potential import Potential, Prediction
from mlip.training.config import LossConfig


class Residual(NamedTuple):
    """Prediction minus label of one quantity.

    Attributes:
        values: [n, ...] zero in rows without a label.
        known: [n] which rows have a label.
        counted: [n] which rows the loss is a mean over: those that would have a label were it not
            for noise, so that noise does not raise the weight of the rest.
    """

    values: Tensor
    known: Tensor
    counted: Tensor


class Residuals(NamedTuple):
    """Residuals of energy, forces, stress and noise; None where nothing was predicted."""

    energy: Residual  # [B] eV/atom
    forces: Residual | None  # [N, 3] eV/Å
    stress: Residual | None  # [B, 3, 3] eV/Å³
    noise: Residual | None = None  # [N, 3] in units of its standard deviation


class Weights(NamedTuple):
    """Weights of the four terms at one moment of the run."""

    energy: float
    forces: float
    stress: float
    noise: float = 0.0


class Units(NamedTuple):
    """What turns predictions into what the loss sees.

    noise: eV/Å, unit in which a potential gives the noise of corrupted atoms. residual: the loss
    divides residuals by it.
    """

    noise: float = 1.0
    residual: float = 1.0


PLAIN = Units()


def units_of(potential: Potential, config: LossConfig) -> Units:
    """Return the units of a potential.

    Raises:
        InputError: the loss shall be normalised, and elements have different scales.
    """
    if not config.normalised:
        return Units(potential.direct_scale)
    scales = set(potential.scale.values())
    if len(scales) > 1:
        raise InputError(
            "loss.normalised needs one scale for all elements, and those of this potential differ: "
            "set loss.normalised=false"
        )
    return Units(potential.direct_scale, scales.pop())


def weights_at(config: LossConfig, progress: float, noise: float = 0.0) -> Weights:
    """Return the weights when the fraction `progress` of the run is done.

    Args:
        config: of the loss.
        progress: 0 to 1.
        noise: weight of the denoising, which does not change.
    """
    energy = config.energy_weight
    if config.energy_weight_final is not None and progress >= config.switch_fraction:
        energy = config.energy_weight_final
    return Weights(energy, config.forces_weight, config.stress_weight, noise)


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


def residuals(prediction: Prediction, graph: AtomicGraph, units: Units = PLAIN) -> Residuals:
    """Subtract the labels of `graph` from a prediction (float64).

    The mask looks at the labels only, so that a NaN prediction is seen and not masked away. In a
    batch with noise, corrupted atoms have their noise as label, and no forces; structures with
    noise have no stress.

    Args:
        prediction: of the graph.
        graph: with its labels.
        units: of the potential; only the one of the noise is used.
    """
    energy, forces, stress = label_masks(graph)
    per_atom = prediction.energy / atoms_per_graph(graph)
    reference = graph.energy / atoms_per_graph(graph)
    clean_atoms, clean, noise = forces, stress, None
    if "noise" in graph and prediction.forces is not None:
        noisy = graph.noise_mask
        clean_atoms, clean = forces & ~noisy, stress & ~graph.noisy
        noise = _residual(prediction.forces / units.noise, graph.noise, noisy, forces)
    return Residuals(
        _residual(per_atom, reference, energy, energy),
        None
        if prediction.forces is None
        else _residual(prediction.forces, graph.forces, clean_atoms, forces),
        None
        if prediction.stress is None
        else _residual(prediction.stress, graph.stress, clean, stress),
        noise,
    )


def _residual(prediction: Tensor, label: Tensor, known: Tensor, counted: Tensor) -> Residual:
    mask = known.reshape(-1, *(1,) * (label.dim() - 1))
    return Residual(torch.where(mask, prediction - label, 0.0), known, counted)


def penalties(found: Residuals, config: LossConfig, units: Units) -> list[Tensor | None]:
    """Give the penalties of the rows of energy [B], forces [N], stress [B] and noise [N].

    The noise is always penalised by its length; None where nothing was predicted.
    """
    return [
        penalty(found.energy.values / units.residual, config.kind, config.energy_delta),
        None
        if found.forces is None
        else penalty(found.forces.values / units.residual, config.kind, config.forces_delta),
        None if found.stress is None else _stress_penalty(found.stress.values, config, units),
        None if found.noise is None else penalty(found.noise.values, "l1", 0.0),
    ]


def _stress_penalty(values: Tensor, config: LossConfig, units: Units) -> Tensor:
    scaled = values / units.residual
    if not config.stress_by_component:
        return penalty(scaled, config.kind, config.stress_delta)
    return penalty(scaled.reshape(-1, 1), config.kind, config.stress_delta).view(-1, 9).mean(1)


def loss_terms(found: Residuals, config: LossConfig, units: Units = PLAIN) -> Tensor:
    """Sum the penalties of energy, forces, stress and noise over the rows that have labels, [4]."""
    zero = found.energy.values.new_zeros(())
    rows = penalties(found, config, units)
    return torch.stack([zero if row is None else row.sum() for row in rows])


def label_counts(found: Residuals) -> Tensor:
    """Count the rows that the four terms are means over, [4] float64.

    Forces and noise are one mean over all atoms: the denoising weight takes the place of the
    weight of the forces.
    """
    zero = found.energy.values.new_zeros(())
    three = (found.energy, found.forces, found.stress)
    counts = [zero if residual is None else residual.counted.sum() for residual in three]
    return torch.stack([count.to(torch.float64) for count in (*counts, counts[1])])


def weighted_loss(terms: Tensor, counts: Tensor, weights: Weights) -> Tensor:
    """Combine summed terms [4] with the number of labels behind them [4].

    Each term is a mean over the labels that exist. With several processes `counts` are those
    of all of them, so that the sum of the processes' losses is the loss of one process.
    """
    factors = terms.new_tensor(weights)
    return (factors * terms / counts.clamp(min=1)).sum()


def structure_losses(
    found: Residuals, graph: AtomicGraph, config: LossConfig, units: Units = PLAIN
) -> Tensor:
    """Return the penalties of each structure, [B, 4]: used to name offenders."""
    owner = batch_index(graph)
    table = found.energy.values.new_zeros(graph.energy.shape[0], 4)
    for i, row in enumerate(penalties(found, config, units)):
        if row is not None:
            per_atom = i in (1, 3)
            table[:, i] = table[:, i].index_add(0, owner, row) if per_atom else row
    return table
