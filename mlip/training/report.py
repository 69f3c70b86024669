"""What a run writes for people: steps.csv, metrics.csv, a table on the console, TensorBoard."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console

from mlip.errors import require
from mlip.files import atomic_write
from mlip.training.metrics import COLUMNS
from mlip.training.state import Position

STEP_COLUMNS = ("step", "epoch", "lr", "loss", "gradient_norm")
EPOCH_COLUMNS = (
    "epoch",
    "step",
    "elapsed_s",
    "lr",
    *(f"train_{name}" for name in COLUMNS),
    *(f"valid_{name}" for name in COLUMNS),
)
_SHOWN = (("E", "energy_mae_meV_per_atom"), ("F", "forces_mae_meV_per_A"), ("S", "stress_mae_GPa"))


class RunLog:
    """Appends to the logs of a run folder; use it as a context manager.

    Numbers are written with all their digits, so two logs are equal only if the runs are equal
    bit for bit. After a kill the rows beyond the state that the run resumes from are dropped.

    Args:
        folder: run folder.
        position: where the run starts or resumes.
        console: where the table goes.
        tensorboard: also write TensorBoard events.
        sets: names of the validation sets, if their errors are also reported one by one.
    """

    def __init__(
        self,
        folder: Path,
        position: Position,
        console: Console,
        *,
        tensorboard: bool = False,
        sets: Sequence[str] = (),
    ) -> None:
        self.folder, self.console = folder, console
        of_sets = (f"valid_{column}" for column in columns_of(sets))
        self.columns = (*EPOCH_COLUMNS, *of_sets)
        steps, epochs = folder / "steps.csv", folder / "metrics.csv"
        _truncate(steps, STEP_COLUMNS, "step", position.global_step)
        _truncate(epochs, self.columns, "epoch", position.epoch)
        self._steps: IO[str] = steps.open("a", buffering=1, newline="", encoding="utf-8")
        self._epochs: IO[str] = epochs.open("a", buffering=1, newline="", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            require("tensorboard", extra="train")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=position.epoch + 1)
        self._header_printed = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._steps.close()
        self._epochs.close()
        if self._board is not None:
            self._board.close()

    def step(self, position: Position, lr: float, loss: float, gradient_norm: float) -> None:
        """Write the line of a finished step."""
        self._steps.write(
            f"{position.global_step},{position.epoch + 1},{lr!r},{loss!r},{gradient_norm!r}\n"
        )

    def epoch(
        self, position: Position, lr: float, train: Mapping[str, float], valid: Mapping[str, float]
    ) -> None:
        """Write and show the line of a finished epoch."""
        row: dict[str, float] = {
            "epoch": position.epoch,
            "step": position.global_step,
            "elapsed_s": round(position.elapsed, 3),
            "lr": lr,
            **{f"train_{k}": v for k, v in train.items()},
            **{f"valid_{k}": v for k, v in valid.items()},
        }
        self._epochs.write(",".join(_text(row[name]) for name in self.columns) + "\n")
        self._show(row)
        if self._board is not None:
            for name in self.columns[3:]:
                part, _, rest = name.partition("_")
                tag = f"{part}/{rest}" if rest else name
                if not math.isnan(row[name]):
                    self._board.add_scalar(tag, row[name], position.epoch)
            self._board.flush()

    def _show(self, row: Mapping[str, float]) -> None:
        if not self._header_printed:
            self._header_printed = True
            self.console.print("MAE: E meV/atom, F meV/Å, S GPa; valid with averaged weights")
            columns = [f"{part} {q:>1}" for part in ("train", "valid") for q in "EFS"]
            self.console.print(
                f"{'epoch':>6} {'time':>8} {'lr':>8} {'loss':>9} "
                + " ".join(f"{c:>8}" for c in columns),
                style="bold",
            )
        numbers = [row[f"{part}_{name}"] for part in ("train", "valid") for _, name in _SHOWN]
        self.console.print(
            f"{row['epoch']:6.0f} {_clock(row['elapsed_s']):>8} {row['lr']:8.1e} "
            f"{row['train_loss']:9.3g} " + " ".join(f"{_number(x):>8}" for x in numbers),
            highlight=False,
        )


def columns_of(sets: Sequence[str]) -> list[str]:
    """Name the errors of several sets: ``<set>_<error>``."""
    return [f"{name}_{column}" for name in sets for column in COLUMNS]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read metrics.csv of a run as one mapping per epoch."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]


def _truncate(path: Path, columns: tuple[str, ...], key: str, last: int) -> None:
    """Keep the header and the complete rows up to `last`; create the file if missing."""
    place = columns.index(key)
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]:
            cells = line.rstrip("\n").split(",")
            if line.endswith("\n") and len(cells) == len(columns) and int(cells[place]) <= last:
                kept.append(line)
    with atomic_write(path, "w") as file:
        file.write(",".join(columns) + "\n")
        file.writelines(kept)


def _text(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{rest:02d}"
