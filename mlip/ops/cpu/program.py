"""The compiled code of a set of paths, and the tables that its loops read.

Up to degree 4 the products are written out for the set of paths (``generate.py``). Above, that text
would be too long to compile: there one module for all sets of paths goes through tables
(``table_text.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from mlip.ops.convolution import HIGHEST_WRITTEN_OUT, Path
from mlip.ops.cpu import cache

Array = np.ndarray


@dataclass(frozen=True)
class Program:
    """What runs for one set of paths in one precision.

    code: module with ``forward_pass`` and ``backward_pass``.
    row_order: [rows] which row (path, m3) of a layout each row of the sums is, within the
        path; None: the same.
    tables: first arguments of the passes; none for generated code, where they are constants.
        N_PATHS, N_ROWS: [groups] int64, paths and output rows of the paths of each l1;
        MOST_PATHS: of a group; N_HARMONICS: of an edge;
        N_ENTRIES: of the edge matrices of all paths;
        N_SLOPES: numbers that a tile needs for gradients of harmonics before they are summed;
        N_SCRATCH: numbers of scratch;
        plan, values: see ``table_plan.py``.
    """

    code: ModuleType
    row_order: Array | None = None
    tables: tuple[Array | int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a pass for second derivatives is for.

    along: there is a cotangent of the features.
    radial: weights are made from radial functions, not read.
    harmonics, kernel: gradients of the harmonics, of a radial kernel, are wanted.
    slopes: gradients of the weights are wanted, or of what they are made from.
    """

    along: bool
    radial: bool
    harmonics: bool
    kernel: bool
    slopes: bool

    def __str__(self) -> str:
        return "".join(name[0] for name, asked in vars(self).items() if asked)


def is_generated(paths: tuple[Path, ...]) -> bool:
    """Whether the products of these paths are written out."""
    return max(max(path) for path in paths) <= HIGHEST_WRITTEN_OUT


@lru_cache(maxsize=256)
def program(paths: tuple[Path, ...], lmax_edge: int, dtype: str, radial: bool) -> Program:
    """Generate the code of a set of paths or tabulate it; compiled code comes from the cache.

    ``radial``: weights are made from radial functions; else they are given.
    """
    if is_generated(paths):
        return _generated(paths, lmax_edge, dtype, radial)
    return _table_driven(paths, lmax_edge, dtype)


def _generated(paths: tuple[Path, ...], lmax_edge: int, dtype: str, radial: bool) -> Program:
    from mlip.ops.cpu.generate import source_text

    kind = "_radial" if radial else ""
    name = f"convolution_l{max(max(path) for path in paths)}_{len(paths)}paths_{dtype}{kind}"
    return Program(cache.load(name, source_text(paths, lmax_edge, dtype, radial)))


@lru_cache(maxsize=256)
def second_module(paths: tuple[Path, ...], lmax_edge: int, dtype: str, asked: Asked) -> ModuleType:
    """Generate the module with ``second_pass`` for paths that are written out."""
    from mlip.ops.cpu.second_text import source_text

    name = f"second_l{max(max(path) for path in paths)}_{len(paths)}paths_{asked}_{dtype}"
    return cache.load(name, source_text(paths, lmax_edge, dtype, asked))


def _table_driven(paths: tuple[Path, ...], lmax_edge: int, dtype: str) -> Program:
    from mlip.ops.cpu.simd import lanes
    from mlip.ops.cpu.table_plan import scratch_vectors, tabulate
    from mlip.ops.cpu.table_text import source_text

    width, n_harmonics = lanes(dtype), (lmax_edge + 1) ** 2
    plan = tabulate(paths, n_harmonics)
    rows = [
        [2 * l3 + 1 for a, _, l3 in paths if a == l1] for l1 in sorted({l1 for l1, _, _ in paths})
    ]
    tables = (
        np.array([len(group) for group in rows], dtype=np.int64),
        np.array([sum(group) for group in rows], dtype=np.int64),
        max(len(group) for group in rows),
        n_harmonics,
        plan.n_entries,
        (plan.n_entries + n_harmonics) * width,
        scratch_vectors(paths, width) * width,
        plan.integers,
        plan.values.astype(dtype),
    )
    code = cache.load(f"convolution_tables_{dtype}", source_text(dtype))
    return Program(code, plan.row_order, tables)
