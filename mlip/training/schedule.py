"""Learning rate and progress of a run as functions of its position; nothing here has state."""

from __future__ import annotations

import math

from mlip.training.config import TrainConfig
from mlip.training.state import Position


def progress_of(config: TrainConfig, position: Position, steps_in_epoch: int) -> float:
    """Return the fraction of the run that is done, 0 to 1.

    Whichever of epochs, `max_steps` and `max_time_minutes` is nearest to its end counts, so that
    the cosine always reaches its end.
    """
    assert config.epochs is not None
    done = (position.epoch + position.step / max(steps_in_epoch, 1)) / config.epochs
    if config.max_steps is not None:
        done = max(done, position.global_step / config.max_steps)
    if config.max_time_minutes is not None:
        done = max(done, position.elapsed / (60 * config.max_time_minutes))
    return min(done, 1.0)


def learning_rate(
    config: TrainConfig, position: Position, progress: float, steps_in_epoch: int
) -> float:
    """Return the learning rate of the next step.

    With `warmup_steps`: linear warm-up times cosine. With `warmup_epochs`: linear warm-up, which
    begins at `warmup_start`, then the cosine, which counts from the start of the run, as published
    for EquiformerV3.
    """
    schedule, lr = config.schedule, config.optimizer.lr
    low, start = schedule.lr_min_fraction, schedule.warmup_start
    cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.warmup_epochs is not None:
        done = (position.epoch + position.step / steps_in_epoch) / schedule.warmup_epochs
        return lr * (start + (1 - start) * done if done < 1 else cosine)
    warmup = schedule.warmup_steps
    warm = min(1.0, (position.global_step + 1) / warmup) if warmup else 1.0
    return lr * (start + (1 - start) * warm) * cosine
