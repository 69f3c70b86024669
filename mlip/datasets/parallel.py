"""Share the reading of a conversion between processes and give its chunks in order.

Workers are spawned, never forked, and end when the main process does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from mlip.datasets.chunks import Chunk, Job, Task, read_task
from mlip.errors import MlipError

AHEAD_CHUNKS = 16  # of one worker, waiting to be written
AHEAD_TASKS = 4  # of one worker
_DONE = "done"  # what a worker sends at the end of a task


class WorkerDiedError(MlipError):
    """A worker process ended in the middle of its work."""


def read_chunks(job: Job, tasks: Iterable[Task], workers: int) -> Generator[Chunk, None, None]:
    """Give the chunks of all tasks in their order.

    Args:
        job: what to read and how to encode it.
        tasks: what to read, in order.
        workers: processes beside this one; with 0 everything happens here.

    Raises:
        WorkerDiedError: a worker was killed.
    """
    if workers == 0:
        for task in tasks:
            yield from read_task(job, task)
        return
    pool: list[_Worker] = []
    try:
        pool.extend(_Worker(job) for _ in range(workers))
        yield from _in_order(pool, iter(tasks))
    finally:
        for worker in pool:
            worker.stop()


def _in_order(pool: list[_Worker], tasks: Iterator[Task]) -> Iterator[Chunk]:
    """Deal tasks out in turn and collect in the same turn."""
    waiting: deque[tuple[_Worker, Task]] = deque()
    turn = 0
    while True:
        while len(waiting) < AHEAD_TASKS * len(pool):
            task = next(tasks, None)
            if task is None:
                break
            worker = pool[turn % len(pool)]
            worker.give(task)
            waiting.append((worker, task))
            turn += 1
        if not waiting:
            return
        worker, task = waiting.popleft()
        yield from worker.take(task)


class _Worker:
    """One process, and the thread here that receives what it sends, up to a bound."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._job = job
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, job), daemon=True, name="mlip-convert"
        )
        self._process.start()
        theirs.close()
        self._received: queue.Queue[Any] = queue.Queue(AHEAD_CHUNKS)
        self._stopping = threading.Event()
        threading.Thread(target=self._receive, daemon=True).start()

    def give(self, task: Task) -> None:
        """Hand over a task; a dead worker is noticed when its result is taken."""
        with contextlib.suppress(OSError):
            self._connection.send(task)

    def take(self, task: Task) -> Iterator[Chunk]:
        """Give the chunks of the oldest task that was handed over."""
        while (message := self._received.get()) != _DONE:
            if isinstance(message, Chunk):
                yield message
            elif isinstance(message, Exception):
                raise message
            else:
                self._process.join(5)
                raise WorkerDiedError(
                    f"a worker process ended (exit code {self._process.exitcode}) while reading "
                    f"{self._job.files[task.file]}: was it killed, or the memory full? What was "
                    "written so far is kept: repeat the command with --resume, or use fewer workers"
                )

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._stopping.set()
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def _receive(self) -> None:
        while not self._stopping.is_set():
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = None
            while not self._stopping.is_set():
                try:
                    self._received.put(message, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if message is None:
                return


def _work(connection: Connection, job: Job) -> None:
    """Do tasks until the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    try:
        while True:
            task = connection.recv()
            try:
                for chunk in read_task(job, task):
                    connection.send(chunk)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                connection.send(error)
                return
            connection.send(_DONE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
