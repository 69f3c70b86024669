"""CUDA compiler, its cache, and launches by a driver that only takes notes; no GPU needed."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from mlip.errors import InputError, MlipError
from mlip.ops import backend
from mlip.ops.cuda import compiler
from mlip.ops.cuda.program import Program, kernel_names

FILE, KERNELS = "segments.cu", ("segment_sum<float>",)


@pytest.fixture
def _nvrtc(monkeypatch, tmp_path):
    try:
        compiler.nvrtc()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MLIP_CACHE", str(tmp_path))


def cubins(folder) -> list:
    return sorted(folder.rglob("*.cubin"))


@pytest.mark.usefixtures("_nvrtc")
def test_code_is_compiled_once_and_found_again(monkeypatch, tmp_path):
    first = compiler.compile_source(FILE, {}, KERNELS, "sm_90")
    assert first.cubin.startswith(b"\x7fELF")
    (path,) = cubins(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
        again = compiler.compile_source(FILE, {}, KERNELS, "sm_90")
    assert (again.cubin, again.names) == (first.cubin, first.names)
    compiler.compile_source(FILE, {}, KERNELS, "sm_80")
    compiler.compile_source(FILE, {"unused.h": ""}, KERNELS, "sm_90")
    assert len(cubins(tmp_path)) == 3

    for damaged in (path.read_bytes()[:-1], b"", b"{}\n"):
        path.write_bytes(damaged)
        assert compiler.compile_source(FILE, {}, KERNELS, "sm_90").cubin == first.cubin
        assert path.read_bytes().endswith(first.cubin)


@pytest.mark.usefixtures("_nvrtc")
def test_several_at_once_leave_whole_files_only(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(compiler.compile_source, FILE, {}, KERNELS, "sm_90") for _ in range(4)]
        found = {call.result().cubin for call in calls}
    assert len(found) == 1
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".cubin"]
    assert cubins(tmp_path)[0].read_bytes().endswith(found.pop())


@pytest.mark.usefixtures("_nvrtc")
def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLIP_CACHE", str(tmp_path / "file"))
    assert compiler.compile_source(FILE, {}, KERNELS, "sm_90").cubin


@pytest.mark.usefixtures("_nvrtc")
def test_text_that_does_not_compile_says_where(monkeypatch):
    monkeypatch.setattr(compiler, "source", lambda _: "__global__ void broken( {")
    with pytest.raises(MlipError, match=r"segments.cu does not compile for sm_90:\n.*error"):
        compiler.compile_source(FILE, {}, (), "sm_90")


def test_without_cupy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(InputError, match=r"pip install 'mlip\[cuda\]'"):
        compiler.nvrtc()


@pytest.mark.parametrize(
    ("driver", "reason"), [(12080, "driver is for CUDA 12.8, .* NVRTC for 13.0"), (13010, None)]
)
def test_a_driver_must_be_as_new_as_the_compiler(monkeypatch, driver, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, module in {
        "cupy_backends.cuda.libs": SimpleNamespace(
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0))
        ),
        "cupy_backends.cuda.api": SimpleNamespace(
            runtime=SimpleNamespace(driverGetVersion=lambda: driver)
        ),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = backend._cuda_missing.__wrapped__()
    assert found is None if reason is None else re.search(reason, found)


class Driver:
    """Takes the place of CuPy's way to the CUDA driver."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.launches: list[tuple] = []

    def module(self) -> SimpleNamespace:
        return SimpleNamespace(load=self.loaded.append, get_function=self.function)

    def function(self, lowered: str):
        def call(grid, block, arguments, shared, stream) -> None:
            self.launches.append((lowered, grid, block, arguments, shared, stream.ptr))

        return call


@pytest.fixture
def driver(monkeypatch) -> Driver:
    found = Driver()
    cupy = ModuleType("cupy.cuda.function")
    cupy.Module = found.module
    monkeypatch.setitem(sys.modules, "cupy.cuda.function", cupy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    streams = iter(range(100, 200))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=next(streams))
    )

    def compile_source(file, headers, kernels, architecture):
        code = f"{file} {architecture} {len(headers)}".encode()
        return compiler.Compiled(code, {name: f"lowered {name}" for name in kernels}, "")

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    return found


def test_what_the_driver_gets(driver):
    program = Program(FILE, {"table.h": ""})
    tensor, empty = torch.zeros(3), torch.zeros(0)
    for _ in range(2):
        program.launch("segment_sum", torch.float32, (7, 2), 128, 64, (tensor, empty, -5))
    program.launch("segment_sum", torch.float32, (0, 2), 128, 64, (tensor,))  # nothing to do
    assert driver.loaded == [b"segments.cu sm_90 1"]  # once, and one precision
    first, second = driver.launches
    lowered, grid, block, arguments, shared, stream = first
    assert lowered == "lowered segment_sum<float>"
    assert (grid, block, shared) == ((7, 2, 1), (128, 1, 1), 64)
    assert (stream, second[-1]) == (100, 101)  # the current stream, asked for every time
    assert [type(value) for value in arguments] == [np.intp, np.intp, np.int32]
    assert arguments == (tensor.data_ptr(), 0, -5)
    program.launch("segment_sum", torch.float64, (1,), 128, 0, (tensor.double(),))
    assert len(driver.loaded) == 2
    assert driver.launches[-1][0] == "lowered segment_sum<double>"


def test_what_does_not_fit_is_an_error(driver):
    program = Program(FILE, {})
    with pytest.raises(InputError, match="2147483648 is too large"):
        program.launch("segment_sum", torch.float32, (1,), 128, 0, (torch.zeros(1), 2**31))
    two = (torch.zeros(1), torch.zeros(1, device="meta"))
    with pytest.raises(InputError, match="tensors are on cpu, meta"):
        program.launch("segment_sum", torch.float32, (1,), 128, 0, two)
    assert driver.launches == []


def test_names_of_kernels_are_read_from_the_text():
    assert kernel_names(FILE) == ("segment_sum", "segment_shares")
    assert Program(FILE, {}).kernels_of("float") == ("segment_sum<float>", "segment_shares<float>")
