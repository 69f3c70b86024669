"""What a command says on stderr when kernels have to be made ready, and when they have not."""

from __future__ import annotations

import logging

import pytest

from mlip.cli import app
from mlip.ops import backend

SIGNATURE = "convolution of channels (16,), 3 paths"


@pytest.fixture
def command(monkeypatch):
    """Run ``mlip`` with a command that asks for one operator, and restore the logger after it."""
    logger = logging.getLogger("mlip")
    level, handlers = logger.level, list(logger.handlers)
    monkeypatch.setattr(backend, "_refused", {})

    def run(seconds: float, error: float = 1e-8) -> None:
        clock = iter((10.0, 10.0 + seconds))
        monkeypatch.setattr(backend.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(app, "app", lambda: ask(error))
        app.main()

    def ask(error: float) -> None:
        for _ in range(2):  # the second time it is known
            backend.use_kernel(
                "auto", SIGNATURE, [backend.torch.zeros(1)], lambda: (error, 1e-8), None
            )

    yield run
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_a_command_that_compiles_says_so_once_on_stderr(command, capsys):
    command(7.4)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"7 s to make ready (compiled once, kept on disk): {SIGNATURE}, float32"
    ]


def test_a_command_that_finds_compiled_code_says_nothing(command, capsys):
    command(0.6)
    assert capsys.readouterr() == ("", "")


@pytest.mark.refusals
def test_a_kernel_that_is_not_used_is_no_notice_of_compilation(command, capsys):
    """The warning of the logger stands alone: nobody waits for that kernel again."""
    command(7.4, error=1.0)
    assert "make ready" not in capsys.readouterr().err
