"""Time, rates, memory and errors of the hot-path operators on every back end of a device."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mlip.benchmarks.counting import Peaks, aligned, peak_memory, synchronized_time
from mlip.benchmarks.kernel_cases import Case, Outputs
from mlip.benchmarks.kernel_work import Work
from mlip.errors import InputError
from mlip.ops import Backend

PASSES = Work._fields
Thunk = Callable[[], Outputs]
COUNTED = (
    "Counted once, whatever a back end does: operations of the result, of gradients by all inputs, "
    "and of their gradients (a multiply-add is two); bytes of what a pass takes and gives. In "
    "brackets: range of times, share of the measured peak."
)


class Pass(NamedTuple):
    """Median, shortest and longest time of one pass, ms, and what it does in the median time.

    Rates are those of the operations of ``kernel_work``, None where they are not known, and of the
    bytes of the tensors that the pass takes and gives, each counted once, whatever a back end
    really does; percents are of the measured peaks.
    """

    ms: float
    min_ms: float
    max_ms: float
    gflop_per_s: float | None
    percent_of_peak_flops: float | None
    gbyte_per_s: float
    percent_of_peak_bandwidth: float


@dataclass(frozen=True)
class Row:
    """One operator on one back end.

    double_backward: None where the kernel has no such derivative. peak_mbyte: memory beyond the
    inputs, all passes. error: largest of the relative errors of result, gradients and their
    derivatives against plain PyTorch in float64; torch_error: that of plain PyTorch in this
    precision.
    """

    operator: str
    backend: str
    forward: Pass
    backward: Pass
    double_backward: Pass | None
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
    traffic = pass_bytes(case)
    for backend, own in times.items():
        kept = peak_memory(lambda name=backend: _derivatives(case, name, case.inputs), device)  # type: ignore[misc]
        passes = [
            _pass(list(t), None if case.work is None else case.work[i], traffic[i], peaks)
            for i, t in enumerate(zip(*own, strict=True))
        ]
        yield Row(
            case.name,
            backend,
            passes[0],
            passes[1],
            passes[2] if case.derivatives > 1 else None,
            None if kept is None else kept / 1e6,
            errors[backend],
            errors["torch"],
        )


def _pass(times: list[float], flops: int | None, n_bytes: int, peaks: Peaks) -> Pass:
    """Turn times, ms, and counts into rates."""
    median = statistics.median(times)
    operations = None if flops is None else 1e3 * flops / median
    moved = 1e3 * n_bytes / median
    return Pass(
        median,
        min(times),
        max(times),
        None if operations is None else operations / 1e9,
        None if operations is None else 100 * operations / peaks.flops_per_s,
        moved / 1e9,
        100 * moved / peaks.bytes_per_s,
    )


def pass_bytes(case: Case) -> Work:
    """Count the bytes of the tensors that each pass takes and gives, by plain PyTorch.

    An input that a gradient does not depend on is not taken.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in case.inputs]
    out = case.run("torch", *leaves)
    seeds = [_seed(tensor).requires_grad_() for tensor in out]
    gradients = torch.autograd.grad(out, leaves, seeds, create_graph=True)
    second = torch.autograd.grad(
        gradients, [*leaves, *seeds], [_seed(tensor) for tensor in gradients], allow_unused=True
    )
    of_leaves = second[: len(leaves)]
    taken = [leaf for leaf, part in zip(leaves, of_leaves, strict=True) if part is not None]
    first = [*taken, *seeds] if taken else []  # else gradients depend on the seeds linearly
    given = [part for part in second if part is not None]
    return Work(
        _bytes([*leaves, *out]),
        _bytes([*taken, *seeds, *gradients]),
        _bytes([*first, *gradients, *given]),  # cotangents are as large as the gradients
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _passes(
    case: Case, backend: Backend, inputs: Sequence[Tensor], call: Callable[[Thunk], Outputs]
) -> Iterator[Outputs]:
    """Yield result, gradients and gradients of those, of fixed sums.

    ``call`` calls what computes them, and nothing else.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = call(lambda: case.run(backend, *leaves))
    yield out
    seeds = [_seed(tensor).requires_grad_() for tensor in out]
    twice = case.derivatives > 1
    gradients = call(
        lambda: torch.autograd.grad(out, leaves, seeds, create_graph=twice, materialize_grads=True)
    )
    yield tuple(_masked(case, list(gradients)))
    if twice:
        cotangents = _masked(case, [_seed(tensor) for tensor in gradients])
        known = [pair for pair in zip(gradients, cotangents, strict=True) if pair[0].requires_grad]
        parts, own = zip(*known, strict=True)
        second = call(
            lambda: torch.autograd.grad(parts, [*leaves, *seeds], own, materialize_grads=True)
        )
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
    passes = _passes(case, backend, inputs, lambda compute: compute())
    return [tensor.detach() for outputs in passes for tensor in outputs]


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative error of a tensor."""
    sizes = [float(torch.linalg.vector_norm(b)) for b in truth]
    wrong = [float(torch.linalg.vector_norm(a - b)) for a, b in zip(found, truth, strict=True)]
    return max(a / b if b else a for a, b in zip(wrong, sizes, strict=True))


def _times(case: Case, backend: Backend, device: torch.device) -> list[float]:
    """Time each pass once, ms."""
    found: list[float] = []

    def call(compute: Thunk) -> Outputs:
        begin = synchronized_time(device)
        outputs = compute()
        found.append(1e3 * (synchronized_time(device) - begin))
        return outputs

    for _ in _passes(case, backend, case.inputs, call):
        pass
    return found


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table, one line for each pass, after a line on what is counted."""
    heads = (
        "operator", "back end", "pass", "ms", "GFLOP/s", "GB/s", "peak MB", "error", "PyTorch's",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        names = (row.operator, row.backend)
        of_all = (
            "–" if row.peak_mbyte is None else f"{row.peak_mbyte:.0f}",
            f"{row.error:.1e}",
            f"{row.torch_error:.1e}",
        )
        for name in PASSES:
            measured: Pass | None = getattr(row, name)
            cells = ("–",) * 3 if measured is None else _cells(measured)
            lines.append((*names, name.replace("_", " "), *cells, *of_all))
            names, of_all = ("", ""), ("", "", "")
    return f"{COUNTED}\n\n{aligned(lines, left=3)}"


def _cells(measured: Pass) -> tuple[str, str, str]:
    ms, shortest, longest, *rates = measured
    return (
        f"{ms:.3g} ({shortest:.3g}–{longest:.3g})",
        _rate(*rates[:2]),
        _rate(*rates[2:]),
    )


def _rate(value: float | None, percent: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ({percent:.0f} %)"


def as_csv(rows: Iterable[Row]) -> str:
    """Write rows as comma-separated values with a line of names."""
    names: list[str] = []
    for name in Row.__dataclass_fields__:
        names += [f"{name}_{part}" for part in Pass._fields] if name in PASSES else [name]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells: list[object] = []
        for name in Row.__dataclass_fields__:
            value = getattr(row, name)
            missing = (None,) * len(Pass._fields)
            cells += list(value or missing) if name in PASSES else [value]
        writer.writerow(cells)
    return text.getvalue()
