"""Turn a checkpoint of the official TDN into a potential of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.files import file_sha256
from mlip.models.official_files import read_checkpoint_file, state_of
from mlip.models.tdn_official import (
    OFFICIAL_AVERAGES,
    config_from_official,
    is_factor,
    model_from_official,
    official_sizes,
)
from mlip.ops.tensor_products import Factors, load_factors
from mlip.potential import Potential

TrainingSet = Literal["PubChemQCR-S", "PubChemQCR"]
CUTOFF = 4.5  # Å, of the published models; the files do not hold it
PUBCHEMQCR = (
    *(1, 4, 5, 6, 7, 8, 9, 14, 15, 16, 17),
    *range(21, 30),
    *range(31, 36),
)  # elements with an atom energy in the official data pipeline: it reads no others


def import_tdn(
    checkpoint: str | os.PathLike[str],
    *,
    content: Mapping[str, Any] | None = None,
    elements: Sequence[int] | None = None,
    cutoff: float = CUTOFF,
    trained_on: TrainingSet = "PubChemQCR-S",
    factors: str | os.PathLike[str] | None = None,
    gradient: bool = False,
) -> Potential:
    """Read an official checkpoint; sizes come from the shapes of its weights.

    Args:
        checkpoint: a training checkpoint, or a bare state dict.
        content: what ``read_checkpoint_file`` found in it, if that was called before.
        elements: atomic numbers to keep; default those of PubChemQCR.
        cutoff: Å.
        trained_on: sets average numbers of atoms and neighbours, constants of the official code.
        factors: cache file of the official low-rank factors, for weights that come without.
        gradient: forces are derivatives, as with the official ``gradient_force``, and the force
            head is left out.

    Raises:
        CheckpointError: a damaged file, one with more than tensors and plain values, or weights of
            another model.
        DataError: no usable factors in that file.
        InputError: an element beyond those of the weights, or an unknown training set.
    """
    if trained_on not in get_args(TrainingSet):
        raise InputError(f"unknown training set {trained_on!r}; use PubChemQCR-S or PubChemQCR")
    if not cutoff > 0:
        raise InputError(f"the cutoff is {cutoff} Å; expected more than 0")
    if content is None:
        content = read_checkpoint_file(checkpoint)
    weights = state_of(content, checkpoint)
    average_atoms, average_degree = OFFICIAL_AVERAGES[trained_on]
    config = config_from_official(
        {**official_sizes(weights), "cutoff": cutoff},
        tuple(sorted(set(elements or PUBCHEMQCR))),
        average_atoms=average_atoms,
        average_degree=average_degree,
        prediction="gradient" if gradient else "direct",
    )
    given = _factors(weights, factors, checkpoint)
    model = model_from_official(weights, config, given, torch.float32)
    facts = {k: content[k] for k in ("epoch",) if isinstance(content.get(k), int | float)}
    source = {"file": Path(checkpoint).name, "sha256": file_sha256(checkpoint), **facts}
    return Potential(model, metadata=_card(source, trained_on, cutoff, factors)).eval()


def _factors(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str],
) -> Factors | None:
    """Read factors for weights without; those that a model was trained with are part of it.

    Raises:
        InputError: there are none in either place, or in both.
    """
    inside = any(is_factor(name) for name in weights)
    if inside == (path is not None):
        raise InputError(
            f"{checkpoint}: holds factors of its own: leave --factors out"
            if inside
            else f"{checkpoint}: holds no factors of the low-rank product; give the file "
            "(cp_init_….pt) that the model was trained with (--factors)"
        )
    return None if path is None else load_factors(path)


def _card(
    source: dict[str, Any],
    trained_on: str,
    cutoff: float,
    factors: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Tell where the potential comes from and what its numbers mean."""
    return {
        "origin": "converted from a checkpoint of the official TDN (arXiv 2507.01131)",
        "source": {
            **source,
            "weights": "raw",
            "factors": "in the file" if factors is None else Path(factors).name,
        },
        "energies": "of one atom on average, without the energies of free atoms, as the official "
        "code trains them (eV/atom): not a total energy, and not extensive",
        "assumed": f"cutoff {cutoff:g} Å and average numbers of {trained_on}: not in the file",
        "licence": "that of the original: ask its publisher",
    }
