"""Train a potential: from settings to a run folder with a checkpoint; resume one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console

from mlip.datasets.feed.noise import PositionNoise
from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.datasets.policy import BadEntries
from mlip.errors import InputError, UnknownElementError, require
from mlip.files import atomic_write
from mlip.potential import Potential, load_potential
from mlip.training.choose import check_model_settings, choose_settings, cutoff_of, default_folder
from mlip.training.config import SPLITS, TrainConfig, load_config, write_config
from mlip.training.data import GraphSet, describe_files, loader
from mlip.training.losses import units_of, weights_at
from mlip.training.metrics import ErrorSums, results_of
from mlip.training.report import RunLog
from mlip.training.schedule import progress_of
from mlip.training.sets import Splits, open_splits
from mlip.training.start import (
    build_potential,
    check_denoising,
    describe_initial,
    settings_of_initial,
)
from mlip.training.state import Position, read_newest_state, state_files
from mlip.training.summary import announce
from mlip.training.zero import settle_zero

if TYPE_CHECKING:
    from mlip.training.module import TrainingModule

CONFIG_FILE, DATA_FILE, POTENTIAL_FILE = "config.yaml", "data.json", "potential.safetensors"
QUARANTINE_FILE = "quarantine.tsv"


class TrainResult(NamedTuple):
    """What a finished run leaves.

    path: the potential with the best averaged weights. folder: the run folder.
    metrics: errors by name, ``valid_…`` and ``test_…`` (units in the names).
    """

    path: Path
    folder: Path
    metrics: dict[str, float]


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Train a potential in a new run folder.

    Under ``torchrun`` every process calls this; the first one writes.

    Args:
        config: settings; those left at None are chosen from the data.
        console: where the report goes, default the standard output.

    Raises:
        InputError: bad settings or data, or the folder already holds a run.
        MlipError: loss or gradient is not finite; the text names the structures.
        MissingExtraError: Lightning is not installed.
    """
    require("lightning", extra="train")
    folder = Path(config.out if config.out is not None else default_folder(config))
    if state_files(folder) or (folder / POTENTIAL_FILE).exists():
        raise InputError(
            f"{folder} already holds a training run: continue it with  mlip train --resume "
            f"{folder}  or choose another folder (--out)"
        )
    return _run(config, resume=False, console=console)


def resume(
    folder: str | os.PathLike[str], *, finish: bool = False, console: Console | None = None
) -> TrainResult:
    """Continue a run that was stopped or killed, from the last state it wrote.

    On the CPU the losses continue bit for bit (without `max_time_minutes`).

    Args:
        folder: of the run.
        finish: make no more steps, write the potential of the best epoch so far and measure it.
            The run can be continued afterwards all the same.
        console: where the report goes, default the standard output.

    Raises:
        InputError: no run in this folder, or no state to finish with, or its data files have
            changed.
        CheckpointError: the state files are damaged.
    """
    require("lightning", extra="train")
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no training run ({CONFIG_FILE} is missing)")
    config = load_config(path).model_copy(update={"out": str(Path(folder).resolve())})
    if finish and not state_files(Path(folder)):
        raise InputError(
            f"the run in {folder} has written no state yet: there is nothing to finish"
        )
    return _run(config, resume=True, finish=finish, console=console)


