"""PyTorch's own OpenMP threads, for Python code that releases the interpreter lock.

After each of its operations PyTorch's threads wait busily for the next, for milliseconds; threads
of anybody else share the cores with them. Work that is handed to this very team finds it awake. The
entry is the one that PyTorch itself calls, so no second runtime is loaded: GNU's interface, which
the runtimes of LLVM and Intel on Linux offer as well.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mlip.ops.cpu import cache as code

_forked = False
_BODY = ctypes.CFUNCTYPE(None)


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_usable() -> bool:
    """Whether there is such a team; never in a forked child, which inherits no threads."""
    return not _forked and _runtime() is not None


def run(body: Callable[[], object], n_threads: int, team_size: int) -> None:
    """Call ``body`` once on each of some threads of a team, the calling one among them, and wait.

    Args:
        body: what they do.
        n_threads: how many call it; the runtime may give fewer.
        team_size: threads of the team. If it is not PyTorch's, the runtime ends and starts threads.

    Raises:
        BaseException: the first error of a call, when all have come back.
    """
    runtime = _runtime()
    if runtime is None:
        raise RuntimeError("PyTorch has no OpenMP threads here; ask is_usable() first")
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    callback = _BODY(guarded)
    data = np.array([n_threads, _address(runtime.thread_number), _address(callback)], np.int64)
    runtime.parallel(_enter(), data.ctypes.data, team_size, 0)
    if errors:
        raise errors[0]


class _Runtime(NamedTuple):
    """Functions of the OpenMP library."""

    parallel: Any
    thread_number: Any


@cache
def _runtime() -> _Runtime | None:
    """Find the functions that PyTorch's own calls find, or None."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(own)):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            found = _Runtime(library.GOMP_parallel, library.omp_get_thread_num)
        except (OSError, AttributeError):
            continue
        found.parallel.argtypes = (ctypes.c_void_p,) * 2 + (ctypes.c_uint,) * 2
        found.parallel.restype = None
        return found
    return None


@cache
def _enter() -> int:
    """Address of the compiled function that a team begins with."""
    source = Path(__file__).with_name("team_entry.py")
    address: int = code.load("team", source.read_text(encoding="utf-8")).enter.address
    return address


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
