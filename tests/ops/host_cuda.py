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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlip.ops.cuda import compiler
from mlip.ops.cuda.program import Grid, Program

HERE = Path(__file__).parent
Results = dict[str, Tensor]
OPTIONS = ("-std=c++17", "-O1", "-g0", "-shared", "-fPIC", "-fno-stack-protector",
           "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-w")  # fmt: skip
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
FORWARDS, BACKWARDS, SHUFFLED = 0, 1, 7
MARGIN = 512  # numbers before and after a tensor

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: CUDA text cannot run on the host"
)


def build(text: str, headers: dict[str, str], options: Sequence[str] = ()) -> Path:
    """Compile a source with its headers to a shared library, once for each content."""
    shims = [(HERE / name).read_text() for name in ("cuda_shim.h", "cuda_shim_threads.h")]
    content = repr([text, headers, options, shims])
    folder = Path(tempfile.gettempdir()) / "mlip-host-cuda"
    library = folder / f"{digest(content)}.so"
    if not library.exists():
        shim = read_shim(folder / f"shim-{digest(repr([options, shims, str(HERE)]))}", options)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for name, header in headers.items():
                (Path(work) / name).write_text(header, encoding="utf-8")
            (Path(work) / "text.cpp").write_text(text, encoding="utf-8")
            source = ["-include", str(shim), f"-I{work}", f"-I{HERE}", f"{work}/text.cpp"]
            compile_host(source, options, Path(work) / "out.so")
            (Path(work) / "out.so").replace(library)
    return library


def read_shim(folder: Path, options: Sequence[str]) -> Path:
    """Header that includes the shim, what g++ makes of it beside it: reading is half the work."""
    header = folder / "shim.h"
    compiled = header.with_name("shim.h.gch")
    if not compiled.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "shim.h").write_text(f'#include "{HERE}/cuda_shim.h"\n')
            (Path(work) / "shim.h").replace(header)
            compile_host(["-x", "c++-header", str(header)], options, Path(work) / "out")
            (Path(work) / "out").replace(compiled)
    return header


def compile_host(source: Sequence[str], options: Sequence[str], out: Path) -> None:
    """Call g++."""
    command = ["g++", *OPTIONS, *options, "-DHOST_SHIM", *source, "-o", str(out)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[:4000]


def digest(content: str) -> str:
    """A name for a content."""
    return hashlib.sha256(content.encode()).hexdigest()[:20]


def entries(text: str, real: str) -> str:
    """Write a C function that launches each kernel in one precision, float or double."""
    lines = ['extern "C" const char* shim_error() { return shim::last_error.c_str(); }']
    lines += [
        f'extern "C" int host_{name}(const unsigned* g, size_t shared, int order, '
        f"void** arguments) {{ return shim::launch(&{name}<{real}>, dim3{{g[0], g[1], g[2]}}, "
        f"dim3{{g[3], 1, 1}}, shared, order, arguments); }}"
        for name in KERNEL.findall(text)
    ]
    return "\n".join(lines)


class HostModule:
    """The kernels of a program on the CPU; ``order`` says in which order threads run."""

    def __init__(
        self, owner: Program, order: int, change: Callable[[str], str] = lambda text: text
    ) -> None:
        self.text = change(compiler.source(owner.file))
        shared = {name: change(header) for name, header in compiler.shared_headers().items()}
        self.headers = {**shared, **owner.headers}
        self.order = order
        self.libraries: dict[str, ctypes.CDLL] = {}

    def library(self, real: str) -> ctypes.CDLL:
        """The kernels in one precision, float or double."""
        if real not in self.libraries:
            whole = f'#include "prelude.cuh"\n{self.text}\n{entries(self.text, real)}\n'
            self.libraries[real] = ctypes.CDLL(str(build(whole, self.headers)))
            self.libraries[real].shim_error.restype = ctypes.c_char_p
        return self.libraries[real]

    def launch(
        self, kernel: str, grid: Grid, block: int, shared: int, arguments: Sequence[Tensor | int]
    ) -> None:
        name, real = re.fullmatch(r"(\w+)<(\w+)>", kernel).groups()
        assert all(grid), f"{kernel}: a GPU refuses a grid of {grid} blocks"
        assert shared <= 48 * 1024, f"{kernel}: {shared} bytes of shared memory"
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], block, 1, 1)
        values = []
        for value in arguments:
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{kernel}: an argument is not contiguous"
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(ctypes.c_int(value))
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        library = self.library(real)
        function = getattr(library, f"host_{name}")
        if function(sizes, ctypes.c_size_t(shared), ctypes.c_int(self.order), addresses):
            raise RuntimeError(library.shim_error().decode())


def launches_on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make launches with tensors of the CPU run here: the body of the fixture ``on_host``.

    What it yields is to be called with an order of threads, and a change of text. Kernels of device
    "cuda" are to be called as the functions that are registered for it. What they must write is NaN
    before, and so is the memory around it, which must stay so.
    """
    new_empty = Tensor.new_empty
    around: list[Tensor] = []

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        wide, inner = guarded(new_empty(*arguments, **options).fill_(torch.nan))
        around.extend((wide[:MARGIN], wide[wide.numel() - MARGIN :]))
        return inner

    monkeypatch.setattr(Tensor, "new_empty", poisoned)

    def use(order: int = FORWARDS, change: Callable[[str], str] = lambda text: text) -> None:
        made: dict[Program, HostModule] = {}

        def load(owner: Program, device: torch.device) -> HostModule:  # noqa: ARG001
            if owner not in made:
                made[owner] = HostModule(owner, order, change)
            return made[owner]

        monkeypatch.setattr(Program, "_module", lambda self, device: load(self, device))

    yield use
    assert all(margin.isnan().all() for margin in around), "a kernel wrote beyond its results"


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Copy a tensor into the middle of NaN: returns all of it, and the copy."""
    wide = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=tensor.dtype)
    inner = wide[MARGIN : wide.numel() - MARGIN].view(tensor.shape)
    return wide, inner.copy_(tensor)


def without_barrier(kernel: str, number: int) -> Callable[[str], str]:
    """Make a change of text that removes one of the barriers of a kernel."""

    def change(text: str) -> str:
        if f" {kernel}(" not in text:  # a header
            return text
        begin = text.index(f" {kernel}(")
        parts = text[begin:].split("__syncthreads();", number + 1)
        assert len(parts) == number + 2
        last = parts.pop()
        return text[:begin] + "__syncthreads();".join(parts) + last

    return change


def same_bits(use: Callable[..., None], call: Callable[[], Results], **options: Any) -> bool:
    """Whether results are the same bits in whatever order threads run; NaN equals nothing."""
    found = []
    for order in (FORWARDS, BACKWARDS, SHUFFLED, SHUFFLED + 1):
        use(order, **options)
        found.append(call())
    first = found[0]
    return all(torch.equal(other[name], first[name]) for other in found for name in first)
