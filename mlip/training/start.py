"""The potential a run starts from: new weights, or those of another potential that fit."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlip.errors import InputError
from mlip.models import create_model
from mlip.potential import Potential
from mlip.training.config import TrainConfig
from mlip.training.sets import Splits
from mlip.training.summary import training_statistics
from mlip.training.zero import Zero


def settings_of_initial(start: Potential, config: TrainConfig) -> TrainConfig:
    """Take model, references and repulsion from the potential that the run goes on from.

    What ``model`` says in `config` takes the place of what that model has.

    Raises:
        InputError: `config` names another model.
    """
    header = start.to_header()
    name = config.model.get("name", header["model"])
    if name != header["model"]:
        raise InputError(
            f"model.name is {name!r}, but {config.initial} holds a {header['model']}: leave "
            "model.name out, or train without initial"
        )
    shift = header["shift"]
    references = {name: e + shift[name] for name, e in header["reference_energies"].items()}
    return config.model_copy(
        update={
            "model": {"name": name, **header["config"], **config.model},
            "reference_energies": references,
            "zbl": header["zbl"],
        }
    )


def check_denoising(config: TrainConfig) -> None:
    """Refuse noise for a model that cannot predict it.

    Raises:
        InputError: says which setting is missing.
    """
    if config.denoising is not None and not config.model.get("denoising"):
        raise InputError(
            f"denoising is set, but the model ({config.model['name']}) has no layers for it: set "
            "model.prediction=direct and model.denoising=true (equiformer_v3), or take the "
            "denoising section out"
        )


def build_potential(
    config: TrainConfig,
    splits: Splits,
    zero: Zero,
    files: dict[str, Any],
    start: Potential | None = None,
) -> Potential:
    """Build the potential with weights drawn from the seed of the run, or with those of `start`.

    Args:
        config: resolved settings.
        splits: data sets of the run.
        zero: reference energies.
        files: description of the data files.
        start: potential to go on from.

    Raises:
        InputError: bad model settings, or weights of `start` that do not fit.
    """
    name = config.model["name"]
    settings = {key: value for key, value in config.model.items() if key != "name"}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = create_model(name, settings)
    model.to({"float32": torch.float32, "float64": torch.float64}[config.precision])
    scale: float | dict[int, float]
    scale, direct_scale = splits.train.survey.forces_rms or zero.references.rmse or 1.0, None
    if start is not None:
        _take_weights(model, start.model, config)
        scale, direct_scale = start.scale, None if start.conservative else start.direct_scale
    settings = config.model_dump(mode="json", exclude={"data", "out"})
    if config.initial is not None:
        settings["initial"] = Path(config.initial).name  # a potential tells no folder of its maker
    metadata = {
        "model": name,
        "level_of_theory": config.level_of_theory,
        "licence": config.licence,
        "training_data": files,
        "training_statistics": training_statistics(config, splits, zero),
        "training_settings": settings,
    }
    return Potential(
        model,
        reference_energies=zero.references.energies,
        scale=scale,
        direct_scale=direct_scale,
        zbl=config.zbl,
        metadata=metadata,
    )


def describe_initial(start: Potential, potential: Potential, config: TrainConfig) -> str:
    """Say what a run takes from the potential it goes on from, and what not."""
    anew = f"; new weights: {', '.join(config.initial_reset)}" if config.initial_reset else ""
    dropped = _left_out(start.model, potential.model)
    without = f"; left out: {', '.join(dropped)}" if dropped else ""
    return f"weights of {config.initial}{anew}{without}"


def _left_out(old: nn.Module, new: nn.Module) -> list[str]:
    """Name the sub-modules of a model that the other one does not have, such as force heads."""
    kept = {name for name, _ in new.named_children()}
    return [name for name, _ in old.named_children() if name not in kept]


def _take_weights(model: nn.Module, old: nn.Module, config: TrainConfig) -> None:
    """Copy the weights of `old` but those to be reset; sub-modules only it has are left out.

    Raises:
        InputError: names to reset that do not exist, or weights that do not fit.
    """
    _check_names(model, config.initial_reset)
    prefixes = tuple(f"{name}." for name in config.initial_reset)
    wanted = {n: t for n, t in model.state_dict().items() if not n.startswith(prefixes or "\n")}
    given = old.state_dict()
    dropped = {f"{name}." for name in _left_out(old, model)}
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [
        f"{name} has shape {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems += [
        f"{name} has no place"
        for name in given
        if name not in wanted and not name.startswith((*dropped, *prefixes))
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"the weights of {config.initial} do not fit the model: {'; '.join(problems[:3])}{more}"
            ": change the model section, or name the sub-modules that shall start anew in "
            "initial_reset"
        )
    model.load_state_dict({name: given[name] for name in wanted}, strict=False)


def _check_names(model: nn.Module, names: tuple[str, ...]) -> None:
    known = [name for name, _ in model.named_modules() if name]
    top = [name for name, _ in model.named_children()]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(top)}"
            raise InputError(f"initial_reset: the model has no sub-module {name!r}: {hint}")
