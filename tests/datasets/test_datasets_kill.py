"""Conversions killed at random moments and resumed end as if nothing had happened."""

from __future__ import annotations

import json
import lzma
import multiprocessing
import operator
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip.datasets import chunks as chunks_module
from mlip.datasets import parallel as parallel_module
from mlip.datasets import writer as writer_module
from mlip.datasets.collection import open_dataset
from mlip.datasets.convert import convert
from mlip.datasets.parallel import WorkerDiedError
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter

KINDS = {"o.lmdb": None, "o.aselmdb": None, "shards": 70}


def frame(number: int) -> Atoms:
    """Give a small molecule; one in thirteen has no finite energy, one in seventeen clashes."""
    random = np.random.default_rng(number)
    n = int(random.integers(2, 6))
    positions = np.arange(n)[:, None] * [2.0, 0.5, 0.1] + random.normal(size=(n, 3)) * 0.1
    if number % 17 == 5:
        positions[1] = positions[0]
    atoms = Atoms(random.choice([1, 6, 8, 29], n), positions=positions, info={"number": number})
    energy = np.nan if number % 13 == 3 else random.normal()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=random.normal(size=(n, 3)))
    return atoms


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """A trajectory, a store, text, compressed text that breaks off, and a file of rubbish."""
    folder = tmp_path / "in"
    folder.mkdir()
    ase.io.write(folder / "a.traj", [frame(i) for i in range(90)])
    with StructureWriter(folder / "b.lmdb") as writer:
        for i in range(90, 200):
            atoms = frame(i)
            atoms.calc.results["energy"] = float(i)
            if i % 17 != 5:
                writer.append(Structure.from_atoms(atoms))
    ase.io.write(folder / "c.extxyz", [frame(i) for i in range(200, 290)])
    ase.io.write(folder / "d.extxyz", [frame(i) for i in range(290, 350)])
    packed = lzma.compress((folder / "d.extxyz").read_bytes())
    (folder / "d.extxyz.xz").write_bytes(packed[: len(packed) // 2])
    (folder / "e.aselmdb").write_bytes(b"rubbish" * 5000)
    names = ["a.traj", "b.lmdb", "c.extxyz", "d.extxyz.xz", "e.aselmdb"]
    return [folder / name for name in names]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_FRAMES", 10)
    monkeypatch.setattr(writer_module, "BATCH_ENTRIES", 7)
    monkeypatch.setattr(writer_module, "FIRST_MAP_SIZE", 64 * 1024)


def killed(function: Callable[[], Any], seconds: float) -> bool:
    """Run in a forked process that is killed after some time; tell whether that came first."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert process.exitcode in {0, -signal.SIGKILL}
    return process.exitcode != 0


def content(path: Path) -> dict[str, bytes]:
    """Give the bytes of all files that an output consists of."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.suffix != ".npz"}


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", KINDS)
def test_twenty_kills_change_nothing(tmp_path: Path, inputs: list[Path], name: str) -> None:
    def run(folder: str) -> str:
        report = convert(
            inputs, tmp_path / folder / name, shard_size=KINDS[name], resume=True,
            policy="quarantine", quarantine=tmp_path / folder / "bad.tsv",
        )  # fmt: skip
        return report.to_json()

    begin = time.perf_counter()
    expected = json.loads(run("whole"))
    whole = time.perf_counter() - begin
    random = np.random.default_rng(0)
    torn, kills = tmp_path / "torn", 0
    while kills < 20:
        kills += killed(lambda: run("torn"), random.uniform(0, 0.3 * whole))
        if (torn / name).exists() and kills < 20:
            assert content(torn / name) == content(tmp_path / "whole" / name)
            shutil.rmtree(torn)
    found = json.loads(run("torn"))
    assert found | {"output": ""} == expected | {"output": ""}
    assert content(torn / name) == content(tmp_path / "whole" / name)
    quarantine = (torn / "bad.tsv").read_text()
    assert quarantine == (tmp_path / "whole" / "bad.tsv").read_text()
    assert len(quarantine.splitlines()) - 1 == expected["dropped"] + 1  # and the file of rubbish
    numbers = [s.info["number"] for s in open_dataset(torn / name)]
    assert numbers == sorted(set(numbers))
    assert set(range(200)) - set(numbers) == {
        i for i in range(200) if i % 17 == 5 or (i % 13 == 3 and i < 90)
    }


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", ["o.lmdb", "shards.aselmdb"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_around_each_step_that_names_a_file(tmp_path: Path, name: str, moment: str) -> None:
    source = tmp_path / "a.traj"
    ase.io.write(source, [frame(i) for i in range(6, 11)])
    size = None if name == "o.lmdb" else 3
    expected = tmp_path / "whole" / name
    convert(source, expected, shard_size=size)
    journal = tmp_path / f"{name}.partial.journal"
    deaths = 0
    for step in ("os.fsync", "Path.replace", "Path.rename", "Path.unlink"):
        for count in range(1, 20):

            def die(step: str = step, count: int = count) -> None:
                with pytest.MonkeyPatch.context() as patch:
                    _die_at(patch, step, count, moment)
                    convert(source, tmp_path / name, shard_size=size, resume=True)

            finished = not killed(die, 30)
            if not finished and journal.exists():
                convert(source, tmp_path / name, shard_size=size, resume=True)
            assert content(tmp_path / name) == content(expected)
            assert not journal.exists()
            _remove(tmp_path / name)
            if finished:
                break
            deaths += 1
    assert deaths >= 3


def _die_at(patch: pytest.MonkeyPatch, step: str, count: int, moment: str) -> None:
    """Make the process end itself at the given call of a function."""
    owner, _, attribute = step.rpartition(".")
    target: Any = os if owner == "os" else Path
    real = getattr(target, attribute)
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(target, attribute, stop)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_workers_give_the_same_bytes(tmp_path: Path, inputs: list[Path]) -> None:
    name, size = "shards", 70
    inputs.append(inputs[0].with_name("d.extxyz"))  # an even number of tasks
    serial = convert(inputs, tmp_path / "1" / name, shard_size=size)
    shared = convert(inputs, tmp_path / "2" / name, shard_size=size, workers=2)
    a, b = json.loads(serial.to_json()), json.loads(shared.to_json())
    assert a | {"output": ""} == b | {"output": ""}
    assert content(tmp_path / "1" / name) == content(tmp_path / "2" / name)


def test_error_in_a_worker_is_raised_here(tmp_path: Path, inputs: list[Path]) -> None:
    with pytest.raises(AttributeError, match="nothing"):
        convert(inputs, tmp_path / "o.lmdb", workers=1, accept=operator.attrgetter("nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_dead_worker_is_one_clear_error_and_loses_nothing(
    tmp_path: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(inputs, tmp_path / "whole.lmdb")
    monkeypatch.setattr(parallel_module, "AHEAD_CHUNKS", 1)
    with pytest.raises(WorkerDiedError, match=r"exit code -9.*--resume"):
        convert(inputs, tmp_path / "o.lmdb", workers=1, on_frames=_kill_a_worker)
    assert multiprocessing.active_children() == []
    convert(inputs, tmp_path / "o.lmdb", resume=True)
    assert content(tmp_path / "o.lmdb")["o.lmdb"] == content(tmp_path / "whole.lmdb")["whole.lmdb"]


def _kill_a_worker(path: Path, read: int, dropped: int) -> None:  # noqa: ARG001
    for process in multiprocessing.active_children():
        if process.name == "mlip-convert":
            process.kill()


def test_ctrl_c_ends_the_workers_and_keeps_the_rest(tmp_path: Path, inputs: list[Path]) -> None:
    def interrupt(path: Path, read: int, dropped: int) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(inputs, tmp_path / "o.lmdb", workers=1, on_frames=interrupt)
    assert multiprocessing.active_children() == []
    assert (tmp_path / "o.lmdb.partial").exists()
    convert(inputs, tmp_path / "whole.lmdb")
    convert(inputs, tmp_path / "o.lmdb", resume=True)
    assert content(tmp_path / "o.lmdb")["o.lmdb"] == content(tmp_path / "whole.lmdb")["whole.lmdb"]
