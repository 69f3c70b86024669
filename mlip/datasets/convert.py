"""Convert any known files into one data set: resumable, checked, shared by processes, reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import orjson

from mlip.datasets.account import Account, write_quarantine
from mlip.datasets.chunks import Chunk, Job, list_tasks
from mlip.datasets.journal import Journal, chunk_record
from mlip.datasets.options import ReadOptions
from mlip.datasets.outputs import Output, encoder, open_output
from mlip.datasets.parallel import WorkerDiedError, read_chunks
from mlip.datasets.policy import Policy
from mlip.datasets.read import PathLike, expand
from mlip.datasets.report import ConversionReport
from mlip.datasets.sources import inspect_sources
from mlip.datasets.structure import Array, Structure
from mlip.datasets.writer import partial_name
from mlip.errors import DataError, InputError

OnFrames = Callable[[Path, int, int], None]
Accept = Callable[[Structure], str | None]


def convert(
    inputs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    options: ReadOptions | None = None,
    workers: int = 0,
    shard_size: int | None = None,
    policy: Policy = "skip",
    quarantine: PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_unlabelled: bool = False,
    metadata: Mapping[str, Any] | None = None,
    selected: Sequence[Array] | None = None,
    accept: Accept | None = None,
    on_frames: OnFrames | None = None,
) -> ConversionReport:
    """Convert files that :func:`mlip.datasets.read.iterate_file` reads into one data set.

    Nothing appears under the name of the output unless the whole conversion succeeds. The output
    is the same, byte for byte, whatever the number of workers and however often it was resumed.

    Args:
        inputs: files, folders or patterns, read in this order.
        output: ``NAME.lmdb`` for the native store, ``NAME.aselmdb`` for an ASE database that
            fairchem reads, ``NAME.extxyz`` or ``NAME.xyz`` for text (energies exact, numbers of
            the atoms with 8 decimals); with ``shard_size`` the name of a folder.
        options: label keys, and what OC20-style energies and IS2RE frames are meant to be.
        workers: processes that read, check and encode beside this one (a script that asks for them
            needs ``if __name__ == "__main__":``).
        shard_size: write a folder of files with this many structures each (the last may have
            fewer) and a manifest; its suffix chooses their kind, no suffix means the store.
        policy: what happens to bad frames and files: ``"skip"`` leaves them out and reports them,
            ``"quarantine"`` also lists all of them in a file, ``"raise"`` stops at the first.
        quarantine: the file for that list (tab-separated: file, entry, reason).
        resume: continue an interrupted conversion of the same inputs (not text).
        overwrite: replace an existing output.
        allow_unlabelled: accept inputs without any label.
        metadata: JSON-able facts about the data that the output shall state (``level_of_theory``,
            ``licence``, ...), beside those that it states anyway.
        selected: for each input the frames that are wanted, [n] True or False.
        accept: says why a structure is left out on purpose, None if it is wanted; a module-level
            function or an object that can be pickled where there are workers.
        on_frames: called after each chunk of frames with its file, and the frames read and
            dropped so far.

    Raises:
        DataError: a file is missing; what its energies or frames are has to be said; nothing is
            usable, nothing has a label, or nothing has a key that was named; the inputs changed
            before a resume; with ``"raise"``, a bad frame or file.
        InputError: options that contradict each other.
        MlipError: the output cannot be written, or a worker died.
    """
    if policy not in get_args(Policy):
        raise InputError(f"policy is {policy!r}, expected {', '.join(get_args(Policy))}")
    if workers < 0:
        raise InputError(f"the number of workers is {workers}, expected 0 or more")
    if (policy == "quarantine") != (quarantine is not None):
        raise InputError("name a file for the list with the policy 'quarantine', and only then")
    files, target, options = expand(inputs), Path(output), options or ReadOptions()
    _keep_apart(files, target)
    sources = inspect_sources(files, options)
    account = Account(files, sources)
    job = Job(
        tuple(files),
        sources.lengths,
        options,
        encoder(target),
        None if selected is None else tuple(selected),
        accept,
    )
    digest = _digest(job, target, shard_size)
    journal = Journal(_journal_path(target), digest, resume=resume, overwrite=overwrite)
    try:
        if _was_finished(journal, target):
            for record in journal.records():
                account.add(record)
        else:
            place = open_output(target, shard_size, resume=resume, overwrite=overwrite)
            place.metadata = {**account.facts(), **(metadata or {})}
            try:
                _resume(journal, account, place)
                _fill(place, journal, account, job, workers, policy, on_frames)
                account.check(options.keys, allow_unlabelled)
                if quarantine is not None:
                    write_quarantine(Path(quarantine), files, journal.records())
                journal.end()
                place.finish(account.metadata(), account.n_atoms())
            except BaseException as error:
                place.abort(keep_partial=_worth_keeping(error, resume))
                raise
    except BaseException:
        journal.close(remove=not partial_name(target).exists())
        raise
    journal.close(remove=True)
    return account.report(target)


def _keep_apart(files: Sequence[Path], target: Path) -> None:
    for file in files:
        if target.exists() and file.exists() and target.samefile(file):
            raise DataError(f"{file} is both input and output: choose another name")
        if target.is_dir() and target.resolve() in file.resolve().parents:
            raise DataError(f"the input {file} lies in the output folder: choose another name")


def _digest(job: Job, target: Path, shard_size: int | None) -> str:
    """Identify a conversion: a resumed one has to be the same."""
    facts = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in job.files]
    digest = hashlib.blake2b(digest_size=16)
    digest.update(orjson.dumps([facts, asdict(job.options), target.suffix, shard_size]))
    digest.update(repr(job.accept).encode())
    for mask in job.selected or ():
        digest.update(mask.tobytes())
    return digest.hexdigest()


def _journal_path(target: Path) -> Path:
    return target.with_name(partial_name(target).name + ".journal")


def _was_finished(journal: Journal, target: Path) -> bool:
    """Tell whether an earlier run was killed after the output took its name."""
    return journal.ended and target.exists() and not partial_name(target).exists()


def _resume(journal: Journal, account: Account, place: Output) -> None:
    """Take up what an interrupted run made safe; the output decides how much that is."""
    if len(place) and not journal.resumed:
        raise DataError(
            f"{journal.path} is missing, the partial output cannot be continued without it: "
            "start again with --overwrite"
        )
    for record in journal.restore(len(place)):
        account.add(record)


def _fill(
    place: Output, journal: Journal, account: Account, job: Job, workers: int, policy: Policy,
    on_frames: OnFrames | None,
) -> None:  # fmt: skip
    """Read what is missing and hand it on, chunk by chunk."""
    tasks = list_tasks(job.lengths, account.place)
    with closing(read_chunks(job, tasks, workers)) as chunks:
        for chunk in chunks:
            if policy == "raise":
                _refuse(chunk)
            safe = len(place) - account.kept  # structures of this chunk that are there already
            for data, n_atoms in list(zip(chunk.entries, chunk.atoms, strict=True))[safe:]:
                place.append_encoded(data, n_atoms)
            record = chunk_record(chunk)
            journal.append(record)
            account.add(record)
            if on_frames is not None:
                on_frames(job.files[chunk.file], account.read, account.dropped)


def _refuse(chunk: Chunk) -> None:
    if chunk.bad:
        raise DataError(f"{chunk.bad[0][1]} (to leave bad frames out: --policy skip)")
    if chunk.damage is not None:
        raise DataError(f"{chunk.damage} (to leave bad files out: --policy skip)")


def _worth_keeping(error: BaseException, resume: bool) -> bool:
    """Tell whether what was written is of use: asked for, Ctrl-C, or no fault of the data."""
    return resume or isinstance(error, WorkerDiedError) or not isinstance(error, Exception)
