"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlip.errors import MlipError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its name only when all went well.

    Args:
        path: final name; its folder is created if missing.
        mode: ``"wb"`` or ``"w"`` (UTF-8).

    Raises:
        MlipError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    target = Path(path)
    encoding = None if "b" in mode else "utf-8"
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise MlipError(
            f"cannot write {target}: {reason}; free space or choose another folder "
            "(nothing was left half-written)"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Checksum of the content of a file, hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """``$MLIP_CACHE``, else the package's folder among the user's caches; it may not exist yet."""
    if own := os.environ.get("MLIP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlip"


def _umask() -> int:
    """Read the process umask without changing it (Linux), else assume 0o022."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
