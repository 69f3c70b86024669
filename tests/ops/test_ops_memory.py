"""Results of kernels lie in fresh memory: large ones in huge pages, all at a cache line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlip.ops.cpu.memory import LARGE, empty_for

SMAPS = Path("/proc/self/smaps")


def flags_of(address):
    """What the system was told of the memory at an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (LARGE // 4, 3), (LARGE // 2 + 3,)])
def test_has_the_precision_and_shape_that_are_asked_for(dtype, shape):
    like = torch.empty(2, dtype=dtype)
    for _ in range(3):
        found = empty_for(like, shape)
        assert (found.dtype, found.shape) == (dtype, shape)
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0 or not found.numel()
        found.fill_(1)
        assert found.sum() == found.numel()


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc/self/smaps")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs huge pages"
)
def test_large_results_ask_for_huge_pages():
    n = 64 * 1024 * 1024
    huge, plain = empty_for(torch.empty(0), (n,)), torch.empty(n)
    assert "hg" in flags_of(huge.data_ptr() + 2 * n)
    assert "hg" not in flags_of(plain.data_ptr() + 2 * n)
