"""How Numba compiles what kernels are made of. Imported by generated modules and ``loops.py``."""

from typing import Any

from numba import njit

OPTIONS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "boundscheck": False, "no_cfunc_wrapper": True,
}  # fmt: skip

compiled = njit(**OPTIONS, cache=True)
"""For functions that Python calls; their machine code is kept on disk."""

piece = njit(**OPTIONS, inline="always")
"""For functions that only compiled ones call: written into these, not compiled by themselves."""
