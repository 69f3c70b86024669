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
from typing import Any

import torch

_forked = False
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_usable() -> bool:
    """Whether there is such a team; never in a forked child, which inherits no threads."""
    return not _forked and _entry() is not None


def run_on_all(body: Callable[[], object], n_threads: int) -> None:
    """Call ``body`` once on each of ``n_threads`` threads, the calling one among them, and wait.

    A team of another size than PyTorch's makes the runtime end and start threads. The runtime may
    give fewer threads than asked for.

    Raises:
        BaseException: the first error of a call, when all have come back.
    """
    entry = _entry()
    if entry is None:
        raise RuntimeError("PyTorch has no OpenMP threads here; ask is_usable() first")
    errors: list[BaseException] = []

    def guarded(_: int | None) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    entry(_BODY(guarded), None, n_threads, 0)
    if errors:
        raise errors[0]


@cache
def _entry() -> Any:
    """Find the function that starts a parallel region, as PyTorch's own calls find it, or None."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(own)):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            entry = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        entry.restype = None
        return entry
    return None
