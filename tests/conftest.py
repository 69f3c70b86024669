"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Give what imports a script by its name, such as "download/oc20", anew each time.

    As Python does for a script, its folder is searched for what it imports.
    """

    def load(name: str) -> ModuleType:
        path = REPOSITORY / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = set(sys.modules)
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
            for sibling in {other.stem for other in path.parent.glob("*.py")} - before:
                sys.modules.pop(sibling, None)
        return module

    return load


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
