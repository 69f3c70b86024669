"""Where a conversion writes: one store, a folder of stores of bounded size, or text.

Each takes encoded structures in order, says after an interruption how many of them are safe, and
takes its name only when complete.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mlip.datasets.manifest import MANIFEST, write_manifest, write_sizes
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import find_reader
from mlip.datasets.structure import Array, Structure
from mlip.datasets.writer import (
    LmdbWriter,
    StructureWriter,
    left_over,
    open_locked,
    partial_name,
    sync_folder,
    write_error,
)
from mlip.errors import DataError, InputError

_NAMES = "NAME.lmdb (store), NAME.aselmdb, NAME.extxyz or a folder"
TEXT = frozenset({".extxyz", ".xyz"})
ASELMDB = ".aselmdb"
SIZES = "metadata.npz"
_OURS = re.compile(r"data\.\d{4,}\.(lmdb|aselmdb)(-lock)?|manifest\.json|metadata\.npz")


class Output(Protocol):
    """What a conversion needs of the place it writes to.

    Attributes:
        metadata: facts about the data that are known from the start.
    """

    metadata: dict[str, Any]

    def __len__(self) -> int:
        """Give the number of structures, also those that an interrupted run made safe."""
        ...

    def append_encoded(self, data: bytes, n_atoms: int) -> None:
        """Take the next structure."""
        ...

    def finish(self, metadata: dict[str, Any], n_atoms: Array) -> None:
        """Make everything durable and give the output its name.

        Args:
            metadata: facts about the data that are known in the end.
            n_atoms: [len] atoms of every structure.
        """
        ...

    def abort(self, *, keep_partial: bool = False) -> None:
        """Stop without a result."""
        ...


def open_output(target: Path, shard_size: int | None, *, resume: bool, overwrite: bool) -> Output:
    """Choose the kind of output by the name of the target.

    Raises:
        InputError: no kind of output has this name, or it does not allow what is asked for.
        DataError: it exists already.
        MlipError: it cannot be written.
    """
    kind = _kind(target)
    if kind is None:
        if resume or shard_size is not None:
            what = "resumed" if resume else "divided into shards"
            raise InputError(f"{target}: text cannot be {what}, only .lmdb and .aselmdb can")
        return TextOutput(target, overwrite=overwrite)
    if shard_size is None:
        if not target.suffix:
            raise InputError(f"{target}: expected {_NAMES}; a folder needs --shard-size")
        return FileOutput(kind(target, resume=resume, overwrite=overwrite))
    if shard_size < 1:
        raise InputError(f"the shard size is {shard_size}, expected at least 1 structure")
    return ShardsOutput(kind, target, shard_size, resume=resume, overwrite=overwrite)


def encoder(target: Path) -> Callable[[Structure], bytes]:
    """Give the function that makes the bytes of one structure for an output.

    Raises:
        InputError: no kind of output has this name.
    """
    kind = _kind(target)
    return frame_text if kind is None else kind.encode


def _kind(target: Path) -> type[LmdbWriter] | None:
    """Give the writer for a name, None for text."""
    if target.suffix == ASELMDB:
        from mlip.datasets.formats.aselmdb_write import AseLmdbWriter

        return AseLmdbWriter
    if target.suffix in {".lmdb", ""}:
        return StructureWriter
    if target.suffix in TEXT:
        return None
    raise InputError(f"{target}: expected {_NAMES}")


class FileOutput:
    """One file of a writer."""

    def __init__(self, writer: LmdbWriter) -> None:
        self.metadata: dict[str, Any] = {}
        self._writer = writer

    def __len__(self) -> int:
        return len(self._writer)

    def append_encoded(self, data: bytes, n_atoms: int) -> None:
        """Take the next structure."""
        self._writer.append_encoded(data, n_atoms)

    def finish(self, metadata: dict[str, Any], n_atoms: Array) -> None:  # noqa: ARG002
        """Commit the rest and give the file its name."""
        self._writer.metadata = {**self.metadata, **metadata}
        self._writer.close()

    def abort(self, *, keep_partial: bool = False) -> None:
        """Stop without a result."""
        self._writer.abort(keep_partial=keep_partial)


class ShardsOutput:
    """A folder of files with a bounded number of structures each, and a manifest.

    Written as ``<folder>.partial``; the manifest comes last, then the folder takes its name. The
    manifest of ``.aselmdb`` files lies beside their folder, because other programs take every file
    inside for data.
    """

    def __init__(
        self, kind: type[LmdbWriter], folder: Path, size: int, *, resume: bool, overwrite: bool
    ) -> None:
        self.metadata: dict[str, Any] = {}
        self._kind, self._folder, self._size = kind, folder, size
        self._suffix = folder.suffix or ".lmdb"
        self._partial = partial_name(folder)
        self._writer: LmdbWriter | None = None
        self._prepare(resume, overwrite)
        self._finished = self._count_finished()
        if partial_name(self._next_path()).exists():
            self._writer = self._open_next()

    def __len__(self) -> int:
        return sum(self._finished) + (len(self._writer) if self._writer else 0)

    def append_encoded(self, data: bytes, n_atoms: int) -> None:
        """Take the next structure; a full shard is closed first."""
        if self._writer is not None and len(self._writer) >= self._size:
            self._close_shard()
        if self._writer is None:
            self._writer = self._open_next()
        self._writer.append_encoded(data, n_atoms)

    def finish(self, metadata: dict[str, Any], n_atoms: Array) -> None:
        """Close the last shard, write the manifest and give the folder its name."""
        if self._writer is not None:
            self._close_shard()
        for path in self._partial.iterdir():
            if not _OURS.fullmatch(path.name):
                path.unlink()  # half of a manifest, of a run that was killed
        shards = [self._partial / self._name(i) for i in range(len(self._finished))]
        manifest = self._partial / MANIFEST
        if self._suffix == ASELMDB:
            write_sizes(self._partial / SIZES, n_atoms)
            manifest = self._folder.with_name(f"{self._folder.name}.{MANIFEST}")
        metadata = {**self.metadata, **metadata}
        write_manifest(manifest, shards, self._finished, n_atoms, metadata)
        old = self._folder.with_name(self._folder.name + ".old")
        try:
            if self._folder.exists():
                self._folder.rename(old)
            self._partial.rename(self._folder)
            sync_folder(self._folder.parent)
        except OSError as error:
            raise write_error(self._folder, error) from error
        shutil.rmtree(old, ignore_errors=True)

    def abort(self, *, keep_partial: bool = False) -> None:
        """Stop without a result."""
        if self._writer is not None:
            self._writer.abort(keep_partial=keep_partial)
        if not keep_partial:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _prepare(self, resume: bool, overwrite: bool) -> None:
        if self._folder.exists():
            if not overwrite:
                raise DataError(f"{self._folder} exists: choose another name or allow overwriting")
            _check_ours(self._folder)
        if self._partial.exists() and not resume:
            if not overwrite:
                raise DataError(left_over(self._partial))
            shutil.rmtree(self._partial)
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self._folder, error) from error

    def _count_finished(self) -> list[int]:
        counts: list[int] = []
        while (path := self._partial / self._name(len(counts))).exists():
            reader = find_reader(path)
            assert reader.open is not None
            counts.append(len(reader.open(path, ReadOptions())))
        return counts

    def _name(self, number: int) -> str:
        return f"data.{number:04d}{self._suffix}"

    def _next_path(self) -> Path:
        return self._partial / self._name(len(self._finished))

    def _open_next(self) -> LmdbWriter:
        return self._kind(self._next_path(), resume=True)

    def _close_shard(self) -> None:
        assert self._writer is not None
        self._writer.metadata = dict(self.metadata)
        count = len(self._writer)
        self._writer.close()
        self._finished.append(count)
        self._writer = None


class TextOutput:
    """Extended XYZ: energies keep every digit, the numbers of the atoms 8 decimals."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists: choose another name or allow overwriting it")
        self.metadata: dict[str, Any] = {}
        self._path, self._partial = path, partial_name(path)
        self._file = os.fdopen(open_locked(self._partial), "wb")
        self._file.truncate()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append_encoded(self, data: bytes, n_atoms: int) -> None:  # noqa: ARG002
        """Write one frame."""
        self._count += 1
        try:
            self._file.write(data)
        except OSError as error:
            raise write_error(self._path, error) from error

    def finish(self, metadata: dict[str, Any], n_atoms: Array) -> None:  # noqa: ARG002
        """Give the file its name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.replace(self._path)
            sync_folder(self._path.absolute().parent)
            self._file.close()
        except OSError as error:
            raise write_error(self._path, error) from error

    def abort(self, *, keep_partial: bool = False) -> None:  # noqa: ARG002
        """Leave nothing behind."""
        self._partial.unlink(missing_ok=True)
        self._file.raw.close()


def frame_text(structure: Structure) -> bytes:
    """Give a structure as one frame of extended XYZ."""
    from ase.io.extxyz import write_extxyz

    text = io.StringIO()
    write_extxyz(text, [structure.to_atoms()])
    return text.getvalue().encode()


def _check_ours(folder: Path) -> None:
    """Refuse to replace a folder that holds anything else than shards."""
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, expected a folder of shards: choose another name")
    foreign = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise DataError(
            f"{folder} holds other files than shards ({', '.join(foreign[:3])}) and is not "
            "replaced: choose another name"
        )
