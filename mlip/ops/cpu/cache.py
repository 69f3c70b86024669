"""Generated and compiled code on disk, by content.

Everything lies in one folder: ``$MLIP_CACHE/kernels``, by default ``~/.cache/mlip/kernels``. A
module is a readable ``.py`` file; Numba keeps its machine code in ``__pycache__`` beside it, one
entry for each kind of processor. The folder can be removed at any time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

from mlip.files import user_cache

_lock = threading.RLock()
_loaded: dict[str, ModuleType] = {}


def cache_folder() -> Path:
    """Folder of generated code; a temporary one, for this process, if it cannot be written."""
    folder = user_cache() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_temporary_folder().name)


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed when the process ends; the cache keeps it until then."""
    return tempfile.TemporaryDirectory(prefix="mlip-kernels-")


@cache
def _writer_version() -> str:
    """What changes the machine code of the same text: Numba, and what generated modules import."""
    import numba

    names = ("jit.py", "simd.py", "simd_exp.py", "shuffles.py")
    writers = [Path(__file__).with_name(name) for name in names]
    return numba.__version__ + "".join(path.read_text(encoding="utf-8") for path in writers)


def load(name: str, text: str) -> ModuleType:
    """Import a module of this text through the cache.

    Args:
        name: readable beginning of the file name.
        text: Python source.
    """
    digest = hashlib.sha256((_writer_version() + text).encode()).hexdigest()[:16]
    key = f"mlip_{name}_{digest}"
    with _lock:
        if key not in _loaded:
            _loaded[key] = _import(key, _written(cache_folder() / f"{key}.py", text))
        return _loaded[key]


def _written(path: Path, text: str) -> Path:
    """Write a file under a temporary name, then rename: two processes may do so at once.

    Its time is set to a constant because older versions of Numba take machine code for outdated
    when the time of the source changes; newer ones compare the text.
    """
    if not path.exists():
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.utime(temporary, (0, 0))
        os.replace(temporary, path)
    return path


def _import(key: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # Numba looks the module up when it reads machine code
    spec.loader.exec_module(module)
    return module


@cache
def loops() -> ModuleType:
    """The loops that know no tensor product."""
    source = Path(__file__).with_name("loops.py")
    return load("loops", source.read_text(encoding="utf-8"))
