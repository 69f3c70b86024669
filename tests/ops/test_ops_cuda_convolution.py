"""The CUDA kernels of the convolution, run on the CPU, against the definition in float64."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlip.errors import InputError
from mlip.ops import ConvolutionSignature, Neighborhood, convolution
from mlip.ops.convolution import FEW_RADIAL
from mlip.ops.cpu.library import encode
from mlip.ops.cuda import compiler, convolution_tables
from mlip.ops.cuda.convolution import (
    GroupProgram,
    convolve,
    convolve_backward,
    programs,
)
from mlip.ops.cuda.program import Program
from mlip.potential import load_potential, shipped_potentials
from tests.ops.host_cuda import (
    BACKWARDS,
    FORWARDS,
    SHUFFLED,
    needs_compiler,
    same_bits,
    without_barrier,
)

UNEVEN = ConvolutionSignature((5, 40, 3), 2, (0, 1, 2), natural_parity=True)
WIDE = ConvolutionSignature((130,), 3, (0, 1, 2, 3), natural_parity=True)
ALL_PATHS = ConvolutionSignature((3, 33), 2, (0, 1, 2))
HIGH = ConvolutionSignature((8, 0, 40, 0, 0, 3, 16), 6, (0, 2, 5, 6), natural_parity=True)
MANY_PATHS = ConvolutionSignature((8, 0, 40, 0, 0, 3, 16), 6, (0, 1, 2))
NEIGHBORS = (0, 1, 35, 5, 0, 3, 0)  # of each atom; one row is longer than a tile
ALL = [True, True, True, True]


class Case:
    """Random inputs of a convolution on a ragged graph."""

    def __init__(self, signature: ConvolutionSignature, dtype: torch.dtype, n_radial: int = 0):
        generator = torch.Generator().manual_seed(0)
        counts = torch.tensor(NEIGHBORS)
        n_atoms, n_edges = len(NEIGHBORS), sum(NEIGHBORS)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.signature, self.text = signature, encode(signature)
        self.rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.target = torch.repeat_interleave(torch.arange(n_atoms), counts)
        self.source = torch.randint(0, n_atoms, (n_edges,), generator=generator)
        self.features = [
            randn(n_atoms, 2 * i + 1, c) for i, c in enumerate(signature.channels)
        ]  # fmt: skip
        self.harmonics = randn(n_edges, (signature.lmax_edge + 1) ** 2)
        self.radial = randn(n_edges, n_radial or signature.n_weights)
        self.kernel = randn(n_radial, signature.n_weights) if n_radial else None
        self.gradient = randn(n_atoms * sum(
            (2 * i + 1) * c for i, c in enumerate(signature.out_channels)
        ))  # fmt: skip

    @property
    def inputs(self) -> tuple:
        return (flat(self.features), self.harmonics, self.radial, self.kernel)

    def forward(self) -> Tensor:
        return convolve(*self.inputs, self.rowptr, self.source, self.text)

    def backward(self, wanted: list[bool] = ALL) -> tuple[Tensor, ...]:
        return convolve_backward(
            *self.inputs, self.gradient, self.rowptr, self.source, self.text, wanted
        )

    def definition(self, x: Tensor, harmonics: Tensor, radial: Tensor, kernel=None) -> Tensor:
        """The definition, with packed features and packed results."""
        sizes = [part.numel() for part in self.features]
        features = [
            part.view(like.shape) for part, like in zip(x.split(sizes), self.features, strict=True)
        ]  # fmt: skip
        weights = radial if kernel is None else radial @ kernel
        neighbors = Neighborhood(self.source, self.target, len(NEIGHBORS), self.rowptr)
        return flat(convolution(self.signature, tuple(features), harmonics, weights, neighbors))

    def truth(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
        """Result and gradients of the definition."""
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in self.inputs if t is not None]
        out = self.definition(*leaves)
        slopes = torch.autograd.grad((out * self.gradient.to(dtype)).sum(), leaves)
        return out.detach(), list(slopes)


def flat(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.detach().double() - truth).norm() / truth.norm())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("signature", "n_radial"),
    [(UNEVEN, 0), (UNEVEN, 4), (WIDE, 0), (WIDE, 16), (ALL_PATHS, 3), (UNEVEN, 1)],
)
def test_equals_the_definition(on_host, signature, n_radial, dtype):
    on_host(SHUFFLED)
    case = Case(signature, dtype, n_radial)
    out, slopes = case.truth()
    tolerance = {torch.float32: 4e-7, torch.float64: 1e-15}[dtype]
    assert relative(case.forward(), out) < tolerance
    for found, truth in zip(case.backward(), slopes, strict=False):
        assert relative(found, truth) < tolerance


@needs_compiler
@pytest.mark.parametrize("signature", [UNEVEN, WIDE])
def test_float32_is_as_accurate_as_the_definition(on_host, signature):
    """At most twice the error of the definition in the same precision."""
    on_host()
    case = Case(signature, torch.float32)
    (out, slopes), (plain, plain_slopes) = case.truth(), case.truth(torch.float32)
    found = [case.forward(), *case.backward()[:3]]
    for a, b, exact in zip(found, [plain, *plain_slopes], [out, *slopes], strict=True):
        assert relative(a, exact) < 2 * relative(b, exact)


@needs_compiler
@pytest.mark.parametrize("n_radial", [0, 4])
def test_same_bits_in_every_order_of_threads(on_host, n_radial):
    found = []
    for order in (FORWARDS, BACKWARDS, SHUFFLED):
        on_host(order)
        case = Case(UNEVEN, torch.float32, n_radial)
        found.append([case.forward(), *case.backward()])
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


@needs_compiler
def test_only_what_is_wanted(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64, 4)
    whole = case.backward()
    for i in range(4):
        part = case.backward([j == i for j in range(4)])
        assert torch.equal(part[i], whole[i])
        assert [t.numel() for j, t in enumerate(part) if j != i] == [0, 0, 0]


@needs_compiler
@pytest.mark.parametrize("n_radial", [FEW_RADIAL, 30])
def test_many_radial_functions_do_not_need_shared_memory(on_host, n_radial):
    """The kernel of degree 1 would be 80 KiB; there are no registers for more than 16."""
    on_host()
    case = Case(ConvolutionSignature((3, 130), 2, (0, 1, 2), True), torch.float64, n_radial)
    few, many = programs(case.text, n_radial)
    assert few.group.kept(8)
    assert not many.group.kept(8)
    out, slopes = case.truth()
    for found, truth in zip([case.forward(), *case.backward()], [out, *slopes], strict=True):
        assert relative(found, truth) < 1e-15


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that a call makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@needs_compiler
@pytest.mark.parametrize("signature", [WIDE, MANY_PATHS])
def test_no_memory_for_edges_paths_and_channels(on_host, monkeypatch, signature):
    """With radial functions; weights that are given have gradients of that size."""
    monkeypatch.setattr(convolution_tables, "COPIES", 1)  # of the kernel: not by number of edges
    on_host()
    case = Case(signature, torch.float64, FEW_RADIAL)
    stored = len(case.source) * signature.n_weights
    for radial in (True, False):
        if not radial:
            case.radial, case.kernel = case.radial @ case.kernel, None
        with Largest() as largest:
            case.forward()
            case.backward([True, True, True, radial])
        assert (largest.numbers < stored) == radial


@needs_compiler
def test_views_are_inputs_like_any_other(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64, 4)
    expected = [case.forward(), *case.backward()]
    for name in ("harmonics", "radial", "kernel"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    for a, b in zip([case.forward(), *case.backward()], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@needs_compiler
def test_no_edges(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64)
    case.rowptr = torch.zeros_like(case.rowptr)
    case.source, case.harmonics, case.radial = case.source[:0], case.harmonics[:0], case.radial[:0]
    assert not case.forward().any()
    of_features, of_harmonics, of_radial, _ = case.backward([True, True, True, False])
    assert not of_features.any()
    assert of_harmonics.shape == case.harmonics.shape
    assert of_radial.numel() == 0


@needs_compiler
@pytest.mark.parametrize("lmax_edge", [1, 5])
def test_no_products(on_host, lmax_edge):
    """Nothing couples degree 0 to degree 7."""
    on_host()
    case = Case(ConvolutionSignature((2,), lmax_edge, (7,)), torch.float64, 4)
    case.radial = torch.ones(44, 4, dtype=torch.float64)
    case.kernel = torch.ones(4, 0, dtype=torch.float64)
    assert case.forward().numel() == 0
    for found, given in zip(case.backward(), case.inputs, strict=True):
        assert found.shape == given.shape
        assert not found.any()


@needs_compiler
def test_no_radial_functions(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64, 4)
    case.radial, case.kernel = case.radial[:, :0], case.kernel[:0]
    assert not case.forward().any()
    for found, given in zip(case.backward(), case.inputs, strict=True):
        assert found.shape == given.shape
        assert not found.any()


def test_wrong_shapes_are_named():
    case = Case(UNEVEN, torch.float64)
    case.harmonics = case.harmonics[:, :4]
    with pytest.raises(InputError, match="harmonics do not fit"):
        case.forward()


# What the tests must notice: the same text with a mistake in it.


def without_second_barrier(text: str) -> str:
    return re.sub(
        r"(fill_tile\(harmonics[^}]*?)__syncthreads\(\);\s*for \(int t", r"\1for (int t", text
    )


def without_first_barrier(text: str) -> str:
    return re.sub(r"__syncthreads\(\);(\s*fill_tile\(harmonics)", r"\1", text)


def barrier_for_some(text: str) -> str:
    return re.sub(
        r"__syncthreads\(\);(\s*fill_tile)", r"if (threadIdx.x < 5) __syncthreads();\1", text
    )


def wrong_partner(text: str) -> str:
    return text.replace("given, half)", "given, half ^ 1)")


MISTAKES = {
    "second barrier": without_second_barrier,
    "first barrier": without_first_barrier,
    "barrier for some threads": barrier_for_some,
    "partner of a shuffle": wrong_partner,
}


@needs_compiler
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(on_host, name):
    case = Case(UNEVEN, torch.float64)
    on_host()
    right = [case.forward(), *case.backward()]
    change = MISTAKES[name]
    texts = [compiler.source("convolution.cu"), *compiler.shared_headers().values()]
    assert any(change(text) != text for text in texts)
    assert noticed(on_host, case, right, change)


RADIAL_MISTAKES = {
    "functions of an earlier group lost": ("add ? sum : T(0)", "T(0)"),
    "one function for all": ("w += functions[r]", "w += functions[0]"),
    "gradients of one edge for all": ("out[first * N + i]", "out[i]"),
    "other warps lost": ("w < warps; ++w) total", "w < 1; ++w) total"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", RADIAL_MISTAKES)
def test_mistakes_with_radial_functions_are_noticed(on_host, name):
    old, new = RADIAL_MISTAKES[name]
    assert old in compiler.source("convolution.cu") + compiler.source("convolution_tile.cuh")
    case = Case(UNEVEN, torch.float64, 4)
    slopes = case.truth()[1]
    on_host(change=lambda text: text.replace(old, new))
    pairs = zip(case.backward(), slopes, strict=True)
    assert not all(relative(a, b) < 1e-6 for a, b in pairs)  # or NaN


@needs_compiler
@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found_with_radial_functions(on_host, barrier):
    case = Case(UNEVEN, torch.float64, 4)

    def gradients() -> dict[str, Tensor]:
        return dict(zip("xYbK", case.backward(), strict=True))

    assert same_bits(on_host, gradients)
    assert not same_bits(
        on_host, gradients, change=without_barrier("convolution_backward", barrier)
    )


def noticed(on_host, case: Case, right: list[Tensor], change: Callable[[str], str]) -> bool:
    for order in (FORWARDS, BACKWARDS, SHUFFLED):
        on_host(order, change)
        try:
            found = [case.forward(), *case.backward()]
        except RuntimeError:  # deadlock, or threads at different barriers
            return True
        if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
            return True
    return False


def shipped() -> dict[str, tuple[ConvolutionSignature, int]]:
    """Signatures of the models that ship or are published, and the plain ones of L = 1 to 3."""
    found = {
        "mlearn-facet, first block": (ConvolutionSignature((64,), 3, (0, 1, 2, 3), True), 8),
        "mlearn-facet, last block": (ConvolutionSignature((64, 32, 16), 3, (0, 1, 2, 3), True), 8),
        "facet-s, first block": (ConvolutionSignature((64,), 2, (0, 1, 2), True), 8),
        "facet-s, SevenNet-0": (ConvolutionSignature((128, 64, 32), 2, (0, 1, 2), True), 8),
        "facet-s, last block": (ConvolutionSignature((128, 64, 32), 2, (0,), True), 8),
    }
    for lmax in (1, 2, 3):
        degrees = tuple(range(lmax + 1))
        channels = (64,) * (lmax + 1)
        found[f"L = {lmax}"] = (ConvolutionSignature(channels, lmax, degrees, True), 0)
    return found


def test_shipped_potentials_are_among_them():
    known = {signature for signature, _ in shipped().values()}
    for name in shipped_potentials():
        assert {block.signature for block in load_potential(name).model.blocks} <= known


REGISTERS = re.compile(
    r"entry function '(\w+)'.*?\n.*?\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores"
    r".*?\n.*?Used (\d+) registers"
)
MOST_REGISTERS = {"float": 128, "double": 255}
MOST_SPILLS = {"float": 0, "double": 16}  # bytes
# With radial functions: 8 of them and, in a backward pass, their gradients.
RADIAL_REGISTERS = {"float": 168, "double": 255}
RADIAL_SPILLS = {"float": 0, "double": 176}
LONGEST_REGISTERS = {"float": 255, "double": 255}  # 31 rows: degree 2 with harmonics of degree 3
LONGEST_SPILLS = {"float": 0, "double": 608}


def limits(each: GroupProgram, kernel: str) -> tuple[int, int]:
    """Registers and spilled bytes that a kernel may need."""
    real = "double" if kernel.endswith("<double>") else "float"
    if not each.group.n_radial:
        return MOST_REGISTERS[real], MOST_SPILLS[real]
    if not kernel.startswith("convolution_backward"):
        return RADIAL_REGISTERS[real], MOST_SPILLS[real]
    if each.group.degree == 2 and each.group.layout.lmax_edge == 3:
        return LONGEST_REGISTERS[real], LONGEST_SPILLS[real]
    return RADIAL_REGISTERS[real], RADIAL_SPILLS[real]


def usage(program: Program, architecture: str) -> dict[str, tuple[int, int, int]]:
    """Bytes of stack, bytes spilled and registers of each kernel."""
    compiled = compiler.compile_source(
        program.file, program.headers, program.kernels, architecture, resources=True
    )
    assert compiled.cubin.startswith(b"\x7fELF")
    used = {name: tuple(map(int, rest)) for name, *rest in REGISTERS.findall(compiled.log)}
    return {kernel: used[mangled] for kernel, mangled in compiled.names.items()}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", shipped())
def test_compiles_without_spills(name, architecture):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    signature, n_radial = shipped()[name]
    for each in {*programs(encode(signature), n_radial), *programs(encode(signature), 0)}:
        for kernel, (stack, spills, registers) in usage(each.program, architecture).items():
            most_registers, most_spills = limits(each, kernel)
            assert registers <= most_registers, kernel
            assert max(stack, spills) <= most_spills, kernel
