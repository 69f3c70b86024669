"""The state a run resumes from: one safetensors file, its header holding the position as JSON.

Lightning's own checkpoints are pickles and know no position inside an epoch; this file holds
weights, their average, the best weights, the optimiser and the running sums. Learning rate,
batches and random numbers are functions of the position and need no state.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim import Optimizer

from mlip.errors import CheckpointError
from mlip.files import atomic_write

FORMAT = "mlip-training-state"
FORMAT_VERSION = 1
_KEPT = 2  # newest files kept


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        step: steps finished in the present epoch.
        global_step: steps finished in all.
        elapsed: seconds of training so far.
        ema_updates: updates of the weight average.
        best_epoch: epoch whose averaged weights validated best, -1 before the first.
        best_loss: their validation loss.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    elapsed: float = 0.0
    ema_updates: int = 0
    best_epoch: int = -1
    best_loss: float = float("inf")


def state_files(folder: Path) -> list[Path]:
    """List the state files of a run, oldest first."""
    return sorted(folder.glob("state-*.safetensors"))


def write_state(folder: Path, position: Position, tensors: dict[str, Tensor]) -> Path:
    """Write a state beside the earlier ones and remove all but the newest two."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "position": asdict(position)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = serialize(contiguous, metadata={"mlip": json.dumps(header)})
    path = folder / f"state-{position.global_step:010d}.safetensors"
    with atomic_write(path) as file:
        file.write(data)
    for old in state_files(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)
    return path


def read_newest_state(folder: Path) -> tuple[Position, dict[str, Tensor]] | None:
    """Read the newest state of a run, or the one before it if that file is damaged.

    Returns:
        None if no state was written yet.

    Raises:
        CheckpointError: there are state files, and none can be read.
    """
    problems = []
    for path in reversed(state_files(folder)):
        try:
            return _read(path)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems) + ": start the run anew in another folder")
    return None


def _read(path: Path) -> tuple[Position, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("mlip", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the state of a training run")
    if header["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a newer mlip: upgrade mlip to resume it")
    return Position(**header["position"]), tensors


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state as tensors named after the parameters."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, on the device and in the layout it had."""
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        device = value.device if key == "step" and not _fused(optimizer) else parameter.device
        optimizer.state[parameter][key] = value.to(device)


def _fused(optimizer: Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put ``prefix/`` before every name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors named ``prefix/…``, without the prefix."""
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
