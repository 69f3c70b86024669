"""Memory that a process keeps between steps of training or simulation."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)
NEVER = -1
LARGEST = 1 << 30  # bytes; larger blocks still go back
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for its next step.

    A step of training takes hundreds of megabytes and frees them at its end. The C library gives
    blocks of that size back to the system, which hands them out anew in pages of 4 kB filled with
    zeros: up to a third of a step. It acts on the whole process, so it is for programs, such as
    ``mlip``, and not for libraries to call. Peak memory stays what it was but for fragments.

    Returns:
        Whether anything was changed: not without glibc, nor where the environment settles it.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in SETTINGS):
        return False
    library = ctypes.CDLL(None)
    kept = library.mallopt(M_MMAP_THRESHOLD, LARGEST)
    return bool(kept and library.mallopt(M_TRIM_THRESHOLD, NEVER))
