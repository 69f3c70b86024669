"""``mlip bench``: measure operators on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    import torch

    from mlip.benchmarks.counting import measure_peaks
    from mlip.benchmarks.tensor_products import Limits, Row, as_csv, measure, table
    from mlip.benchmarks.tensor_products import plot as draw
    from mlip.errors import InputError, require
    from mlip.files import atomic_write
    from mlip.potential import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if plot is not None:
        require("matplotlib", "train")
    try:
        like = torch.zeros(0, device=device, dtype=DTYPES[dtype])
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); use cpu or cuda") from None
    peaks = measure_peaks(like.device, like.dtype)
    typer.echo(
        f"{edges} edges, {channels} channels, {dtype} on {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; measured peaks "
        f"{peaks.flops_per_s / 1e9:.0f} GFLOP/s, {peaks.bytes_per_s / 1e9:.1f} GB/s"
    )
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
