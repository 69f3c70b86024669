"""The price of freedom: what each tensor product costs and how many maps it can express.

Asymptotics and wall times order the products differently, and neither counts what a product can
learn; the time for one dimension of reachable maps does (Xie et al., arXiv 2506.13523).
"""

from __future__ import annotations

import csv
import importlib.util
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlip.benchmarks.counting import (
    Counts,
    Peaks,
    count,
    kept_for_backward,
    synchronized_time,
)
from mlip.ops.tensor_products import (
    ClebschGordanProduct,
    Degrees,
    Factors,
    GauntProduct,
    LowRankProduct,
    SharedProduct,
    TensorProduct,
    VectorHarmonicProduct,
    coupled_paths,
    find_factors,
    published_rank,
)
from mlip.so3 import spherical_harmonics, wigner_matrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FITTED = 3  # above, factors take minutes to find and are drawn at random: times do not depend on it
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """A product to be timed: its function of the inputs, and what it can express.

    expressivity is None where channels are mixed too; reached counts the paths.
    """

    name: str
    function: Function
    inputs: tuple[Tensor, ...]
    expressivity: int | None
    reached: int
    equivariance_error: float | None


@dataclass(frozen=True)
class Row:
    """One product at one degree; times in ms are medians."""

    product: str
    lmax: int
    forward_ms: float
    backward_ms: float
    double_backward_ms: float
    mflop: float
    mbyte: float
    percent_of_peak_flops: float
    percent_of_peak_bandwidth: float
    kept_mbyte: float
    expressivity: int | None
    paths: str
    us_per_expressivity: float | None
    equivariance_error: float | None


