"""Time, rates, memory and errors of the hot-path operators on every back end of a device."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mlip.benchmarks.counting import Peaks, aligned, peak_memory, synchronized_time
from mlip.benchmarks.kernel_cases import Case, Outputs
from mlip.errors import InputError
from mlip.ops import Backend

_TIMED = ("forward", "backward", "double_backward")


class Spread(NamedTuple):
    """Median, shortest and longest time of one pass, ms."""

    median: float
    shortest: float
    longest: float


@dataclass(frozen=True)
class Row:
    """One operator on one back end.

    Times are ms, None where the kernel has no such derivative. Rates are those of the forward
    pass: operations and the bytes of inputs and results, each counted once, whatever a back end
    really does. peak_mbyte: memory beyond the inputs, all passes. error: largest of the relative
    errors of result, gradients and their derivatives against plain PyTorch in float64;
    torch_error: that of plain PyTorch in this precision.
    """

    operator: str
    backend: str
    forward: Spread
    backward: Spread
    double_backward: Spread | None
    gflop_per_s: float | None
    percent_of_peak_flops: float | None
    gbyte_per_s: float
    percent_of_peak_bandwidth: float
    peak_mbyte: float | None
    error: float
    torch_error: float


def back_ends(device: torch.device) -> tuple[Backend, ...]:
    """Name plain PyTorch and the kernels of a device."""
    kernel = "numba" if device.type == "cpu" else "cuda"
    return tuple(name for name in get_args(Backend) if name in ("torch", kernel))


def measure(
    case: Case, peaks: Peaks, repeats: int, seconds: float, report: Callable[[str], object]
) -> Iterator[Row]:
    """Measure an operator; its back ends take turns.

    Args:
        case: the operator.
        peaks: of the machine, by ``measure_peaks``.
        repeats: turns, after one to compile and warm up.
        seconds: shared by the back ends; one that has used its part takes no further turn.
        report: takes why a back end cannot run.
    """
    device = case.inputs[0].device
    truth = _derivatives(case, "torch", [tensor.double() for tensor in case.inputs])
    errors: dict[Backend, float] = {}
    for backend in back_ends(device):
        try:
            errors[backend] = _error(_derivatives(case, backend, case.inputs), truth)
        except InputError as reason:
            report(str(reason))
    del truth
    times: dict[Backend, list[list[float]]] = {backend: [] for backend in errors}
    limit = 1e3 * seconds / len(times)
    waiting = list(times)
    for _ in range(repeats):
        for backend in waiting:
            times[backend].append(_times(case, backend, device))
        waiting = [backend for backend in waiting if sum(map(sum, times[backend])) < limit]
        if not waiting:
            break
    for backend, own in times.items():
        kept = peak_memory(lambda name=backend: _derivatives(case, name, case.inputs), device)  # type: ignore[misc]
        spreads = [Spread(statistics.median(t), min(t), max(t)) for t in zip(*own, strict=True)]
        yield _row(case, backend, spreads, peaks, kept, errors)


def _row(
    case: Case,
    backend: Backend,
    spreads: list[Spread],
    peaks: Peaks,
    kept: int | None,
    errors: dict[Backend, float],
) -> Row:
    forward = spreads[0].median / 1e3
    with torch.no_grad():
        outputs = case.run(backend, *case.inputs)
    n_bytes = sum(tensor.nbytes for tensor in (*case.inputs, *outputs))
    flops = None if case.flops is None else case.flops / forward
    return Row(
        case.name,
        backend,
        spreads[0],
        spreads[1],
        spreads[2] if case.derivatives > 1 else None,
        None if flops is None else flops / 1e9,
        None if flops is None else 100 * flops / peaks.flops_per_s,
        n_bytes / forward / 1e9,
        100 * n_bytes / forward / peaks.bytes_per_s,
        None if kept is None else kept / 1e6,
        errors[backend],
        errors["torch"],
    )


def _passes(
    case: Case, backend: Backend, inputs: Sequence[Tensor], mark: Callable[[], object]
) -> Iterator[Outputs]:
    """Yield result, gradients and gradients of those, of fixed sums; mark when each is there."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = case.run(backend, *leaves)
    mark()
    yield out
    seeds = [_seed(tensor).requires_grad_() for tensor in out]
    twice = case.derivatives > 1
    gradients = torch.autograd.grad(out, leaves, seeds, create_graph=twice, materialize_grads=True)
    mark()
    yield tuple(_masked(case, list(gradients)))
    if twice:
        cotangents = _masked(case, [_seed(tensor) for tensor in gradients])
        known = [pair for pair in zip(gradients, cotangents, strict=True) if pair[0].requires_grad]
        parts, own = zip(*known, strict=True)
        second = torch.autograd.grad(parts, [*leaves, *seeds], own, materialize_grads=True)
        mark()
        yield (*_masked(case, list(second)),)


def _masked(case: Case, gradients: list[Tensor]) -> list[Tensor]:
    """Set to zero what is no derivative of the operator."""
    for i, mask in case.masks.items():
        gradients[i] = gradients[i] * mask
    return gradients


def _seed(like: Tensor) -> Tensor:
    """Numbers that differ from entry to entry, the same in every precision."""
    numbers = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return numbers.mul_(1.7).sin_().float().to(like).view(like.shape)


def _derivatives(case: Case, backend: Backend, inputs: Sequence[Tensor]) -> list[Tensor]:
    passes = _passes(case, backend, inputs, lambda: None)
    return [tensor.detach() for outputs in passes for tensor in outputs]


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative error of a tensor."""
    sizes = [float(torch.linalg.vector_norm(b)) for b in truth]
    wrong = [float(torch.linalg.vector_norm(a - b)) for a, b in zip(found, truth, strict=True)]
    return max(a / b if b else a for a, b in zip(wrong, sizes, strict=True))


def _times(case: Case, backend: Backend, device: torch.device) -> list[float]:
    """Time each pass once, ms."""
    found: list[float] = []
    begin = synchronized_time(device)

    def mark() -> None:
        found.append(1e3 * (synchronized_time(device) - begin))

    for _ in _passes(case, backend, case.inputs, mark):
        begin = synchronized_time(device)
    return found


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table."""
    heads = (
        "operator", "back end", "forward ms", "backward", "double backward", "GFLOP/s", "GB/s",
        "peak MB", "error", "PyTorch's",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        spreads = (row.forward, row.backward, row.double_backward)
        lines.append(
            (
                row.operator,
                row.backend,
                *("–" if s is None else f"{s[0]:.3g} ({s[1]:.3g}–{s[2]:.3g})" for s in spreads),
                _rate(row.gflop_per_s, row.percent_of_peak_flops),
                _rate(row.gbyte_per_s, row.percent_of_peak_bandwidth),
                "–" if row.peak_mbyte is None else f"{row.peak_mbyte:.0f}",
                f"{row.error:.1e}",
                f"{row.torch_error:.1e}",
            )
        )
    return aligned(lines, left=2)


def _rate(value: float | None, percent: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ({percent:.0f} %)"


def as_csv(rows: Iterable[Row]) -> str:
    """Write rows as comma-separated values with a line of names."""
    names: list[str] = []
    for name in Row.__dataclass_fields__:
        timed = name in _TIMED
        names += [f"{name}_ms", f"{name}_min_ms", f"{name}_max_ms"] if timed else [name]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells: list[object] = []
        for name, value in asdict(row).items():
            cells += list(value or (None, None, None)) if name in _TIMED else [value]
        writer.writerow(cells)
    return text.getvalue()
