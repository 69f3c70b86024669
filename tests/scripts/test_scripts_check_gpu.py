"""The check of a GPU runs each step to its end or its limit, and tells how it ended."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_gpu.py"
GOOD, BAD = "print('measured')", "raise SystemExit(3)"
CHILD = "import os, time\nprint(os.fork(), flush=True)\ntime.sleep(60)"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("check_gpu")


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # a zombie nobody has waited for is not alive
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_failure_does_not_end_the_rest(script, tmp_path, capsys):
    steps = {"bad": python(BAD), "none": ["no-such-program"], "good": python(GOOD)}
    assert not script.check(steps, tmp_path / "out", 1)
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert summary == capsys.readouterr().out
    assert "| bad | failed, exit code 3 |" in summary
    assert "| none | not run: no-such-program is not installed |" in summary
    assert "| good | passed |" in summary
    assert (tmp_path / "out" / "good.log").read_text(encoding="utf-8") == "measured\n"
    assert script.check({"good": python(GOOD)}, tmp_path / "again", 1)


def test_other_rows_stay_when_it_goes_on(script, tmp_path):
    script.check({"first": python(GOOD), "second": python(BAD)}, tmp_path, 1)
    assert script.check({"second": python(GOOD)}, tmp_path, 1, go_on=True)
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| first | passed |" in summary
    assert "| second | passed |" in summary
    assert "failed" not in summary
    assert script.check({"second": python(GOOD)}, tmp_path, 1)
    assert "first" not in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_a_step_without_time_is_stopped_with_its_children(script, tmp_path):
    start = time.monotonic()
    assert not script.check({"long": python(CHILD), "late": python(GOOD)}, tmp_path, 2 / 60)
    assert time.monotonic() - start < 30
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.count("stopped: no time left") == 2
    child = max(map(int, (tmp_path / "long.log").read_text(encoding="utf-8").split()))
    assert child > 0
    while alive(child) and time.monotonic() - start < 30:  # until the system has taken it away
        time.sleep(0.05)
    assert not alive(child)


def test_steps_name_files_that_exist(script):
    for command in script.STEPS.values():
        for word in command:
            if word.endswith(".py"):
                assert (SCRIPT.parents[1] / word).exists()