def measure(
    lmax: int, channels: int, edges: int, like: Tensor, peaks: Peaks, repeats: int
) -> Iterator[Row]:
    """Time all products at one degree.

    Args:
        lmax: L of both inputs and of the output.
        channels: C.
        edges: E.
        like: gives device and dtype.
        peaks: of the machine, by `measure_peaks`.
        repeats: runs of which the median is taken.
    """
    n_paths = len(coupled_paths(Degrees(lmax, lmax, lmax)))
    for case in (
        *_own_cases(lmax, channels, edges, like),
        *_e3nn_cases(lmax, channels, edges, like),
    ):
        forward, backward, double = _times(case, like.device, repeats)
        with torch.no_grad():
            counts: Counts = count(lambda case=case: case.function(*case.inputs))  # type: ignore[misc]
        kept = kept_for_backward(lambda case=case: case.function(*case.inputs), case.inputs)  # type: ignore[misc]
        free = case.expressivity
        yield Row(
            case.name,
            lmax,
            forward * 1e3,
            backward * 1e3,
            double * 1e3,
            counts.flops / 1e6,
            counts.n_bytes / 1e6,
            100 * counts.flops / forward / peaks.flops_per_s,
            100 * counts.n_bytes / forward / peaks.bytes_per_s,
            kept / 1e6,
            free,
            f"{case.reached}/{n_paths}",
            None if free is None else forward * 1e6 / free,
            case.equivariance_error,
        )


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table."""
    heads = (
        "product", "L", "forward ms", "backward", "double", "MFLOP", "MB", "% FLOP/s", "% B/s",
        "kept MB", "maps", "paths", "µs/map", "equivariance",
    )  # fmt: skip
    lines = [heads, *((_format(value) for value in asdict(row).values()) for row in rows)]
    cells = [list(line) for line in lines]
    widths = [max(2, *(len(line[i]) for line in cells)) for i in range(len(heads))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in cells
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


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
        points = [row for row in rows if row.product == name and row.expressivity]
        if not points:
            continue
        maps = [float(point.expressivity or 0) for point in points]
        times = [point.forward_ms for point in points]
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


def _own_cases(lmax: int, channels: int, edges: int, like: Tensor) -> Iterator[Case]:
    degrees = Degrees(lmax, lmax, lmax)
    factors, fitted = _factors(lmax)
    products: dict[str, TensorProduct] = {
        "Clebsch–Gordan, weight per path": ClebschGordanProduct(degrees),
        "shared operator, exact": SharedProduct(degrees),
        "low rank, operator": LowRankProduct(factors),
        "low rank, factors": LowRankProduct(factors, "factors"),
        "Gaunt, grid": GauntProduct(degrees),
        "Gaunt, 2-D Fourier": GauntProduct(degrees, "fourier"),
        "vector harmonics": VectorHarmonicProduct(degrees),
    }
    for name, product in products.items():
        inputs = _inputs(lmax, channels, edges, product.n_weights, like)
        low_rank = isinstance(product, LowRankProduct)
        error = None if low_rank and not fitted else _equivariance_error(product, inputs)
        reach = product.expressivity, len(product.paths)
        yield Case(name, product, inputs, *reach, error)
        if low_rank and product.evaluation == "factors":  # type: ignore[attr-defined]
            parts = [factor.to(like) for factor in factors]

            def published(x: Tensor, y: Tensor, w: Tensor, parts: Any = parts) -> Tensor:
                return torch.einsum("ir,jr,kr,eic,ejz,ezc->ekc", *parts, x, y, w)

            yield Case("low rank, one einsum", published, inputs, *reach, error)


def _e3nn_cases(lmax: int, channels: int, edges: int, like: Tensor) -> Iterator[Case]:
    """The same by e3nn, if it is installed; its inputs are in its own layout already."""
    if importlib.util.find_spec("e3nn") is None:
        return
    from e3nn import o3

    degrees = Degrees(lmax, lmax, lmax)
    paths = coupled_paths(degrees)
    features = o3.Irreps([(channels, (degree, 1)) for degree in range(lmax + 1)])
    harmonics = o3.Irreps([(1, (degree, 1)) for degree in range(lmax + 1)])
    instructions = [(l1, l2, l3, "uvu", True) for l1, l2, l3 in paths]
    by_path = o3.TensorProduct(
        features, harmonics, features, instructions, shared_weights=False, internal_weights=False
    ).to(like)
    mixing = o3.FullyConnectedTensorProduct(features, harmonics, features).to(like)
    x, y, w = _inputs(lmax, channels, edges, len(paths), like)
    flat = [part.detach().flatten(1).requires_grad_() for part in (x, y, w)]
    yield Case("e3nn, weight per path", by_path, tuple(flat), len(paths), len(paths), None)
    yield Case("e3nn, fully connected", mixing, tuple(flat[:2]), None, len(paths), None)


def _inputs(
    lmax: int, channels: int, edges: int, n_weights: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (lmax + 1) ** 2
    x = torch.randn(edges, size, channels, generator=generator)
    vectors = torch.randn(edges, 3, generator=generator, dtype=torch.float64)
    y = spherical_harmonics(lmax, vectors)[:, :, None]
    w = torch.randn(edges, n_weights, channels, generator=generator)
    x, y, w = (part.to(like).requires_grad_() for part in (x, y, w))
    return x, y, w


def _times(case: Case, device: torch.device, repeats: int) -> tuple[float, float, float]:
    """Median times of forward, backward and the backward of that, s."""
    records = []
    seeds: list[Tensor] = []
    for _ in range(repeats + 1):
        begin = synchronized_time(device)
        out = case.function(*case.inputs)
        after_forward = synchronized_time(device)
        seeds = seeds or [torch.ones_like(out).requires_grad_(), *map(torch.ones_like, case.inputs)]
        gradients = torch.autograd.grad(out, case.inputs, seeds[0], create_graph=True)
        after_backward = synchronized_time(device)
        torch.autograd.grad(gradients, (*case.inputs, seeds[0]), seeds[1:], allow_unused=True)
        end = synchronized_time(device)
        records.append(
            (after_forward - begin, after_backward - after_forward, end - after_backward)
        )
    forward, backward, double = (statistics.median(c) for c in zip(*records[1:], strict=True))
    return forward, backward, double


def _equivariance_error(product: TensorProduct, inputs: tuple[Tensor, ...]) -> float:
    """Relative error under one rotation, for at most 100 edges."""
    x, y, w = (part.detach()[:100] for part in inputs)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    matrix = matrix * torch.linalg.det(matrix)
    wigner = torch.block_diag(*wigner_matrices(product.degrees.first, matrix))
    turned = [(wigner @ part.cpu().double()).to(part) for part in (x, y)]
    expected = wigner @ product(x, y, w).cpu().double()
    found = product(turned[0], turned[1], w).cpu().double()
    return float((found - expected).norm() / expected.norm())


def _factors(lmax: int) -> tuple[Factors, bool]:
    rank = published_rank(lmax)
    if lmax <= FITTED:
        return find_factors(lmax, rank), True
    generator = torch.Generator().manual_seed(0)
    shape = ((lmax + 1) ** 2, rank)
    a, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return Factors(a, b, c), False


def _format(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}"
    return str(value)
