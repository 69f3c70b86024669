"""The Lightning module: loss, optimiser, weight average, and what happens around each step.

It imports Lightning, so it is itself imported only when a run starts.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from mlip.datasets.feed.packing import EdgeBudgetSampler
from mlip.errors import MlipError
from mlip.graph import AtomicGraph
from mlip.potential import Potential
from mlip.training.config import LossConfig, TrainConfig
from mlip.training.ema import WeightAverage
from mlip.training.losses import (
    Residuals,
    Units,
    loss_terms,
    residuals,
    structure_losses,
    units_of,
    weighted_loss,
    weights_at,
)
from mlip.training.metrics import ErrorSums, batch_sums, combined, results_of
from mlip.training.optimizer import make_optimizer
from mlip.training.report import RunLog
from mlip.training.schedule import learning_rate, progress_of
from mlip.training.sets import Splits
from mlip.training.state import (
    Position,
    below,
    optimizer_tensors,
    prefixed,
    restore_optimizer,
    write_state,
)


class TrainingModule(pl.LightningModule):
    """Trains the potential it is given.

    Args:
        potential: trained in place.
        config: resolved settings.
        splits: training and validation graphs, whose labels decide what is predicted.
        sampler: batches of the training set.
        position: where to start.
        log: rank 0's log, None on the other ranks.
    """

    def __init__(
        self,
        potential: Potential,
        config: TrainConfig,
        splits: Splits,
        sampler: EdgeBudgetSampler,
        position: Position,
        log: RunLog | None,
    ) -> None:
        super().__init__()
        self.potential = potential
        self.config, self.splits, self.sampler = config, splits, sampler
        self.position, self.log_file = position, log
        self._trained = [p for p in potential.parameters() if p.requires_grad]
        self.average = WeightAverage(potential, config.ema_decay)
        self.best: dict[str, Tensor] = {}
        self.train_sums = ErrorSums()
        self.valid_sums = [ErrorSums() for _ in splits.valid]
        self.restored: dict[str, Tensor] = {}
        train = splits.train.survey
        self.with_stress = config.loss.stress_weight > 0 and train.stress_count > 0
        self.with_forces = config.loss.forces_weight > 0 and train.forces_count > 0
        self._lr = self._loss = self._gradient_norm = math.nan
        self.units = units_of(potential, config.loss)
        self._noise_weight = 0.0 if config.denoising is None else config.denoising.weight
        self._weights = weights_at(config.loss, 0.0, self._noise_weight)
        self._steps_in_epoch = sampler.steps(position.epoch)
        self._started = time.monotonic() - position.elapsed
        self._saved = time.monotonic()
        self._swapped = contextlib.ExitStack()

    # -- one step ---------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """Build AdamW with weight decay on linear maps only."""
        return make_optimizer(self.potential, self.config.optimizer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Set learning rate, loss weights and random numbers from the position."""
        progress = progress_of(self.config, self.position, self._steps_in_epoch)
        self._lr = learning_rate(self.config, self.position, progress, self._steps_in_epoch)
        self._weights = weights_at(self.config.loss, progress, self._noise_weight)
        for group in self._optimizer().param_groups:
            group["lr"] = self._lr
        seed = step_seed(self.config.seed, self.global_rank, self.position.global_step)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues CUDA's
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: AtomicGraph) -> Tensor:
        """Return the loss of a batch, scaled so that DDP's mean of gradients is their sum."""
        prediction = self.potential(
            batch, forces=self.with_forces, stress=self.with_stress, create_graph=True
        )
        found = residuals(prediction, batch, self.units)
        terms = loss_terms(found, self.config.loss, self.units)
        sums = self._summed(batch_sums(found, terms, self.config.loss, self.units))
        self.train_sums.add(sums)
        self._loss = float(weighted_loss(sums[3], sums[4], self._weights))
        if not math.isfinite(self._loss):
            raise self._offenders(found, batch, "loss")
        self._batch = batch
        return weighted_loss(terms, sums[4], self._weights) * self.trainer.world_size

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip by the norm of all gradients, and refuse one that is not finite."""
        limit = self.config.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(self._trained, math.inf if limit is None else limit)
        self._gradient_norm = float(norm)
        if not math.isfinite(self._gradient_norm):
            names = ", ".join(self._names(self._batch))
            raise MlipError(
                f"the gradient is {self._gradient_norm} at step {self.position.global_step + 1}, "
                f"in a batch of {names}: lower optimizer.lr, or look at these structures"
            )

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the step, average the weights, log, and write the state if it is due."""
        self.position.step += 1
        self.position.global_step += 1
        self.position.elapsed = self._elapsed()
        self.average.update()
        self.position.ema_updates = self.average.updates
        if self.log_file is not None:
            self.log_file.step(self.position, self._lr, self._loss, self._gradient_norm)
        if progress_of(self.config, self.position, self._steps_in_epoch) >= 1.0:
            self.trainer.should_stop = True
        elif self.position.step < self._steps_in_epoch:
            self._save_if_due()

    # -- one epoch --------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Validate with the averaged weights."""
        self.valid_sums = [ErrorSums() for _ in self.splits.valid]
        self._swapped.enter_context(self.average.applied())

    def validation_step(
        self,
        batch: AtomicGraph,
        batch_idx: int = 0,  # noqa: ARG002  Lightning passes it by name
        dataloader_idx: int = 0,
    ) -> None:
        """Add the errors of a batch of one validation set."""
        sums = evaluate_batch(self.potential, batch, self.config.loss, self.units)
        self.valid_sums[dataloader_idx].add(sums)

    def on_validation_end(self) -> None:
        """Reduce the errors and keep the weights if they are the best so far."""
        for sums in self.valid_sums:
            sums.values = self._summed(sums.values)
        loss = combined(self.valid_sums).result(weights_at(self.config.loss, 1.0))["loss"]
        self._swapped.close()
        if loss < self.position.best_loss:
            self.position.best_loss = loss
            self.position.best_epoch = self.position.epoch + 1
            self.best = {k: v.clone() for k, v in self.average.weights.items()}

    def on_train_epoch_end(self) -> None:
        """Log the epoch and move to the next one."""
        self.position.epoch += 1
        self.position.step = 0
        self.position.elapsed = self._elapsed()
        if self.log_file is not None:
            train = self.train_sums.result(self._weights)
            names = [part.parts[0].name for part in self.splits.valid]
            final = weights_at(self.config.loss, 1.0)
            valid = results_of(names, self.valid_sums, final)
            self.log_file.epoch(self.position, self._lr, train, valid)
        self.train_sums = ErrorSums()
        if self.trainer.should_stop or self.position.epoch == self.config.epochs:
            return self.save_state() if self.log_file is not None else None
        self.sampler.start(self.position.epoch)
        self._steps_in_epoch = self.sampler.steps(self.position.epoch)
        self._save_if_due()
        return None

    # -- state ------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Put back the state that a resumed run starts from."""
        self.average.follow_device()
        if self.restored:
            self.restore_weights()
            restore_optimizer(self._optimizer(), self.potential, below("optimizer", self.restored))
            sums = self.restored["sums"]
            self.train_sums.values[:, : sums.shape[1]] = sums
            self.restored = {}

    def restore_weights(self) -> None:
        """Put back the weights, their average and the best ones."""
        self.potential.load_state_dict(below("model", self.restored))
        self.average.restore(below("average", self.restored), self.position.ema_updates)
        self.best = {k: v.to(self.device) for k, v in below("best", self.restored).items()}

    def use_best(self) -> None:
        """Give the potential the averaged weights that validated best."""
        self.potential.load_state_dict(self.best or self.average.weights, strict=False)
        self.potential.eval()

    def save_state(self) -> None:
        """Write the state to resume from."""
        assert self.config.out is not None
        tensors = {
            **prefixed("model", dict(self.potential.state_dict())),
            **prefixed("average", self.average.weights),
            **prefixed("best", self.best),
            **prefixed("optimizer", optimizer_tensors(self._optimizer(), self.potential)),
            "sums": self.train_sums.values,
        }
        write_state(Path(self.config.out), self.position, tensors)
        self._saved = time.monotonic()

    def _save_if_due(self) -> None:
        every = self.config.checkpoint
        by_steps = every.steps is not None and self.position.global_step % every.steps == 0
        by_time = time.monotonic() - self._saved > 60 * every.minutes
        if (by_steps or by_time) and self.log_file is not None:
            self.save_state()

    # -- helpers ----------------------------------------------------------------------------

    def transfer_batch_to_device(
        self, batch: AtomicGraph, device: torch.device, *_: Any
    ) -> AtomicGraph:
        """Move a batch; on the CPU it is there already."""
        return batch if device.type == "cpu" else batch.to(device, non_blocking=True)

    def _optimizer(self) -> Optimizer:
        return self.trainer.optimizers[0]

    def _elapsed(self) -> float:
        """Seconds of training so far; rank 0's, so that all ranks stop together."""
        seconds = time.monotonic() - self._started
        if self.trainer.world_size > 1 and self.config.max_time_minutes is not None:
            seconds = float(self.trainer.strategy.broadcast(seconds))
        return seconds

    def _summed(self, sums: Tensor) -> Tensor:
        """Add over all processes."""
        if self.trainer.world_size == 1:
            return sums
        total = sums.to(self.device)
        torch.distributed.all_reduce(total)
        return total

    def _names(self, batch: AtomicGraph) -> list[str]:
        return [self.splits.train.name(int(i)) for i in batch.index]

    def _offenders(self, found: Residuals, batch: AtomicGraph, what: str) -> MlipError:
        """Name the structures of a batch whose loss is not finite, with their values."""
        table = structure_losses(found, batch, self.config.loss, self.units).detach()
        lines = [
            f"{name}: energy {row[0]:.4g}, forces {row[1]:.4g}, stress {row[2]:.4g}"
            + (f", noise {row[3]:.4g}" if found.noise is not None else "")
            for name, row in zip(self._names(batch), table.tolist(), strict=True)
            if not all(math.isfinite(x) for x in row)
        ]
        where = "\n  ".join(lines) or "(all structures of this process are fine)"
        return MlipError(
            f"the {what} is {self._loss} at step {self.position.global_step + 1}; penalties of "
            f"the structures behind it:\n  {where}\nlower optimizer.lr, or look at these "
            "structures and their labels"
        )


def evaluate_batch(
    potential: Potential, batch: AtomicGraph, config: LossConfig, units: Units
) -> Tensor:
    """Predict a labelled batch and return its error sums [5, 4] (see `ErrorSums`)."""
    with torch.enable_grad():
        prediction = potential(batch, forces=True, stress=True)
    return batch_sums(residuals(prediction, batch, units), None, config, units)


def step_seed(seed: int, rank: int, step: int) -> int:
    """Return the seed of torch's generator at a step: a function of the position alone."""
    return (seed * 1_000_003 + rank * 7919 + step * 2_654_435_761) % (2**63 - 1)
