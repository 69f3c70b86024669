"""Count what a computation does: operations, bytes, memory kept, and the machine's peaks."""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_VIEWS = (
    "view", "reshape", "expand", "permute", "transpose", "t", "slice", "select", "split",
    "split_with_sizes", "unsqueeze", "squeeze", "unbind", "alias", "detach", "unfold", "as_strided",
    "_unsafe_view", "chunk", "real", "imag", "view_as_real", "view_as_complex", "_conj",
)  # fmt: skip
_MOVES = (
    "clone", "copy_", "_to_copy", "cat", "stack", "index_select", "zeros", "new_zeros",
    "zeros_like", "empty", "new_empty", "empty_like", "fill_", "constant_pad_nd",
    "slice_backward", "select_backward", "slice_scatter", "select_scatter", "zero_",
    "full_like", "ones_like", "new_empty_strided", "index_fill", "masked_fill",
)  # fmt: skip


_KERNELS = ("operator_apply", "operator_gather", "operator_scatter")  # of one matrix an edge


class Counts(NamedTuple):
    """Floating-point operations, and bytes that the single operations read and write."""

    flops: int
    n_bytes: int


class Peaks(NamedTuple):
    """Measured rates of the machine: largest matrix product, largest copy."""

    flops_per_s: float
    bytes_per_s: float


class _Counter(TorchDispatchMode):
    """Add up every operation: 2·n³ for matrix products, 5 n log₂ n for Fourier transforms,
    one for each element otherwise; moves and views compute nothing, and kernels of this package
    what they are made for."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.n_bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in _VIEWS:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.n_bytes += sum(_touched(tensor) for tensor in (*inputs, *results))
        if func._overloadpacket in flop_registry:
            self.flops += int(
                flop_registry[func._overloadpacket](*args, **kwargs or {}, out_val=out)
            )
        elif name in _KERNELS:
            operator, weights = args[1:3]
            self.flops += weights.shape[1] * (2 * operator.numel() + operator[:, :, 0].numel())
        elif "fft" in name:
            size = math.prod(results[0].shape[d] for d in args[1])
            self.flops += int(5 * results[0].numel() * math.log2(max(size, 2)))
        elif name not in _MOVES:
            self.flops += max((tensor.numel() for tensor in (*inputs, *results)), default=0)
        return out


def count(function: Callable[[], Any]) -> Counts:
    """Run a function once and count what it does."""
    with _Counter() as counter:
        function()
    return Counts(counter.flops, counter.n_bytes)


def kept_for_backward(function: Callable[[], Any], inputs: Sequence[Tensor]) -> int:
    """Bytes that a function's graph holds beside its inputs."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # noqa: F841  kept alive: a freed storage could be counted twice
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def free_memory(device: torch.device) -> int | None:
    """Bytes that a computation can still take, or None where nobody says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_number("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024)]
    most = _number("/sys/fs/cgroup/memory.max", r"(\d+)", 1)
    taken = _number("/sys/fs/cgroup/memory.current", r"(\d+)", 1)
    limits.append(None if most is None or taken is None else most - taken)
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _number(path: str, pattern: str, unit: int) -> int | None:
    """Find a number in a file of the system."""
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * unit if found else None


def peak_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Run a function once: bytes that the process, or the GPU, held at most beyond those before.

    None where the system does not tell (it takes /proc of Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is used again would not be seen
        Path("/proc/self/clear_refs").write_text("5")  # the largest size becomes the present one
    except (OSError, AttributeError):
        return None
    first = _number("/proc/self/status", r"VmRSS:\s+(\d+) kB", 1024)
    function()
    most = _number("/proc/self/status", r"VmHWM:\s+(\d+) kB", 1024)
    return None if first is None or most is None else max(0, most - first)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Time a large matrix product and a large copy."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    product = best_time(lambda: matrix @ matrix, device)
    source = torch.ones(32 * 2**20 if device.type == "cpu" else 2**29, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = best_time(lambda: target.copy_(source), device)
    return Peaks(2 * size**3 / product, 2 * source.nbytes / copy)


def best_time(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Shortest of some runs after one to warm up, s."""
    times = []
    for _ in range(repeats + 1):
        begin = synchronized_time(device)
        function()
        times.append(synchronized_time(device) - begin)
    return min(times[1:])


def synchronized_time(device: torch.device) -> float:
    """Read the clock when the device has finished, s."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lay cells out as a Markdown table; the first line is the head.

    Args:
        lines: cells, as many in each line.
        left: columns with text, which stand first and are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def _touched(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded axis is read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride) * tensor.element_size()
