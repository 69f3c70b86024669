"""Launch compiled CUDA kernels on tensors.

A launch takes raw pointers, goes to the current stream of PyTorch and waits for nothing; memory is
PyTorch's alone. So calls can be captured in CUDA graphs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.cuda import compiler

C_TYPES = {torch.float32: "float", torch.float64: "double"}
Grid = tuple[int, ...]


def whole_warps(columns: int, most: int) -> int:
    """Threads for so many columns: whole warps, at most ``most``."""
    return min(most, 32 * max(1, -(-columns // 32)))


def tile_size(numbers: int) -> int:
    """Edges whose matrices of so many numbers lie in shared memory at a time, 16 KiB in float64."""
    return max(1, min(32, 16 * 1024 // (8 * numbers)))


class Module(Protocol):
    """The kernels of a source file, compiled for one processor."""

    def launch(
        self, kernel: str, grid: Grid, block: int, shared: int, arguments: Sequence[Tensor | int]
    ) -> None:
        """Start a kernel; arguments as ``Program.launch`` takes them."""


class Program:
    """A source file, compiled for a device when it is first needed.

    Args:
        file: of ``kernels/``.
        headers: generated ones, by name.
    """

    def __init__(self, file: str, headers: Mapping[str, str]) -> None:
        self.file, self.headers = file, dict(headers)
        self._modules: dict[torch.device, Module] = {}
        self._lock = threading.Lock()

    @property
    def kernels(self) -> tuple[str, ...]:
        """C++ names of all kernels of the file, in both precisions."""
        return tuple(name for real in C_TYPES.values() for name in self.kernels_of(real))

    def kernels_of(self, real: str) -> tuple[str, ...]:
        """C++ names of all kernels of the file in one precision, ``float`` or ``double``."""
        return tuple(f"{name}<{real}>" for name in kernel_names(self.file))

    def launch(
        self,
        kernel: str,
        dtype: torch.dtype,
        grid: Grid,
        block: int,
        shared: int,
        arguments: Sequence[Tensor | int],
    ) -> None:
        """Start a kernel; does nothing where there is nothing to do.

        Args:
            kernel: name in the source, a template of one floating type.
            dtype: that type, float32 or float64.
            grid: blocks along x, y, z.
            block: threads along x.
            shared: bytes of dynamic shared memory, at most 48 KiB.
            arguments: contiguous tensors, whose addresses are passed, and numbers (C ``int``).

        Raises:
            InputError: a number of edges or atoms beyond 2³¹ − 1; tensors on several devices.
        """
        if 0 in grid:
            return
        for value in arguments:
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                raise InputError(f"{kernel}: {value} is too large for a kernel of {self.file}")
        devices = {value.device for value in arguments if isinstance(value, Tensor)}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise InputError(f"{kernel}: tensors are on {names}; expected one device")
        device = devices.pop()
        name = f"{kernel}<{C_TYPES[dtype]}>"
        self._module(device).launch(name, grid, block, shared, arguments)

    def _module(self, device: torch.device) -> Module:
        with self._lock:
            if device not in self._modules:
                self._modules[device] = _DeviceModule(self, device)
            return self._modules[device]


@cache
def kernel_names(file: str) -> tuple[str, ...]:
    """Names of the kernels of a source file, in order."""
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\("
    return tuple(re.findall(pattern, compiler.source(file)))


class _DeviceModule:
    """Machine code on a GPU; each precision is compiled and loaded when it is first launched."""

    def __init__(self, owner: Program, device: torch.device) -> None:
        self.owner, self.device = owner, device
        self.functions: dict[str, Any] = {}
        self._modules: list[Any] = []  # code stays loaded as long as they live
        self._lock = threading.Lock()

    def _load(self, real: str) -> None:
        """Compile and load the kernels of one precision."""
        from cupy.cuda.function import Module as CudaModule

        owner = self.owner
        major, minor = torch.cuda.get_device_capability(self.device)
        compiled = compiler.compile_source(
            owner.file, owner.headers, owner.kernels_of(real), f"sm_{major}{minor}"
        )
        with torch.cuda.device(self.device):
            module = CudaModule()
            module.load(compiled.cubin)
            self._modules.append(module)
            for name, lowered in compiled.names.items():
                self.functions[name] = module.get_function(lowered)

    def launch(
        self, kernel: str, grid: Grid, block: int, shared: int, arguments: Sequence[Tensor | int]
    ) -> None:
        with self._lock:
            if kernel not in self.functions:
                self._load(kernel.removesuffix(">").split("<")[1])
        with torch.cuda.device(self.device):
            stream = _Stream(torch.cuda.current_stream(self.device).cuda_stream)
            values = tuple(map(_argument, arguments))
            full = (*grid, 1, 1)[:3]
            self.functions[kernel](full, (block, 1, 1), values, shared, stream)


class _Stream:
    """What CuPy asks of a stream."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _argument(value: Tensor | int) -> Any:
    return np.intp(value.data_ptr()) if isinstance(value, Tensor) else np.int32(value)
