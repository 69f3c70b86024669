"""The price of freedom: what is counted, and that the command writes what it promises."""

from __future__ import annotations

import csv
import io
import re

import pytest
import torch
from typer.testing import CliRunner

from mlip.benchmarks.counting import (
    Peaks,
    count,
    free_memory,
    kept_for_backward,
    measure_peaks,
)
from mlip.benchmarks.tensor_products import Limits, Row, as_csv, measure, plot, table
from mlip.cli.app import app
from mlip.ops import operator_apply

EVERY_SHARED = ("shared operator, exact", "low rank, operator", "Gaunt, grid")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Keep the factors of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "factors"
        patch.setattr("mlip.ops.tensor_products.factors._cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="module")
def rows(cache):  # noqa: ARG001
    like = torch.zeros(0, dtype=torch.float64)
    return list(measure(1, 2, 6, like, Peaks(1e12, 1e12), Limits(60.0, 1)))


def test_operations_and_bytes_are_counted():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert count(lambda: a @ b) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert count(lambda: a + 1.0) == (12, 4 * 24)
    assert count(lambda: a.view(12).unsqueeze(0)) == (0, 0)
    assert count(lambda: a[:1].expand(100, 4) * 2.0).n_bytes == 4 * (4 + 400)
    assert count(lambda: torch.cat([a, a])) == (0, 4 * 48)
    assert count(lambda: torch.fft.rfft(torch.ones(8))).flops > 5 * 5


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_operations_of_a_kernel_are_those_of_its_definition(monkeypatch, backend):
    """A multiplication and an addition for each entry, edge and channel, then the weights."""
    monkeypatch.setenv("MLIP_BACKEND", backend)
    x, weights = torch.ones(6, 4, 8, dtype=torch.float64), torch.ones(6, 8, dtype=torch.float64)
    operator = torch.ones(6, 9, 4, dtype=torch.float64)
    flops, n_bytes = count(lambda: operator_apply(x, operator, weights))
    assert flops == 6 * 8 * (2 * 9 * 4 + 9)
    smallest = 8 * (x.numel() + weights.numel() + operator.numel() + 6 * 9 * 8)
    assert n_bytes == smallest if backend == "numba" else n_bytes > smallest


def test_memory_kept_for_the_backward_pass():
    x = torch.ones(100, requires_grad=True)
    assert kept_for_backward(lambda: x * x, (x,)) == 0
    assert kept_for_backward(lambda: x.exp(), (x,)) == 400
    assert kept_for_backward(lambda: (x.exp() * x).sin(), (x,)) == 800


def test_peaks_are_rates():
    peaks = measure_peaks(torch.device("cpu"), torch.float32)
    assert peaks.flops_per_s > 1e8
    assert peaks.bytes_per_s > 1e8


def test_every_product_is_measured(rows):
    found = {row.product: row for row in rows}
    assert len(found) == len(rows) == 10
    full = found["Clebsch–Gordan, weight per path"]
    assert (full.expressivity, full.paths) == (5, "5/5")
    assert {found[name].expressivity for name in EVERY_SHARED} == {4}
    assert found["Gaunt, 2-D Fourier"].paths == "4/5"
    assert found["vector harmonics"].expressivity == 5
    for name, row in found.items():
        exact = not name.startswith("low rank")
        assert not exact or row.equivariance_error < 1e-12, name
        assert min(row.forward_ms, row.backward_ms, row.double_backward_ms) > 0
        assert row.mflop > 0
        assert row.mbyte > 0
        if row.expressivity:
            expected = 1e3 * row.forward_ms / row.expressivity
            assert row.us_per_expressivity == pytest.approx(expected)
    assert 1e-3 < found["low rank, operator"].equivariance_error < 0.1


@pytest.mark.parametrize(
    ("seconds", "free", "remark"),
    [(1e-9, 2**40, "left out: about .* s a run, 1e-09 s allowed"), (60.0, 0, "0 GB are free")],
)
def test_what_cannot_run_is_told_not_left_out(cache, monkeypatch, seconds, free, remark):  # noqa: ARG001
    monkeypatch.setattr("mlip.benchmarks.tensor_products.free_memory", lambda _: free)
    like = torch.zeros(0, dtype=torch.float64)
    rows = list(measure(1, 2, 6, like, Peaks(1e12, 1e12), Limits(seconds, 1)))
    assert len(rows) == 10
    for row in rows:
        assert re.search(remark, row.remark), row.remark
        assert row.forward_ms is None
        assert row.paths.endswith("/5")
        assert row.remark in table(rows)
        assert row.remark in as_csv(rows)
    assert not plot(rows).axes[0].lines


def test_free_memory_is_less_than_there_is():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


def test_table_csv_and_plot_show_all_rows(rows):
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [each["product"] for each in read] == [row.product for row in rows]
    assert {each["remark"] for each in read} >= {"", "mixes channels too"}
    assert float(read[0]["forward_ms"]) == rows[0].forward_ms
    assert set(read[0]) == set(Row.__dataclass_fields__)
    labels = [line.get_label() for line in plot(rows).axes[0].lines]
    assert labels == [row.product for row in rows if row.expressivity]


def test_command_writes_its_files(tmp_path):
    sizes = ["--lmax", "1", "--channels", "2", "--edges", "5", "--repeats", "1"]
    files = ["--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "price.png")]
    done = CliRunner().invoke(app, ["bench", "tensor-products", *sizes, *files])
    assert done.exit_code == 0, done.output
    assert "measured peaks" in done.output
    assert "shared operator, exact" in done.output
    assert (tmp_path / "rows.csv").read_text().startswith("product,lmax,forward_ms")
    assert (tmp_path / "price.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "message"),
    [("--dtype=float16", "float16"), ("--device=cuda:99", "cuda:99"), ("--device=no", "'no'")],
)
def test_command_refuses(option, message):
    done = CliRunner().invoke(app, ["bench", "tensor-products", option])
    assert done.exit_code == 2
    assert message in done.output
