"""What a training run says of its data and settings: on the console and in the potential's file."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mlip.potential import Potential
from mlip.training.config import TrainConfig
from mlip.training.sets import Splits
from mlip.training.zero import Zero


def announce(
    console: Console,
    config: TrainConfig,
    splits: Splits,
    potential: Potential,
    zero: Zero,
    world_size: int,
) -> None:
    """Print what a run begins with: its sets, reference energies, model and settings."""
    for split, graphs in splits.all():
        for part in graphs.parts:
            found = part.survey
            name = split if len(splits.train.parts) == 1 else f"{split} {part.name}"
            weight = f", weight {part.weight:g}" if part.weight != 1 else ""
            console.print(
                f"{name}: {len(part.dataset)} structures{weight}, {found.n_atoms.sum()} atoms, "
                f"{found.average_neighbors:.1f} neighbours within {graphs.cutoff:g} Å, labels: "
                f"{found.energy.count} energies, "
                f"{found.forces_count // 3} forces, {found.stress_count} stresses",
                highlight=False,
            )
            if part.too_large:
                console.print(f"{name}: {part.too_large} structures left out (data.max_edges)")
        if graphs.graphs is None:
            console.print(f"{split}: graphs exceed data.memory_limit_GB, built when needed")
    for line in zero.lines():
        console.print(line, highlight=False)
    weights = sum(p.numel() for p in potential.model.parameters())
    scale = next(iter(potential.scale.values()))
    console.print(
        f"{config.model['name']}: {weights} weights, {_mode(config, potential)}, "
        f"{config.precision}, scale {scale:.4g} eV; batches of "
        f"{config.batch.max_edges} edges, {config.epochs} epochs, {world_size} process"
        f"{'es' if world_size > 1 else ''}; run folder {config.out}",
        highlight=False,
    )
    if config.loss.energy_weight == 0 or config.loss.forces_weight == 0:
        console.print("warning: a quantity shown below has weight 0 in the loss", style="yellow")


def _mode(config: TrainConfig, potential: Potential) -> str:
    """Say where forces come from, and what else is learned."""
    forces = "forces are derivatives" if potential.conservative else "direct forces"
    return forces if config.denoising is None else f"{forces} with denoising"


def training_statistics(config: TrainConfig, splits: Splits, zero: Zero) -> dict[str, Any]:
    """Collect what the potential's file says about the training data, JSON-able."""
    settings = {each.name: each for each in config.data.sets("train")}
    sets = [
        {
            "name": part.name,
            "structures": len(part.dataset),
            "fingerprint": part.dataset.fingerprint(),
            "weight": part.weight,
            "labels": settings[part.name].labels,
            "energy_convention": splits.conventions["train", part.name],
            "residual_rmse": _finite(zero.rmse[part.name]),
            "own_reference_energies": zero.own_by_symbol(part.name),
        }
        for part in splits.train.parts
    ]
    return {
        "average_neighbors": splits.train.survey.average_neighbors,
        "forces_rms": splits.train.survey.forces_rms,
        "energy_convention": zero.convention,
        "reference_energies_from": zero.references.source,
        "reference_residual_rmse": _finite(zero.references.rmse),
        "left_out": len(splits.bad.entries),
        "sets": sets,
    }


def _finite(value: float) -> float | None:
    return value if value == value else None
