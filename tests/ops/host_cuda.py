"""Run the CUDA kernels on the CPU: their text compiled by g++ with ``cuda_shim.h``.

``HostModule`` takes the place of machine code on a GPU, so that the Python which launches kernels
is tested with them, on tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlip.ops.cuda import compiler
from mlip.ops.cuda.program import C_TYPES, Grid, Program

HERE = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O1", "-g0", "-shared", "-fPIC", "-fno-stack-protector",
           "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-w")  # fmt: skip
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
FORWARDS, BACKWARDS, SHUFFLED = 0, 1, 7

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: CUDA text cannot run on the host"
)


def build(text: str, headers: dict[str, str], options: Sequence[str] = ()) -> Path:
    """Compile a source with its headers to a shared library, once for each content."""
    shims = [HERE / name for name in ("cuda_shim.h", "cuda_shim_threads.h")]
    content = repr([text, headers, options, [s.read_text() for s in shims if s.exists()]])
    folder = Path(tempfile.gettempdir()) / "mlip-host-cuda"
    folder.mkdir(exist_ok=True)
    library = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for name, header in headers.items():
                (Path(work) / name).write_text(header, encoding="utf-8")
            (Path(work) / "text.cpp").write_text(text, encoding="utf-8")
            command = ["g++", *OPTIONS, *options, "-DHOST_SHIM", f"-I{work}", f"-I{HERE}",
                       f"{work}/text.cpp", "-o", f"{work}/out.so"]  # fmt: skip
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            assert found.returncode == 0, found.stderr[:4000]
            (Path(work) / "out.so").replace(library)
    return library


def entries(text: str) -> str:
    """Write a C function that launches each kernel in each precision."""
    lines = ['extern "C" const char* shim_error() { return shim::last_error.c_str(); }']
    lines += [
        f'extern "C" int host_{name}_{real}(const unsigned* g, size_t shared, int order, '
        f"void** arguments) {{ return shim::launch(&{name}<{real}>, dim3{{g[0], g[1], g[2]}}, "
        f"dim3{{g[3], 1, 1}}, shared, order, arguments); }}"
        for name in KERNEL.findall(text)
        for real in C_TYPES.values()
    ]
    return "\n".join(lines)


class HostModule:
    """The kernels of a program on the CPU; ``order`` says in which order threads run."""

    def __init__(
        self, owner: Program, order: int, change: Callable[[str], str] = lambda text: text
    ) -> None:
        text = change(compiler.source(owner.file))
        whole = f'#include "prelude.cuh"\n{text}\n{entries(text)}\n'
        headers = {name: change(t) for name, t in compiler.shared_headers().items()}
        self.library = ctypes.CDLL(str(build(whole, {**headers, **owner.headers})))
        self.library.shim_error.restype = ctypes.c_char_p
        self.order = order

    def launch(
        self, kernel: str, grid: Grid, block: int, shared: int, arguments: Sequence[Tensor | int]
    ) -> None:
        name, real = re.fullmatch(r"(\w+)<(\w+)>", kernel).groups()
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], block, 1, 1)
        values = []
        for value in arguments:
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{kernel}: an argument is not contiguous"
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(ctypes.c_int(value))
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        function = getattr(self.library, f"host_{name}_{real}")
        if function(sizes, ctypes.c_size_t(shared), ctypes.c_int(self.order), addresses):
            raise RuntimeError(self.library.shim_error().decode())


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch):
    """Make launches with tensors of the CPU run here; call it with an order, and a change of text.

    Kernels of device "cuda" are to be called as the functions that are registered for it. What they
    must write is NaN before.
    """
    new_empty = Tensor.new_empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        return new_empty(*arguments, **options).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)

    def use(order: int = FORWARDS, change: Callable[[str], str] = lambda text: text) -> None:
        made: dict[Program, HostModule] = {}

        def load(owner: Program, device: torch.device) -> HostModule:  # noqa: ARG001
            if owner not in made:
                made[owner] = HostModule(owner, order, change)
            return made[owner]

        monkeypatch.setattr(Program, "_module", lambda self, device: load(self, device))

    return use
