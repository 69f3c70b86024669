"""Threads of kernels: those of PyTorch where they can be had, a pool elsewhere and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from mlip.ops.cpu import team, threads

needs_team = pytest.mark.skipif(
    not team.is_usable(), reason="this PyTorch has no OpenMP threads of GNU's interface"
)


@pytest.fixture(params=["team", "pool"])
def both_ways(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(team, "is_usable", lambda: False)
    elif not team.is_usable():
        pytest.skip("this PyTorch has no OpenMP threads of GNU's interface")
    monkeypatch.setattr(threads, "available_threads", lambda: 3)


def test_pytorch_built_with_openmp_on_linux_has_a_team():
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("another PyTorch")
    assert team.is_usable()


@needs_team
def test_a_body_runs_on_all_threads_at_once():
    meeting = threading.Barrier(3)  # passed only if three are there together
    team.run(partial(meeting.wait, 5), 3, 3)
    assert not meeting.broken


@pytest.mark.usefixtures("both_ways")
def test_tasks_run_once_each_and_at_the_same_time():
    meeting, done = threading.Barrier(3), []

    def task(i: int) -> None:
        if i < 3:
            meeting.wait(5)
        done.append(i)

    threads.run([partial(task, i) for i in range(20)])
    assert sorted(done) == list(range(20))


@pytest.mark.usefixtures("both_ways")
def test_fewer_tasks_than_threads():
    done = []
    threads.run([partial(done.append, i) for i in range(2)])
    assert sorted(done) == [0, 1]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("in_main", [True, False])
def test_the_error_of_a_task_arrives_and_the_others_are_done(in_main):
    meeting, done = threading.Barrier(3), []

    def task(i: int) -> None:
        if i < 3:
            meeting.wait(5)
            if (threading.current_thread() is threading.main_thread()) == in_main:
                raise ValueError("a task failed")
        done.append(i)

    with pytest.raises(ValueError, match="a task failed"):
        threads.run([partial(task, i) for i in range(12)])
    assert len(done) == (11 if in_main else 10)


@needs_team
def test_the_team_is_as_large_as_that_of_pytorch(monkeypatch):
    """The runtime would end and start threads for another size."""
    asked = []
    monkeypatch.setattr(team, "run", lambda body, n, size: asked.append((n, size)) or body())
    monkeypatch.setattr(threads, "available_threads", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    threads.run([lambda: None] * 2)
    assert asked == [(2, 7)]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("torch_threads", [1, 4])
def test_tasks_take_no_more_threads_than_are_available(monkeypatch, torch_threads):
    """The team is as large as PyTorch's, but only some of it takes tasks."""
    monkeypatch.setattr(threads, "available_threads", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    lock, active, most = threading.Lock(), 0, 0

    def task() -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        threading.Event().wait(0.01)
        with lock:
            active -= 1

    threads.run([task] * 8)
    assert most == 2


SCRIPT = """
import os, threading, torch
from mlip.ops.cpu import team, threads
team.run(lambda: None, 1, 1)  # imports Numba, and with it libraries that start threads
torch.set_num_threads(3)
torch.randn(300_000).exp().sum()
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
threads.available_threads = lambda: 3
meeting = threading.Barrier(3)
for _ in range(5):
    threads.run([lambda: meeting.wait(5)] * 3)
    torch.randn(300_000).exp().sum()
assert team.is_usable() and count() == before, (count(), before)
if os.fork() == 0:
    assert not team.is_usable()
    threads.run([lambda: meeting.wait(5)] * 3)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


@needs_team
def test_no_thread_is_added_to_those_of_pytorch_and_a_fork_has_its_own(repository: Path):
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
