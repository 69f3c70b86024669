"""Threads for kernels that release the interpreter lock: no second OpenMP runtime, safe to fork.

Work is cut into tasks whose results do not depend on the thread that runs them; threads take the
next task when they are free. They are PyTorch's own where those can be had (``team``), else a pool.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import torch

from mlip.ops.cpu import team

_pool: tuple[int, ThreadPoolExecutor] | None = None
_lock = threading.Lock()


def _forget() -> None:
    """Drop the pool in a forked child, whose threads do not exist."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def available_threads() -> int:
    """Threads that kernels use: ``torch.get_num_threads()``, within the affinity of the process."""
    wanted = torch.get_num_threads()
    if wanted == 1:
        return 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(wanted, allowed or 1))


def even_parts(size: int, smallest: int, most: int) -> int:
    """Number of parts to cut a loop into: a power of two, which threads share evenly.

    It depends on the loop alone, so that results do not depend on threads.

    Args:
        size: of the loop.
        smallest: size of a part, at least, unless there is only one.
        most: parts.
    """
    parts = max(1, min(most, size // smallest))
    return 1 << (parts.bit_length() - 1)


def run_range(call: Callable[[int, int], object], end: int, *, serial: bool, unit: int = 1) -> None:
    """Call a loop for the ranges that make up 0 … end − 1, cut at multiples of ``unit``.

    Args:
        call: takes begin and end of a range; results must not depend on the cuts.
        end: length.
        serial: there is too little work to share.
        unit: smallest part.
    """
    parts = 1 if serial else 2 * available_threads()
    cuts = [*(end // unit * i // parts * unit for i in range(parts)), end]
    run([partial(call, first, last) for first, last in pairwise(cuts) if last > first])


def run(tasks: Sequence[Callable[[], object]]) -> None:
    """Call all tasks, on as many threads as torch has; returns when all are done.

    Raises:
        Exception: the first error of a task.
    """
    n_threads = min(available_threads(), len(tasks)) if len(tasks) > 1 else 1
    if n_threads <= 1:
        for task in tasks:
            task()
        return
    remaining, take = iter(tasks), threading.Lock()

    def work() -> None:
        while True:
            with take:
                task = next(remaining, None)
            if task is None:
                return
            task()

    if team.is_usable():
        team.run(work, n_threads, max(n_threads, torch.get_num_threads()))
    else:
        _run_in_pool(work, n_threads)


def _run_in_pool(work: Callable[[], object], n_threads: int) -> None:
    futures = [_executor(n_threads).submit(work) for _ in range(n_threads - 1)]
    try:
        work()
    finally:
        for future in futures:
            future.exception()
    for future in futures:
        future.result()


def _executor(n_threads: int) -> ThreadPoolExecutor:
    """Pool of at least n − 1 threads; the caller is the other one."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] < n_threads - 1:
            _pool = (n_threads - 1, ThreadPoolExecutor(n_threads - 1, "mlip-kernel"))
        return _pool[1]
