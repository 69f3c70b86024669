"""Memory of results: large blocks in huge pages, at a cache line, used again when all is gone."""

from __future__ import annotations

import gc
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mlip.ops.cpu import memory
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


@pytest.fixture
def free(monkeypatch):
    """Blocks that lie free; none at the start."""
    blocks = deque()
    monkeypatch.setattr(memory, "_free", blocks)
    return blocks


def filled(n, value=1.0):
    return empty_for(torch.empty(0), (n,)).fill_(value)


@pytest.mark.parametrize("size", [1.0, 1.05, 0.9])
def test_a_block_is_used_again_for_results_of_about_its_size(free, size):
    address = filled(LARGE).data_ptr()
    assert len(free) == 1
    again = filled(int(size * LARGE))
    assert again.data_ptr() == address
    assert not free


@pytest.mark.parametrize("size", [1.2, 0.5])
def test_other_sizes_get_other_blocks(free, size):
    first = filled(LARGE)
    address = first.data_ptr()
    del first
    assert filled(int(size * LARGE)).data_ptr() != address
    assert len(free) == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x,
        lambda x: x[5:7],
        lambda x: x.view(2, -1).T,
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: x.numpy()[3:],
        lambda x: np.from_dlpack(x),
        lambda x: x.requires_grad_(True).square(),
        lambda x: x.untyped_storage(),
    ],
)
def test_what_is_still_seen_is_not_given_away(free, use):
    seen = use(filled(LARGE, 3.0))
    gc.collect()
    other = filled(LARGE, 5.0)
    assert not free
    if isinstance(seen, torch.Tensor | np.ndarray) and not getattr(seen, "requires_grad", False):
        assert (seen == 3.0).all()
    elif isinstance(seen, torch.Tensor):
        (gradient,) = torch.autograd.grad(seen.sum(), seen.grad_fn.next_functions[0][0].variable)
        assert (gradient == 6.0).all()
    del seen, other
    gc.collect()
    assert len(free) == 2


def test_blocks_that_lie_free_are_bounded(free, monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 5 * 4 * LARGE)
    results = [filled(n * LARGE) for n in (1, 2, 3)]
    sizes = []
    while results:
        results.pop(0)
        sizes.append([round(block.nbytes / (4 * LARGE)) for block in free])
    assert sizes == [[1], [1, 2], [3]]  # the oldest went
    filled(6 * LARGE)
    assert len(free) == 1  # too large to lie free: it pushed nothing out


def test_threads_do_not_get_the_same_block(free):
    def work(i):
        for _ in range(50):
            x = filled(LARGE // 4, i)
            assert (x == i).all()
            del x

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert 1 <= len(free) <= 4
