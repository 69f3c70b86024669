"""The CUDA convolution that reads tables, run on the CPU, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import ConvolutionSignature
from mlip.ops.cpu.library import encode, layout
from mlip.ops.cuda import convolution, convolution_tables
from mlip.ops.cuda.convolution import table_inputs
from mlip.ops.cuda.double_backward import cuda_double_backward
from mlip.ops.cuda.table_plan import tabulate
from tests.ops.host_cuda import SHUFFLED, needs_compiler, same_bits, without_barrier
from tests.ops.test_ops_cuda_convolution import (
    ALL_PATHS,
    HIGH,
    MANY_PATHS,
    UNEVEN,
    Case,
    Largest,
    relative,
    usage,
)
from tests.ops.test_ops_double_backward import probes, second, truth

SIGNATURES = {
    "to 6, natural parity": ConvolutionSignature((3, 1, 2, 2, 1, 2, 3), 6, tuple(range(7)), True),
    "to 5, all parities": ConvolutionSignature((2, 1, 1, 1, 1, 9), 5, tuple(range(6)), False),
    "gaps": HIGH,
    "scalars in, more than a block": ConvolutionSignature((130,), 6, (0, 6), True),
    "harmonics that no product needs": ConvolutionSignature((4, 4, 2), 6, (0, 1), False),
    "degree 8": ConvolutionSignature((0,) * 8 + (33,), 8, (1, 8), True),
}
SMALL = ConvolutionSignature((40, 0, 0, 0, 0, 3), 2, (0, 3, 5), True)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
NAMES = ("out", "features", "harmonics", "radial", "kernel")
BARRIERS = [
    ("table_sums", 0), ("table_sums", 1), ("table_slopes", 0), ("table_slopes", 1),
    ("table_slopes", 2), ("sum_kernel_slopes", 0), ("sum_kernel_slopes", 1),
]  # fmt: skip


def results(case: Case) -> dict[str, Tensor]:
    """Result and gradients by the kernels."""
    found = (case.forward(), *case.backward([t is not None for t in case.inputs]))
    return dict(zip(NAMES[: 4 + (case.kernel is not None)], found, strict=False))


@needs_compiler
@PRECISIONS
@pytest.mark.parametrize("n_radial", [0, 9])
@pytest.mark.parametrize("name", SIGNATURES)
def test_equals_the_definition(on_host, name, n_radial, dtype):
    on_host(SHUFFLED)
    case = Case(SIGNATURES[name], dtype, n_radial)
    out, slopes = case.truth()
    tolerance = {torch.float32: 6e-7, torch.float64: 2e-15}[dtype]
    found = results(case)
    assert len(found) == 1 + len(slopes)
    for part, exact in zip(found.values(), (out, *slopes), strict=True):
        assert relative(part, exact) < tolerance


@needs_compiler
@PRECISIONS
@pytest.mark.parametrize(("name", "n_radial", "given"), [
    ("gaps", 0, "xYb"), ("gaps", 3, "xYbK"), ("to 6, natural parity", 2, "Yb"),
    ("degree 8", 2, "K"),
])  # fmt: skip
def test_second_derivatives_equal_the_definition(on_host, name, n_radial, given, dtype):
    on_host(SHUFFLED)
    case = Case(SIGNATURES[name], dtype, n_radial)
    along = probes(case, given)
    tolerance = {torch.float32: 6e-7, torch.float64: 2e-15}[dtype]
    for found, expected in zip(
        second(cuda_double_backward, case, along), truth(case, along), strict=True
    ):
        if expected.any():
            assert relative(found, expected) < tolerance
        else:
            assert not found.any()


@needs_compiler
@pytest.mark.parametrize("n_radial", [0, 8])
def test_float32_is_as_accurate_as_the_definition(on_host, n_radial):
    """At most twice the error of the definition in the same precision."""
    on_host()
    case = Case(SIGNATURES["gaps"], torch.float32, n_radial)
    (out, slopes), (plain, plain_slopes) = case.truth(), case.truth(torch.float32)
    exact = zip(results(case).values(), (plain, *plain_slopes), (out, *slopes), strict=True)
    assert all(relative(a, c) < 2 * relative(b, c) for a, b, c in exact)


@needs_compiler
@pytest.mark.parametrize("signature", [UNEVEN, ALL_PATHS], ids=["natural parity", "all parities"])
def test_low_degrees_too(on_host, monkeypatch, signature):
    """The other kernels take these; tables must not be wrong where they could be used."""
    monkeypatch.setattr(convolution, "HIGHEST_WRITTEN_OUT", -1)
    on_host()
    case = Case(signature, torch.float64, 4)
    out, slopes = case.truth()
    for part, exact in zip(results(case).values(), (out, *slopes), strict=True):
        assert relative(part, exact) < 2e-15


@needs_compiler
@pytest.mark.parametrize("n_radial", [0, 4])
def test_same_bits_in_every_order_of_threads(on_host, n_radial):
    case = Case(SMALL, torch.float32, n_radial)
    assert same_bits(on_host, lambda: results(case))


@needs_compiler
@pytest.mark.parametrize("copies", [1, 3, 64])
def test_groups_of_atoms(on_host, monkeypatch, copies):
    """The gradient by the kernel is summed in parts; 7 atoms."""
    monkeypatch.setattr(convolution_tables, "COPIES", copies)
    on_host()
    case = Case(SMALL, torch.float64, 3)
    assert relative(case.backward()[3], case.truth()[1][3]) < 1e-15


@needs_compiler
def test_only_what_is_wanted(on_host):
    on_host()
    case = Case(SMALL, torch.float64, 4)
    whole = case.backward()
    for i in range(4):
        part = case.backward([j == i for j in range(4)])
        assert torch.equal(part[i], whole[i])
        assert [t.numel() for j, t in enumerate(part) if j != i] == [0, 0, 0]


@needs_compiler
@pytest.mark.parametrize("n_radial", [1, 200])
def test_any_number_of_radial_functions(on_host, n_radial):
    """So many functions of a tile as 200 are not in shared memory: weights are stored."""
    on_host()
    case = Case(SMALL, torch.float64, n_radial)
    inputs = table_inputs(*case.inputs, case.rowptr, case.source, case.text)
    assert (inputs.kernel is None) == (n_radial == 200)
    out, slopes = case.truth()
    for part, exact in zip(results(case).values(), (out, *slopes), strict=True):
        assert relative(part, exact) < 1e-15
    along = probes(case, "xYbK")
    for part, exact in zip(
        second(cuda_double_backward, case, along), truth(case, along), strict=True
    ):
        assert relative(part, exact) < 2e-15


@needs_compiler
def test_second_derivatives_need_no_memory_for_edges_paths_and_channels(on_host, monkeypatch):
    monkeypatch.setattr(convolution_tables, "COPIES", 1)  # of the kernel: not by number of edges
    on_host()
    case = Case(MANY_PATHS, torch.float64, 4)
    along = probes(case, "xYb")
    for stored in (False, True):
        if stored:
            monkeypatch.setattr(convolution_tables, "fits", lambda *_: False)
        with Largest() as largest:
            second(cuda_double_backward, case, along)
        assert (largest.numbers >= len(case.source) * MANY_PATHS.n_weights) == stored


@needs_compiler
def test_kernel_alone_is_wanted(on_host):
    """Of second derivatives; a wrong shape is named where no other pass would look at it."""
    on_host()
    case = Case(SMALL, torch.float64, 4)
    along = probes(case, "xYbK")
    only_kernel = [False, False, False, True, False]
    (found,) = second(cuda_double_backward, case, along, only_kernel)
    assert relative(found, truth(case, along)[3]) < 2e-15
    case.harmonics = case.harmonics[:, :4]
    with pytest.raises(InputError, match="harmonics do not fit"):
        second(cuda_double_backward, case, along, only_kernel)


@needs_compiler
def test_no_radial_functions(on_host):
    on_host()
    case = Case(SMALL, torch.float64, 4)
    case.radial, case.kernel = case.radial[:, :0], case.kernel[:0]
    found = results(case)
    assert not found["out"].any()
    assert found["radial"].shape == case.radial.shape
    assert found["kernel"].numel() == 0


@needs_compiler
def test_views_are_inputs_like_any_other(on_host):
    on_host()
    case = Case(SMALL, torch.float64, 4)
    expected = results(case)
    for name in ("harmonics", "radial", "kernel"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    for name, found in results(case).items():
        assert torch.equal(found, expected[name])


@needs_compiler
def test_no_edges(on_host):
    on_host()
    case = Case(SMALL, torch.float64, 4)
    case.rowptr = torch.zeros_like(case.rowptr)
    case.source, case.harmonics, case.radial = case.source[:0], case.harmonics[:0], case.radial[:0]
    found = results(case)
    assert not any(part.any() for part in found.values())
    assert found["harmonics"].shape == case.harmonics.shape
    assert found["kernel"].shape == case.kernel.shape


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", SIGNATURES)
def test_tables_hold_every_coupling_once(name, backward):
    """Both directions have the same factors, and as many as Clebsch-Gordan tables."""
    from mlip.so3 import clebsch_gordan

    shape = layout(encode(SIGNATURES[name]))
    for degree in shape.degrees:
        factors = tabulate(shape, degree, backward).factors
        tables = [
            clebsch_gordan(*path).double() * (2 * path[2] + 1) ** 0.5
            for path in shape.paths
            if path[0] == degree
        ]
        expected = torch.cat([t[t.abs() > 1e-10].flatten() for t in tables]).sort().values
        np.testing.assert_allclose(np.sort(factors[factors != 0]), expected, rtol=1e-13)


@needs_compiler
@pytest.mark.parametrize(("kernel", "barrier"), BARRIERS)
def test_a_missing_barrier_is_found(on_host, kernel, barrier):
    """A control of the tests above: without a barrier they would be red."""
    case = Case(SMALL, torch.float32, 4)
    change = without_barrier(kernel, barrier)
    assert not same_bits(on_host, lambda: results(case), change=change)


MISTAKES = {
    "the same edge for all": ("tile.from[t] + c", "tile.from[0] + c"),
    "no order of edges": ("order ? order[i] : i", "i"),
    "every atom once too often": ("atom += gridDim.x", "atom += max(1u, gridDim.x - 1)"),
    "one warp lost": ("w < blockDim.x / 32", "w < blockDim.x / 32 - 1"),
    "a channel counted twice": ("on ? tile.column", "true ? tile.column"),
}


@needs_compiler
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(on_host, monkeypatch, name):
    monkeypatch.setattr(convolution_tables, "COPIES", 3)  # groups of several atoms
    case = Case(SMALL, torch.float64, 4)
    out, slopes = case.truth()
    on_host(change=lambda text: text.replace(*MISTAKES[name]))
    pairs = zip(results(case).values(), (out, *slopes), strict=True)
    assert not all(relative(part, exact) < 1e-6 for part, exact in pairs)  # or NaN


MOST_REGISTERS = {"float": 176, "double": 255}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["PROGRAM", "KERNEL_PROGRAM"])
def test_compiles_without_spills(name, architecture):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    program = getattr(convolution_tables, name)
    found = usage(program, architecture)
    assert set(found) == set(program.kernels)
    for kernel, (stack, spills, registers) in found.items():
        assert max(stack, spills) == 0, kernel
        assert registers <= MOST_REGISTERS["double" if "double" in kernel else "float"], kernel
