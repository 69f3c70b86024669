"""``mlip bench``: measure operators on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from mlip.benchmarks.counting import Peaks

bench = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure operators on this machine.",
)


@bench.callback()
def _commands() -> None:
    pass


@bench.command("tensor-products")
def tensor_products(
    lmax: Annotated[int, typer.Option(min=1, max=6, help="Highest degree; from 1 on.")] = 3,
    channels: Annotated[int, typer.Option(min=1, help="Channels.")] = 64,
    edges: Annotated[int, typer.Option(min=1, help="Edges.")] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 5,
    budget: Annotated[
        float, typer.Option(min=0.01, help="Seconds for one product at one degree.")
    ] = 20.0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write time against expressivity as PNG.")
    ] = None,
) -> None:
    """Compare tensor products: time, operations, bytes, memory, expressivity, equivariance.

    A product that would take longer, or more memory than is free, is listed with the reason.
    """
    from mlip.benchmarks.tensor_products import Limits, Row, as_csv, measure, table
    from mlip.benchmarks.tensor_products import plot as draw
    from mlip.errors import require
    from mlip.files import atomic_write

    if plot is not None:
        require("matplotlib", "train")
    like, peaks = _machine(f"{edges} edges, {channels} channels", device, dtype)
    rows: list[Row] = []
    for degree in range(1, lmax + 1):
        for row in measure(degree, channels, edges, like, peaks, Limits(budget, repeats)):
            rows.append(row)
            time = "" if row.forward_ms is None else f" {row.forward_ms:.3g} ms forward"
            remark = f" ({row.remark})" if row.remark else ""
            typer.echo(f"L = {degree}, {row.product}:{time}{remark}", err=True)
        if csv is not None:
            with atomic_write(csv, "w") as file:
                file.write(as_csv(rows))
    typer.echo(table(rows))
    if plot is not None:
        with atomic_write(plot) as file:
            draw(rows).savefig(file, format="png", dpi=150)


@bench.command("kernels")
def kernels(
    operators: Annotated[
        list[str] | None, typer.Argument(help="Names of operators; all by default.")
    ] = None,
    atoms: Annotated[int, typer.Option(min=1, help="Atoms.")] = 300,
    edges: Annotated[int, typer.Option(min=1, help="Edges.")] = 8000,
    channels: Annotated[int, typer.Option(min=1, help="Channels.")] = 64,
    lmax: Annotated[int, typer.Option(min=0, max=6, help="Highest degree.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 9,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time to measure in, after one run of everything.")
    ] = 15.0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Time the hot-path operators on every back end: speed, memory, and errors against float64.

    Rates of each pass stand beside those of a large matrix product and a large copy on the same
    machine; what fits in a cache can be faster than that copy.
    """
    import torch

    from mlip.benchmarks.kernel_cases import BUILDERS, Sizes, cases
    from mlip.benchmarks.kernels import Row, as_csv, measure, table
    from mlip.errors import InputError
    from mlip.files import atomic_write

    names = operators or list(BUILDERS)
    for name in names:
        if name not in BUILDERS:
            raise InputError(f"no operator is called {name!r}; there are: {', '.join(BUILDERS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = f"{atoms} atoms, {edges} edges, {channels} channels, degrees to {lmax}"
    like, peaks = _machine(sizes, device, dtype)
    rows: list[Row] = []
    for case in cases(names, Sizes(atoms, edges, channels, lmax, like)):
        rows += measure(
            case, peaks, repeats, seconds / len(names), lambda text: typer.echo(text, err=True)
        )
        typer.echo(f"{case.name} done ({len(rows)} rows)", err=True)
    typer.echo(table(rows))
    if csv is not None:
        with atomic_write(csv, "w") as file:
            file.write(as_csv(rows))


def _machine(sizes: str, device: str, dtype: str) -> tuple[Tensor, Peaks]:
    """Check device and precision, measure peaks, print the facts of a run.

    Returns:
        An empty tensor of that precision on that device, and its peaks.
    """
    import torch

    from mlip.benchmarks.counting import measure_peaks
    from mlip.errors import InputError
    from mlip.potential import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    try:
        like = torch.zeros(0, device=device, dtype=DTYPES[dtype])
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); use cpu or cuda") from None
    peaks = measure_peaks(like.device, like.dtype)
    typer.echo(
        f"{sizes}, {dtype} on {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; measured peaks {peaks.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"{peaks.bytes_per_s / 1e9:.1f} GB/s"
    )
    return like, peaks
