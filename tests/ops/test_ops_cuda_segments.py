"""CUDA kernels of sums and softmax over rows, run on the CPU, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from mlip.ops import envelope_softmax
from mlip.ops.cuda.segments import cuda_segment_shares, cuda_segment_sum
from tests.ops.host_cuda import BACKWARDS, FORWARDS, SHUFFLED, needs_compiler

pytestmark = needs_compiler
ROWS = (0, 5, 0, 33, 1, 0)  # of each segment


def example(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    index = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    rowptr = torch.tensor([0, *ROWS]).cumsum(0)
    values = torch.randn(sum(ROWS), *shape, generator=generator, dtype=torch.float64)
    return values.to(dtype), index, rowptr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (0,), (300,)])
def test_sums_of_rows(on_host, dtype, shape):
    values, index, rowptr = example(dtype, *shape)
    truth = torch.zeros(len(ROWS), *shape, dtype=torch.float64).index_add(0, index, values.double())
    found = []
    for order in (FORWARDS, BACKWARDS, SHUFFLED):
        on_host(order)
        found.append(cuda_segment_sum(values, index, rowptr))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(found[0].double(), truth, rtol=0, atol=tolerance)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [(2500, 0, 700), (3000,), (0, 5000)])
def test_long_segments_go_in_pieces(on_host, rows):
    index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    rowptr = torch.tensor([0, *rows]).cumsum(0)
    values = torch.randn(len(index), 2, generator=torch.Generator().manual_seed(0))
    exact = torch.zeros(len(rows), 2, dtype=torch.float64).index_add(0, index, values.double())
    found = []
    for order in (FORWARDS, SHUFFLED):
        on_host(order)
        found.append(cuda_segment_sum(values, index, rowptr))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=2e-5)
    one_by_one = torch.zeros(len(rows), 2).index_add(0, index, values)
    assert (found[0] - exact).norm() < 0.7 * (one_by_one - exact).norm()  # sums of sums


def test_no_rows(on_host):
    on_host()
    empty = torch.zeros(0, dtype=torch.int64)
    found = cuda_segment_sum(torch.zeros(0, 4), empty, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(found, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax(on_host, dtype):
    on_host(SHUFFLED)
    logits, index, rowptr = example(dtype, 4)
    logits = 80 * logits  # exp overflows without the largest being taken out
    weights = torch.rand(len(logits), dtype=dtype)
    found = weights[:, None] * cuda_segment_shares(logits, weights, index, rowptr, 1e-16)
    double = logits.double(), weights.double()
    truth = envelope_softmax(*double, index, len(ROWS), 1e-16, "torch")
    error = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=error)
