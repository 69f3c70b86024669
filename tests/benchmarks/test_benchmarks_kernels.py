"""The benchmark of the operators: what it counts, that it sees errors, and its command."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest
import torch
from typer.testing import CliRunner

from mlip.benchmarks import kernels
from mlip.benchmarks.counting import Peaks, count, peak_memory
from mlip.benchmarks.kernel_cases import BUILDERS, Case, Sizes, cases
from mlip.benchmarks.kernels import as_csv, back_ends, measure, pass_bytes, table
from mlip.cli.app import app

CPU = torch.device("cpu")
PEAKS = Peaks(1e9, 1e9)
SIZES = Sizes(7, 40, 16, 1, torch.zeros(0))


def rows_of(name: str, sizes: Sizes = SIZES, repeats: int = 1, report=pytest.fail) -> list:
    (case,) = cases([name], sizes)
    return list(measure(case, PEAKS, repeats, 60.0, report))


@pytest.mark.parametrize("name", BUILDERS)
def test_kernels_are_within_twice_the_error_of_pytorch(name):
    found = {row.backend: row for row in rows_of(name)}
    assert tuple(found) == back_ends(CPU) == ("torch", "numba")
    for row in found.values():
        assert row.torch_error == found["torch"].error
        assert 0 < row.error <= 2 * row.torch_error + 1e-7
        assert row.forward.min_ms <= row.forward.ms <= row.forward.max_ms
        assert (row.double_backward is None) == (name == "gated_product")


def test_a_wrong_derivative_is_seen():
    (case,) = cases(["segment_sum"], dataclasses.replace(SIZES, like=torch.zeros(0).double()))

    def wrong(backend, values):
        out = case.run("torch", values)[0]
        return (out if backend == "torch" else out + 1e-3 * (out - out.detach()),)

    peaks = Case("wrong", wrong, case.inputs, None)
    torch_row, other = measure(peaks, PEAKS, 1, 60.0, pytest.fail)
    assert torch_row.error == 0
    assert other.error == pytest.approx(1e-3, rel=1e-6)
    assert other.forward.gflop_per_s is other.double_backward.gflop_per_s is None


def test_rates_count_operations_and_bytes_once():
    """Operations by a count of those that the plain form runs; it multiplies no more than that."""
    (case,) = cases(["operator_scatter"], SIZES)
    counted = count(lambda: case.run("torch", *case.inputs)).flops
    assert case.work.forward == pytest.approx(counted, rel=0.1)
    row = rows_of("segment_sum")[0]
    edges, atoms = 4 * 40 * 16, 4 * 7 * 16  # bytes
    for found, operations, n_bytes in (
        (row.forward, 40 * 16, edges + atoms),
        (row.backward, 0, atoms + edges),
        (row.double_backward, 40 * 16, edges + atoms),
    ):
        seconds = found.ms / 1e3
        assert found.gflop_per_s == pytest.approx(operations / seconds / 1e9)
        assert found.percent_of_peak_flops == pytest.approx(100 * found.gflop_per_s)
        assert found.gbyte_per_s == pytest.approx(n_bytes / seconds / 1e9)
        assert found.percent_of_peak_bandwidth == pytest.approx(100 * found.gbyte_per_s)


def test_bytes_of_what_each_pass_takes_and_gives():
    """A product y = w · K x of one edge: gradients depend on all inputs and on that of y."""
    (case,) = cases(["operator_scatter"], SIZES)
    inputs, out = (4 * (40 * 4 * 16 + 40 * 16 + 40 * 16)), 4 * 7 * 4 * 16
    assert pass_bytes(case) == (inputs + out, 2 * inputs + out, 3 * inputs + 2 * out)


def test_making_the_seeds_takes_no_time(monkeypatch):
    """A clock that only seeds move: every pass takes none of it."""
    clock = [0.0]
    made = kernels._seed

    def seed(like):
        clock[0] += 1.0
        return made(like)

    monkeypatch.setattr(kernels, "_seed", seed)
    monkeypatch.setattr(kernels, "synchronized_time", lambda device: clock[0])  # noqa: ARG005
    (case,) = cases(["segment_sum"], SIZES)
    assert kernels._times(case, "torch", CPU) == [0.0, 0.0, 0.0]
    assert clock[0] == 2.0


def test_turns_end_with_the_time(monkeypatch):
    """A pass takes 1 ms and a turn 3: the half of 14 ms that a back end has is used in 3 turns."""
    turns: list[str] = []

    def times(case, backend, device):  # noqa: ARG001
        turns.append(backend)
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(kernels, "_times", times)
    (case,) = cases(["segment_sum"], SIZES)
    list(measure(case, PEAKS, 10**9, 0.014, pytest.fail))
    assert turns == 3 * ["torch", "numba"]


def test_what_a_kernel_cannot_run_is_told(monkeypatch):
    monkeypatch.setattr("mlip.ops.shared_operator.MOST_COEFFICIENTS", 3)
    told: list[str] = []
    (row,) = rows_of("operator_gather", report=told.append)
    assert row.backend == "torch"
    assert "4 coefficients are more than 3" in told[0]


def test_peak_memory_sees_what_is_freed_again():
    found = peak_memory(lambda: torch.ones(20_000_000).sum(), CPU)
    if found is None:
        pytest.skip("the system does not tell the largest size of a process")
    assert 75e6 < found < 120e6


def test_command_prints_and_writes_all_rows(tmp_path):
    sizes = ["--atoms=7", "--edges=40", "--channels=8", "--lmax=1", "--repeats=2"]
    arguments = ["segment_sum", "forces_and_virial", "--dtype=float64", "--threads=1"]
    file = tmp_path / "rows.csv"
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments, *sizes, "--csv", str(file)])
    assert done.exit_code == 0, done.output
    assert "measured peaks" in done.output
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["operator"] for row in rows] == ["segment_sum"] * 2 + ["forces_and_virial"] * 2
    for part in ("ms", "max_ms", "gflop_per_s", "percent_of_peak_bandwidth"):
        assert all(float(row[f"double_backward_{part}"]) > 0 for row in rows)
    lines = [line for line in done.output.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 * len(rows)
    assert "a multiply-add is two" in done.output
    assert len({len(line) for line in lines}) == 1


def test_table_and_csv_leave_out_what_is_not_there():
    rows = rows_of("gated_product")
    assert " – " in table(rows)
    assert next(csv.DictReader(io.StringIO(as_csv(rows))))["double_backward_ms"] == ""


def test_command_names_the_operators_it_knows():
    done = CliRunner().invoke(app, ["bench", "kernels", "sum"])
    assert done.exit_code == 2
    assert "no operator is called 'sum'" in done.output
    assert "radial_convolution" in done.output
