"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """Locate the reference material (golden numbers, DFT data), not part of the project."""
    folder = Path(os.environ.get("MLIP_SHARED", REPOSITORY.parent / "shared"))
    return folder if (folder / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference material; the test is skipped where it is missing."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("reference material not found: set MLIP_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


class _Refusals(logging.Handler):
    """Keeps what was said when a kernel erred or failed and something else ran instead of it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "instead of the" in str(record.msg):
            self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def _kernels_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where a kernel was refused: what the test saw then was plain PyTorch.

    Tests that mean it are marked ``refusals``.
    """
    logger, refusals = logging.getLogger("mlip"), _Refusals()
    logger.addHandler(refusals)
    yield
    logger.removeHandler(refusals)
    if refusals.said and not request.node.get_closest_marker("refusals"):
        pytest.fail(f"a kernel was refused: {'; '.join(refusals.said)}")


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run CUDA kernels on the CPU; call it with an order of threads, and a change of text."""
    from tests.ops.host_cuda import launches_on_host

    yield from launches_on_host(monkeypatch)
