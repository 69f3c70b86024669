"""A training process keeps the memory that a step frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from mlip.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def step():
    blocks = [torch.ones(4_000_000 + 1000 * i) for i in range(10)]  # 16 MB each
    large = torch.ones(20_000_000)

for _ in range(12):  # blocks find their places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")


def pages_of_five_steps(what, **environment):
    command = [sys.executable, "-c", STEPS, what]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment = {**clean, **environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    return kept, int(pages)


@glibc
def test_later_steps_ask_for_little_memory():
    kept, pages = pages_of_five_steps("keep")
    assert kept == "True"
    assert pages < 50_000  # of 4 kB; a large block may find a new place once or twice
    assert pages_of_five_steps("give back")[1] > 80_000


@glibc
def test_the_environment_is_left_in_charge():
    assert pages_of_five_steps("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"


def test_other_c_libraries_are_left_alone(monkeypatch):
    from mlip.memory import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
