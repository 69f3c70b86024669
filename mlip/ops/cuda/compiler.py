"""Compile CUDA C++ with NVRTC through CuPy, and keep the machine code on disk by content.

Compiling needs no GPU and no CUDA toolkit: NVRTC comes with the extra ``mlip[cuda]``.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlip.errors import InputError, MlipError
from mlip.files import atomic_write
from mlip.ops.cpu.cache import cache_folder

OPTIONS = ("--std=c++17", "-default-device")


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture.

    cubin: as the driver loads it.
    names: mangled name of each kernel.
    log: what the compiler said; registers and spills if it was asked for them.
    """

    cubin: bytes
    names: dict[str, str]
    log: str


def source(file: str) -> str:
    """Read a file of ``kernels/``."""
    return (importlib.resources.files("mlip.kernels") / file).read_text(encoding="utf-8")


@cache
def shared_headers() -> dict[str, str]:
    """The headers of ``kernels/`` by name."""
    folder = importlib.resources.files("mlip.kernels")
    names = (item.name for item in folder.iterdir())
    return {name: source(name) for name in names if name.endswith(".cuh")}


def nvrtc() -> Any:
    """CuPy's binding of the run-time compiler.

    Raises:
        InputError: CuPy or NVRTC is not installed.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc as library

        library.getVersion()
    except Exception as error:  # a missing shared library is reported in several ways
        raise InputError(
            f"the CUDA kernels need CuPy and NVRTC ({' '.join(str(error).split())[:200]}); "
            "install them with  pip install 'mlip[cuda]'"
        ) from None
    return library


def compile_source(
    file: str,
    headers: Mapping[str, str],
    kernels: tuple[str, ...],
    architecture: str,
    *,
    resources: bool = False,
) -> Compiled:
    """Compile a file of ``kernels/``, or read the result of an earlier compilation.

    Several processes may do so at once; each writes its own file and renames it.

    Args:
        file: name of the source.
        headers: generated headers by name; those of ``kernels/`` are there without asking.
        kernels: what is compiled, as C++ names it: ``"segment_sum<float>"``.
        architecture: ``"sm_90"``.
        resources: compile anew and report registers and spills in the log.

    Raises:
        InputError: no compiler.
        MlipError: the text does not compile; the message holds the compiler's.
    """
    text = f'#include "prelude.cuh"\n{source(file)}'
    given = {**shared_headers(), **headers}
    if resources:
        return _compile(file, text, given, kernels, architecture, ("--ptxas-options=-v",))
    version = nvrtc().getVersion()
    key = json.dumps([text, given, kernels, architecture, OPTIONS, version])
    digest = hashlib.sha256(key.encode()).hexdigest()[:20]
    path = cache_folder() / f"{Path(file).stem}_{architecture}_{digest}.cubin"
    found = _read(path)
    if found is None:
        found = _compile(file, text, given, kernels, architecture)
        _write(path, found)
    return found


def _compile(
    file: str,
    text: str,
    headers: Mapping[str, str],
    kernels: tuple[str, ...],
    architecture: str,
    options: tuple[str, ...] = (),
) -> Compiled:
    library = nvrtc()
    given = [[part.encode() for part in parts] for parts in (headers.values(), headers)]
    program = library.createProgram(text, file, *given)
    try:
        for name in kernels:
            library.addNameExpression(program, name)
        try:
            library.compileProgram(program, (f"-arch={architecture}", *OPTIONS, *options))
        except library.NVRTCError:
            log = library.getProgramLog(program)
            raise MlipError(f"{file} does not compile for {architecture}:\n{log}") from None
        names = {name: _text(library.getLoweredName(program, name)) for name in kernels}
        log = _text(library.getProgramLog(program))
        return Compiled(library.getCUBIN(program), names, log)
    finally:
        library.destroyProgram(program)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _write(path: Path, compiled: Compiled) -> None:
    """Write names, a checksum and the code; a failure costs only another compilation."""
    head = {"names": compiled.names, "sha256": hashlib.sha256(compiled.cubin).hexdigest()}
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(head).encode() + b"\n" + compiled.cubin)
    except MlipError:
        pass


def _read(path: Path) -> Compiled | None:
    """Read what ``_write`` wrote; None if it is not there or damaged."""
    try:
        head, cubin = path.read_bytes().split(b"\n", 1)
        known = json.loads(head)
        if hashlib.sha256(cubin).hexdigest() == known["sha256"]:
            return Compiled(cubin, known["names"], "")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
