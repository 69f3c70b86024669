"""Fixtures shared by all tests."""

from __future__ import annotations

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


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run CUDA kernels on the CPU; call it with an order of threads, and a change of text."""
    from tests.ops.host_cuda import launches_on_host

    yield from launches_on_host(monkeypatch)
