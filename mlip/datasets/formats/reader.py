"""What a file format has to offer to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlip.datasets.dataset import Dataset, DatasetFacts, IndexedDataset
from mlip.datasets.labels import Extracted
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import Structure
from mlip.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

# One frame: a finished structure, one with the places its labels came from, ASE atoms whose labels
# are still to be found, or its problem (a DataError; the caller adds file and frame if it does not
# start with the file).

Frames = Iterator[tuple[int, "Structure | Extracted | Atoms | DataError"]]


class Reader(NamedTuple):
    """A file format.

    Attributes:
        name: how errors and reports call it.
        recognises: whether a file is of this format; cheap and without side effects.
        read: frames of a file from a given index on, in order.
        open: random access to a file, or None where the format only streams.
        facts: what is known of such a set that only streams, if more than its format.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, int, ReadOptions], Frames]
    open: Callable[[Path, ReadOptions], Dataset] | None = None
    facts: Callable[[ReadOptions], DatasetFacts] | None = None


def by_index(open_file: Callable[[Path, ReadOptions], Dataset]) -> Callable[..., Frames]:
    """Make the ``read`` of a format with random access from its ``open``.

    Entries of an `IndexedDataset` come with the names that their labels had.
    """

    def read(path: Path, start: int, options: ReadOptions) -> Frames:
        dataset = open_file(path, options)
        read_entry = dataset.extract if isinstance(dataset, IndexedDataset) else dataset.__getitem__
        for i in range(start, len(dataset)):
            try:
                yield i, read_entry(i)
            except DataError as error:
                yield i, error

    return read
