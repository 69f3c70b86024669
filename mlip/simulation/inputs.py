"""Read structures of any number of files, one at a time; a bad one is passed on by name.

The file formats are those of ``mlip.datasets``: native stores and anything that ASE reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ase import Atoms

from mlip.datasets.formats.reader import Reader
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import expand, find_reader
from mlip.datasets.structure import Structure
from mlip.errors import DataError

# A structure with the name that errors call it by, or the reason why it cannot be read.
NamedStructure = tuple[str, Atoms | DataError]


def iter_structures(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> Iterator[NamedStructure]:
    """Return an iterator over every structure of the files, in order.

    A frame that cannot be read yields its error and the next one goes on; a file that breaks
    altogether yields its error once and the next file goes on.

    Args:
        paths: files, or patterns such as ``"data/*.cif"``.

    Raises:
        DataError: a file is missing, empty or of no known format; nothing was read yet.
    """
    readers = [(path, find_reader(path)) for path in expand(paths)]
    return _iterate(readers)


def _iterate(readers: Sequence[tuple[Path, Reader]]) -> Iterator[NamedStructure]:
    for path, reader in readers:
        count = 0
        try:
            for frame, content in reader.read(path, 0, ReadOptions()):
                count += 1
                atoms = content.to_atoms() if isinstance(content, Structure) else content
                yield f"{path} frame {frame}", atoms
        except DataError as error:
            yield str(path), error
        else:
            if count == 0:
                yield str(path), DataError(f"{path}: there are no structures in this file")