def _run(
    config: TrainConfig, *, resume: bool, finish: bool = False, console: Console | None
) -> TrainResult:
    rank, world_size = _process()
    console = console or Console(soft_wrap=True)
    console = console if rank == 0 else Console(quiet=True)
    _accelerator(config.device)
    with _quiet_lightning():
        start = None
        if config.initial is not None:
            start = load_potential(config.initial, dtype="float64")
            config = settings_of_initial(start, config)
        check_model_settings(config.model)
        check_denoising(config)
        splits = open_splits(
            config.data, cutoff_of(config), config.seed, _bad_entries(config, rank)
        )
        config = choose_settings(config, splits.train.survey, splits.train.weights())
        assert config.out is not None
        folder = Path(config.out)
        files = _files(config)
        zero = settle_zero(config.reference_energies, config.data.sets("train"), splits)
        potential = build_potential(config, splits, zero, files, start)
        _check_elements(potential, splits)
        if resume:
            _check_same_data(folder, files)
        elif rank == 0:
            write_config(config, folder / CONFIG_FILE)
            with atomic_write(folder / DATA_FILE, "w") as file:
                json.dump(files, file, indent=1)
        announce(console, config, splits, potential, zero, world_size)
        if start is not None:
            console.print(describe_initial(start, potential, config), highlight=False)
        splits.bad.save()
        for line in splits.bad.summary(splits.entries()):
            console.print(line, style="yellow", highlight=False)
        stored = read_newest_state(folder) if resume else None
        position, tensors = stored or (Position(), {})
        if resume:
            how = "finishing with what there is" if finish else "resuming"
            console.print(f"{how} after step {position.global_step}")
        sampler = _sampler(config, splits.train, shuffle=True)
        with contextlib.ExitStack() as stack:
            log = None
            if rank == 0 and not finish:
                log = stack.enter_context(
                    RunLog(
                        folder, position, console, tensorboard=config.tensorboard,
                        sets=_names(splits.valid),
                    )
                )  # fmt: skip
            used = range(torch.cuda.device_count()) if _accelerator(config.device) == "gpu" else ()
            stack.enter_context(torch.random.fork_rng(devices=used))
            module = _fit(config, splits, potential, sampler, position, tensors, log, finish)
        return _finish(config, splits, module, console)


def _fit(
    config: TrainConfig,
    splits: Splits,
    potential: Potential,
    sampler: EdgeBudgetSampler,
    position: Position,
    tensors: dict[str, Any],
    log: RunLog | None,
    finish: bool,
) -> TrainingModule:
    """Run Lightning's loop from `position` to the end of the run, not at all to ``finish``."""
    import lightning.pytorch as pl

    from mlip.training.module import TrainingModule

    module = TrainingModule(potential, config, splits, sampler, position, log)
    module.restored = tensors
    assert config.epochs is not None
    if finish or progress_of(config, position, sampler.steps(position.epoch)) >= 1.0:
        module.restore_weights()
        return module
    sampler.start(position.epoch, position.step)
    _rank, world_size = _process()
    trainer = pl.Trainer(
        max_epochs=config.epochs - position.epoch,
        accelerator=_accelerator(config.device),
        strategy=_strategy() if world_size > 1 else "auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size > 1 else 1,
        num_nodes=world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        default_root_dir=config.out,
    )
    data = config.data
    feed: dict[str, Any] = {"workers": data.workers, "start_method": data.start_method}
    valid = [loader(v, _sampler(config, v, shuffle=False), **feed) for v in splits.valid]
    batches = loader(splits.train, sampler, noise=position_noise(config), **feed)
    with contextlib.ExitStack() as stack:
        for each in (batches, *valid):
            if hasattr(each, "close"):
                stack.callback(each.close)
        # Lightning counts loaders only in lists
        trainer.fit(module, batches, valid if len(valid) > 1 else valid[0])
    return module


def position_noise(config: TrainConfig) -> PositionNoise | None:
    """Give the noise of training batches, None for none."""
    if config.denoising is None:
        return None
    return PositionNoise(config.seed, **config.denoising.model_dump(exclude={"weight"}))


def _sampler(config: TrainConfig, part: GraphSet, *, shuffle: bool) -> EdgeBudgetSampler:
    """Give shuffled training batches, or validation batches that fit any structure."""
    rank, world_size = _process()
    assert config.batch.max_edges is not None
    found = part.survey
    max_edges, max_atoms = config.batch.max_edges, config.batch.max_atoms
    if not shuffle:
        max_edges = max(max_edges, int(found.n_edges.max()))
        max_atoms = None if max_atoms is None else max(max_atoms, int(found.n_atoms.max()))
    return EdgeBudgetSampler(
        found.n_atoms,
        found.n_edges,
        max_edges=max_edges,
        max_atoms=max_atoms,
        seed=config.seed if shuffle else None,
        rank=rank,
        world_size=world_size,
        even=shuffle,
        weights=part.weights() if shuffle else None,
    )


