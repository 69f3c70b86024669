"""The price of freedom: what each tensor product costs and how many maps it can express.

Asymptotics and wall times order the products differently, and neither counts what a product can
learn; the time for one dimension of reachable maps does (Xie et al., arXiv 2506.13523).
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlip.benchmarks.counting import (
    Peaks,
    aligned,
    count,
    free_memory,
    kept_for_backward,
    synchronized_time,
)
from mlip.benchmarks.products import Case, e3nn_cases, own_cases
from mlip.ops.tensor_products import Degrees, coupled_paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRIAL_EDGES = 64  # from which time and memory of the whole are foreseen
MEMORY_SHARE = 0.8  # of the free memory that a product may need
OVERHEAD = 1.5  # memory beside what a graph holds, as a factor


@dataclass(frozen=True)
class Row:
    """One product at one degree; times in ms are medians, None where it was not run.

    remark: why it was not run, or what to know of the numbers.
    """

    product: str
    lmax: int
    forward_ms: float | None
    backward_ms: float | None
    double_backward_ms: float | None
    mflop: float | None
    mbyte: float | None
    percent_of_peak_flops: float | None
    percent_of_peak_bandwidth: float | None
    kept_mbyte: float | None
    expressivity: int | None
    paths: str
    us_per_expressivity: float | None
    equivariance_error: float | None
    remark: str


class Limits(NamedTuple):
    """How long a product may take at one degree, s, and how often it is run at most."""

    seconds: float
    repeats: int


def measure(
    lmax: int, channels: int, edges: int, like: Tensor, peaks: Peaks, limits: Limits
) -> Iterator[Row]:
    """Time all products at one degree.

    Each runs with few edges first. Where time or memory would not suffice for all of them, the row
    says so.

    Args:
        lmax: L of both inputs and of the output.
        channels: C.
        edges: E.
        like: gives device and dtype.
        peaks: of the machine, by `measure_peaks`.
        limits: of time.
    """
    for case in chain(own_cases(lmax, channels, like), e3nn_cases(lmax, channels, like)):
        repeats, reason = _foresee(case, edges, like.device, limits)
        if reason:
            yield _row(case, lmax, reason)
        else:
            yield _measured(case, lmax, edges, like.device, peaks, repeats, limits.repeats)


def _foresee(
    case: Case, edges: int, device: torch.device, limits: Limits
) -> tuple[int, str | None]:
    """Say how often a product can run in the time given, or why it cannot."""
    trial = min(edges, TRIAL_EDGES)
    inputs = case.inputs(trial)
    share = edges / trial
    run = sum(_times(case, inputs, device, repeats=1)) * share
    if run > limits.seconds:
        return 0, f"left out: about {run:.0f} s a run, {limits.seconds:g} s allowed"
    need = OVERHEAD * share * kept_for_backward(lambda: _gradients(case, inputs), inputs)
    need += share * sum(part.nbytes for part in inputs) * 2
    free = free_memory(device)
    if free is not None and need > MEMORY_SHARE * free:
        return 0, f"left out: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    return max(1, min(limits.repeats, int(limits.seconds / run) - 1)), None


def _measured(
    case: Case,
    lmax: int,
    edges: int,
    device: torch.device,
    peaks: Peaks,
    repeats: int,
    wanted: int,
) -> Row:
    inputs = case.inputs(edges)
    forward, backward, double = _times(case, inputs, device, repeats)
    with torch.no_grad():
        counts = count(lambda: case.function(*inputs))
    kept = kept_for_backward(lambda: case.function(*inputs), inputs)
    remarks = [case.remark] if case.remark else []
    if repeats < wanted:
        remarks.append(f"{repeats} run{'s' * (repeats > 1)}")
    return _row(
        case,
        lmax,
        ", ".join(remarks),
        forward_ms=forward * 1e3,
        backward_ms=backward * 1e3,
        double_backward_ms=double * 1e3,
        mflop=counts.flops / 1e6,
        mbyte=counts.n_bytes / 1e6,
        percent_of_peak_flops=100 * counts.flops / forward / peaks.flops_per_s,
        percent_of_peak_bandwidth=100 * counts.n_bytes / forward / peaks.bytes_per_s,
        kept_mbyte=kept / 1e6,
        us_per_expressivity=None
        if case.expressivity is None
        else forward * 1e6 / case.expressivity,
    )


def _row(case: Case, lmax: int, remark: str, **measured: float | None) -> Row:
    """Fill in what is known of a product without running it."""
    n_paths = len(coupled_paths(Degrees(lmax, lmax, lmax)))
    unknown = dict.fromkeys(name for name in Row.__dataclass_fields__)
    known = {
        "product": case.name,
        "lmax": lmax,
        "expressivity": case.expressivity,
        "paths": f"{case.reached}/{n_paths}",
        "equivariance_error": case.equivariance_error,
        "remark": remark,
    }
    return Row(**(unknown | known | measured))  # type: ignore[arg-type]


def _gradients(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = case.function(*inputs)
    seed = torch.ones_like(out).requires_grad_()
    return torch.autograd.grad(out, inputs, seed, create_graph=True)


def _times(
    case: Case, inputs: tuple[Tensor, ...], device: torch.device, repeats: int
) -> tuple[float, float, float]:
    """Median times of forward, backward and the backward of that, s; the first run is none."""
    records = []
    seeds: list[Tensor] = []
    for _ in range(repeats + 1):
        begin = synchronized_time(device)
        out = case.function(*inputs)
        after_forward = synchronized_time(device)
        seeds = seeds or [torch.ones_like(out).requires_grad_(), *map(torch.ones_like, inputs)]
        gradients = torch.autograd.grad(out, inputs, seeds[0], create_graph=True)
        after_backward = synchronized_time(device)
        torch.autograd.grad(gradients, (*inputs, seeds[0]), seeds[1:], allow_unused=True)
        end = synchronized_time(device)
        records.append(
            (after_forward - begin, after_backward - after_forward, end - after_backward)
        )
    forward, backward, double = (statistics.median(c) for c in zip(*records[1:], strict=True))
    return forward, backward, double


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table."""
    heads = (
        "product", "L", "forward ms", "backward", "double", "MFLOP", "MB", "% FLOP/s", "% B/s",
        "kept MB", "maps", "paths", "µs/map", "equivariance", "remark",
    )  # fmt: skip
    lines = [heads, *(tuple(map(_format, asdict(row).values())) for row in rows)]
    return aligned(lines, left=1)


def as_csv(rows: Iterable[Row]) -> str:
    """Write rows as comma-separated values with a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*Row.__dataclass_fields__], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def plot(rows: Sequence[Row]) -> Figure:
    """Draw forward time against expressivity, one line for each product."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row.product for row in rows)):
        points = [r for r in rows if r.product == name and r.expressivity and r.forward_ms]
        if not points:
            continue
        maps = [float(point.expressivity or 0) for point in points]
        times = [float(point.forward_ms or 0) for point in points]
        axes.plot(maps, times, marker="osD^vPX"[i % 7], label=name)
        for point, at in zip(points, zip(maps, times, strict=True), strict=True):
            axes.annotate(f"{point.lmax}", at, xytext=(4, 3), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="expressivity: dimension of reachable equivariant bilinear maps",
        ylabel="forward, ms",
        title="The price of freedom (numbers are L)",
    )
    axes.legend(fontsize=8)
    return figure


def _format(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}"
    return str(value)
