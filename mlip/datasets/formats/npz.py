"""Read ``metadata.npz``, the table of sizes beside published data sets, without trusting it.

The file may hold anything: arrays of Python objects (code, if loaded), wrong counts, or edge
counts where atom counts belong. Headers are read first, nothing is unpickled, only an array of the
expected length is inflated, and its numbers are compared with a sample of the structures.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from mlip.datasets.dataset import Dataset
from mlip.datasets.structure import Array
from mlip.errors import DataError

SIZES_FILE = "metadata.npz"
_SAMPLE = 32
# What zipfile raises about a damaged, encrypted or exotic archive, and numpy about a header.
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_BAD_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)


def verified_sizes(path: Path, dataset: Dataset) -> tuple[Array | None, list[str]]:
    """Give the number of atoms of every entry if the table fits the data, else what is wrong.

    Args:
        path: the ``metadata.npz``.
        dataset: what it should describe; first, last and some random entries are read.

    Raises:
        DataError: the table holds Python objects.
    """
    sizes, problems = read_sizes(path, len(dataset))
    if sizes is None:
        return None, problems
    wrong = _disagreement(sizes, dataset)
    if wrong is None:
        return sizes, []
    i, stated, found = wrong
    return None, [
        f"{path}: natoms holds other numbers than the rows, e.g. row {i}: {stated} vs {found} "
        "atoms (edge counts, or another order of the files?), it is not used"
    ]


def read_sizes(path: Path, count: int) -> tuple[Array | None, list[str]]:
    """Read the number of atoms of ``count`` entries, or say why the table cannot be used.

    Raises:
        DataError: the table holds Python objects.
    """
    try:
        return _read_natoms(path, count), []
    except _BAD_ARCHIVE as error:
        return None, [f"{path}: cannot be read ({error}), it is not used"]
    except _UnusableError as error:
        return None, [f"{path}: {error}, it is not used"]


class _UnusableError(Exception):
    """The table cannot be used; the text says why."""


def _read_natoms(path: Path, count: int) -> Array:
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for member in archive.infolist():
            with archive.open(member) as file:
                headers[member.filename.removesuffix(".npy")] = _header(path, member.filename, file)
        if "natoms" not in headers:
            raise _UnusableError(f"there is no natoms, only {', '.join(headers) or 'nothing'}")
        shape, dtype = headers["natoms"]
        if len(shape) != 1 or dtype.kind not in "iu":
            raise _UnusableError(f"natoms is {dtype} of shape {shape}, expected a list of integers")
        if shape[0] != count:
            raise _UnusableError(f"natoms has {shape[0]} entries, the data {count}")
        with archive.open("natoms.npy") as file:
            _header(path, "natoms.npy", file)
            data = file.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise _UnusableError("natoms is cut short")
        return np.frombuffer(data, dtype=dtype).astype(np.int64)


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except _BAD_HEADER as error:
        raise _UnusableError(f"{name} is no numpy array ({error})") from None
    if dtype.hasobject:
        raise DataError(
            f"{path}: {name} holds Python objects, which run code when loaded: refused; delete the "
            "file if you do not trust its source (it is not needed)"
        )
    return shape, dtype


def _disagreement(sizes: Array, dataset: Dataset) -> tuple[int, int, int] | None:
    """Find an entry of a sample whose size is not the stated one; bad entries say nothing."""
    n = len(dataset)
    chosen = np.random.default_rng(0).integers(0, n, _SAMPLE).tolist() if n > _SAMPLE else range(n)
    for i in dict.fromkeys([0, n - 1, *chosen]):
        try:
            found = len(dataset[i])
        except DataError:
            continue
        if found != sizes[i]:
            return i, int(sizes[i]), found
    return None