def _finish(
    config: TrainConfig, splits: Splits, module: TrainingModule, console: Console
) -> TrainResult:
    """Export the best averaged weights and measure them on the validation and test sets."""
    assert config.out is not None
    potential, folder = module.potential, Path(config.out)
    module.use_best()
    potential.to("cuda" if _accelerator(config.device) == "gpu" else "cpu")
    metrics: dict[str, float] = {}
    for name, sets in (("valid", splits.valid), ("test", splits.test)):
        if sets:
            found = evaluate_sets(potential, sets, config)
            metrics.update({f"{name}_{key}": value for key, value in found.items()})
    potential.metadata["metrics"] = {k: v for k, v in metrics.items() if v == v}
    potential.metadata["best_epoch"] = module.position.best_epoch
    path = folder / POTENTIAL_FILE
    potential.to("cpu")
    if _process()[0] == 0:
        potential.save(path)
        console.print(f"best epoch {module.position.best_epoch}; potential written to {path}")
    return TrainResult(path, folder, metrics)


def evaluate_sets(
    potential: Potential, sets: Sequence[GraphSet], config: TrainConfig
) -> dict[str, float]:
    """Compute loss and errors of a potential on sets, on this process alone."""
    from mlip.training.module import evaluate_batch

    sums = [ErrorSums() for _ in sets]
    units = units_of(potential, config.loss)
    for part, errors in zip(sets, sums, strict=True):
        sampler = _sampler(config, part, shuffle=False)
        sampler.rank, sampler.world_size = 0, 1
        for batch in loader(part, sampler):
            batch = batch.to(potential.device)
            errors.add(evaluate_batch(potential, batch, config.loss, units))
    return results_of(_names(sets), sums, weights_at(config.loss, 1.0))


def _check_elements(potential: Potential, splits: Splits) -> None:
    for name, part in splits.all():
        unknown = sorted(set(part.survey.elements) - set(potential.elements))
        if unknown:
            i = part.survey.first_with[unknown[0]]
            raise UnknownElementError(
                f"data.{name} holds atomic numbers {unknown} (first in {part.name(i)}) that the "
                "training set or model.elements does not: add such structures to the training "
                "set, or take these out"
            )


def _files(config: TrainConfig) -> dict[str, Any]:
    """Describe the data files of each split."""
    sets = {split: config.data.sets(split) for split in SPLITS}
    return {
        split: [file for each in found for file in describe_files(each.paths)]
        for split, found in sets.items()
        if found
    }


def _names(sets: Sequence[GraphSet]) -> list[str]:
    """Give the names of sets that are reported one by one: none if there is only one."""
    return [each.parts[0].name for each in sets] if len(sets) > 1 else []


def _bad_entries(config: TrainConfig, rank: int) -> BadEntries:
    """Decide what becomes of structures that cannot be used; the first process lists them."""
    policy = config.data.on_bad
    if policy != "quarantine" or rank != 0:
        return BadEntries("skip" if policy == "quarantine" else policy)
    folder = Path(config.out if config.out is not None else default_folder(config))
    return BadEntries(policy, folder / QUARANTINE_FILE)


def _check_same_data(folder: Path, files: dict[str, Any]) -> None:
    path = folder / DATA_FILE
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != files:
        raise InputError(
            f"the data files of the run in {folder} have changed since it began (see {path}): "
            "restore them, or start a new run"
        )


def _process() -> tuple[int, int]:
    """Return rank and number of processes; more than one only under ``torchrun``."""
    if not torch.distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _accelerator(device: str) -> str:
    """Translate `device` for Lightning."""
    if device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}: use auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no CUDA device: use cpu or auto")
    return {"cpu": "cpu", "cuda": "gpu"}[kind]


def _strategy() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(
        process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
        find_unused_parameters=True,
        broadcast_buffers=False,
    )


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notices for the duration of a run, and only Lightning's."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        try:
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(level)
