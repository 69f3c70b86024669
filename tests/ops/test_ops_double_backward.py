"""Second and third derivatives of the convolution, on the CPU and by the CUDA kernel run on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.ops import ConvolutionSignature
from mlip.ops.convolution import FEW_RADIAL
from mlip.ops.cpu.double_backward import packed_double_backward
from mlip.ops.cpu.library import encode, packed_convolution
from mlip.ops.cuda import compiler, convolution_tables
from mlip.ops.cuda import double_backward as cuda_second
from mlip.ops.cuda.double_backward import cuda_double_backward, second_programs
from tests.ops import test_ops_cuda_convolution
from tests.ops.host_cuda import BACKWARDS, FORWARDS, SHUFFLED, needs_compiler
from tests.ops.test_ops_cuda_convolution import (
    ALL_PATHS,
    UNEVEN,
    WIDE,
    Case,
    Largest,
    relative,
    shipped,
    usage,
)

SMALL = ConvolutionSignature((8, 8), 1, (0, 1), True)
MANY = ConvolutionSignature((130, 5), 1, (0, 1), True)  # two groups, one of two blocks of channels
HIGHEST = ConvolutionSignature((4, 0, 0, 3), 4, (0, 1, 4))
ALL = [True] * 5


def probes(case: Case, given: str) -> list[Tensor | None]:
    """Cotangents of the gradients by features, harmonics, radial and kernel that are given."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        if t is not None and name in given
        else None
        for name, t in zip("xYbK", case.inputs, strict=True)
    ]


def truth(
    case: Case, along: list[Tensor | None], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Gradients of φ = Σ ⟨cotangent, gradient⟩ by the definition."""
    x, *rest = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in case.inputs]
    leaves = [t for t in (x, *rest) if t is not None]
    g = case.gradient.to(dtype, copy=True).requires_grad_()
    out = case.definition(x, *rest)
    first = torch.autograd.grad(out, leaves, g, create_graph=True)
    given = [None if t is None else t.to(dtype) for t in along[: len(leaves)]]
    phi = sum((a * b).sum() for a, b in zip(given, first, strict=True) if a is not None)
    return list(torch.autograd.grad(phi, [*leaves, g], materialize_grads=True))


def second(operator, case: Case, along: list[Tensor | None], wanted: list[bool] = ALL):
    """Results of the operator that are not empty."""
    needs = [want and t is not None for want, t in zip(wanted[:4], case.inputs, strict=True)]
    found = operator(
        *case.inputs, case.gradient, *along, case.rowptr, case.source, case.text,
        [*needs, wanted[4]],
    )  # fmt: skip
    return [t for t, want in zip(found, [*needs, wanted[4]], strict=True) if want]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("signature", "n_radial", "given"),
    [
        (UNEVEN, 0, "xYb"), (UNEVEN, 4, "xYbK"), (WIDE, 0, "xYb"), (ALL_PATHS, 3, "Yb"),
        (UNEVEN, 4, "x"), (UNEVEN, 4, "K"), (UNEVEN, 4, "Y"), (UNEVEN, 4, "b"),
        (WIDE, FEW_RADIAL, "xYb"), (WIDE, FEW_RADIAL, "Yb"), (MANY, 1, "xYb"),
        (HIGHEST, 5, "xYb"), (UNEVEN, FEW_RADIAL + 1, "xYbK"), (UNEVEN, FEW_RADIAL + 1, "Y"),
    ],
)  # fmt: skip
def test_cuda_kernel_equals_the_definition(on_host, signature, n_radial, given, dtype):
    on_host(SHUFFLED)
    case = Case(signature, dtype, n_radial)
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
@pytest.mark.parametrize("n_radial", [0, 4])
def test_float32_is_as_accurate_as_the_definition(on_host, n_radial):
    """At most twice the error of the definition in the same precision."""
    on_host()
    case = Case(UNEVEN, torch.float32, n_radial)
    along = probes(case, "xYbK")
    found = second(cuda_double_backward, case, along)
    plain, exact = truth(case, along, torch.float32), truth(case, along)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert relative(a, c) < 2 * relative(b, c)


@needs_compiler
def test_same_bits_in_every_order_of_threads(on_host):
    case = Case(UNEVEN, torch.float32, 4)
    along = probes(case, "xYbK")
    found = []
    for order in (FORWARDS, BACKWARDS, SHUFFLED):
        on_host(order)
        found.append(second(cuda_double_backward, case, along))
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


@needs_compiler
@pytest.mark.parametrize("counts", [(0, 300, 1), (1,) * 9, (0, 0, 4, 0)])
def test_ragged_rows(on_host, monkeypatch, counts):
    """One atom with many tiles of edges, atoms with one, most of them with none."""
    monkeypatch.setattr(test_ops_cuda_convolution, "NEIGHBORS", counts)
    on_host(SHUFFLED)
    case = Case(UNEVEN, torch.float64, 4)
    along = probes(case, "xYb")
    found = second(cuda_double_backward, case, along)
    for part, expected in zip(found, truth(case, along), strict=True):
        assert relative(part, expected) < 2e-15


@needs_compiler
@pytest.mark.parametrize("given", ["xYb", "Yb"])
def test_no_memory_for_edges_paths_and_channels(on_host, monkeypatch, given):
    """For what a loss of forces asks, with radial functions; it sees weights that are stored."""
    monkeypatch.setattr(convolution_tables, "COPIES", 1)  # of the kernel: not by number of edges
    on_host()
    case = Case(WIDE, torch.float64, FEW_RADIAL)
    along = probes(case, given)
    stored = len(case.source) * WIDE.n_weights
    for few in (FEW_RADIAL, 0):
        monkeypatch.setattr(cuda_second, "FEW_RADIAL", few)
        with Largest() as largest:
            second(cuda_double_backward, case, along)
        assert (largest.numbers < stored) == bool(few)


@needs_compiler
@pytest.mark.parametrize("n_radial", [4, FEW_RADIAL + 1])
@pytest.mark.parametrize("given", ["Yb", "xY", "xYbK"])
def test_only_what_is_wanted(on_host, n_radial, given):
    on_host()
    case = Case(UNEVEN, torch.float64, n_radial)
    along = probes(case, given)
    expected = truth(case, along)
    one = [[j == i for j in range(5)] for i in range(5)]
    for wanted in [*one, [True, True, True, False, True], [False, True, True, True, True]]:
        found = second(cuda_double_backward, case, along, wanted)
        parts = [part for part, want in zip(expected, wanted, strict=True) if want]
        for part, exact in zip(found, parts, strict=True):
            torch.testing.assert_close(part, exact, rtol=0, atol=1e-13 * float(exact.norm()))


@needs_compiler
def test_views_are_inputs_like_any_other(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64, 4)
    along = probes(case, "xYbK")
    expected = second(cuda_double_backward, case, along)
    for name in ("harmonics", "radial", "kernel"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    along[1:] = [tensor.t().contiguous().t() for tensor in along[1:]]
    for a, b in zip(second(cuda_double_backward, case, along), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@needs_compiler
@pytest.mark.parametrize("n_radial", [0, 4])
def test_no_edges(on_host, n_radial):
    on_host()
    case = Case(UNEVEN, torch.float64, n_radial)
    case.rowptr = torch.zeros_like(case.rowptr)
    case.source, case.harmonics, case.radial = case.source[:0], case.harmonics[:0], case.radial[:0]
    found = second(cuda_double_backward, case, probes(case, "xYb"))
    assert [t.shape for t in found[1:3]] == [case.harmonics.shape, case.radial.shape]
    assert not any(t.any() for t in found)


@needs_compiler
def test_no_products(on_host):
    """Nothing couples degree 0 to degree 7."""
    on_host()
    case = Case(ConvolutionSignature((2,), 1, (7,)), torch.float64, 4)
    found = second(cuda_double_backward, case, probes(case, "xYbK"))
    for part, given in zip(found, (*case.inputs, case.gradient), strict=True):
        assert part.shape == given.shape
        assert not part.any()


# What the tests must notice: the same text with a mistake in it.
KERNEL = "convolution_double_backward.cu"
MISTAKES = {
    "barrier after matrices": ("__syncthreads();\n      for (int t = 0", "for (int t = 0"),
    "barrier before sums over warps": (
        "__syncthreads();\n      const bool more", "const bool more",
    ),
    "barrier for some threads": (
        "__syncthreads();\n      for (int t", "if (on) __syncthreads();\n      for (int t",
    ),
    "harmonics of an earlier group lost": ("add || c_first", "c_first"),
    "harmonics of earlier channels lost": ("add || c_first", "add"),
    "other edge": ("along_matrices + t * STRIDE", "along_matrices"),
}  # fmt: skip


RADIAL_MISTAKES = {
    "radial functions of the first edge": ("along_radial, e, along", "along_radial, first, along"),
    "radial functions in the place of cotangents": (
        "weight_of(along_functions,", "weight_of(functions,",
    ),
    "harmonics in the place of radial functions": ("parts + HARMONICS", "parts"),
    "slopes of weights of the first order": ("add_functions(second", "add_functions(first"),
    "barrier after tiles of the kernel's gradient": (
        "__syncthreads();\n      if (!on) continue;\n      for (int t = 0; t < count; ++t) {\n"
        "        tile.column", "if (!on) continue;\n      for (int t = 0; t < count; ++t) {\n"
        "        tile.column",
    ),
    "features in the place of cotangents": ("apply(products, along_from", "apply(products, from"),
    "harmonics in the place of cotangents": ("slope_of<B>(s, along_y)", "slope_of<B>(s, y)"),
    "tiles in one place": ("SECOND ? tile.rest : memory", "memory"),
    "no first order": ("sum += turned.functions", "sum += 0 * turned.functions"),
    **MISTAKES,
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("name", "n_radial"), [*((name, 0) for name in MISTAKES), *((n, 3) for n in RADIAL_MISTAKES)]
)
def test_mistakes_are_noticed(on_host, name, n_radial):
    old, new = RADIAL_MISTAKES[name]
    assert old in compiler.source(KERNEL) + compiler.source("convolution_kernel_gradient.cu")
    case = Case(MANY, torch.float64, n_radial)
    along = probes(case, "xYb")
    on_host()
    right = second(cuda_double_backward, case, along)
    noticed = False
    for order in (FORWARDS, BACKWARDS, SHUFFLED):
        on_host(order, lambda text: text.replace(old, new))
        try:
            found = second(cuda_double_backward, case, along)
        except RuntimeError:  # deadlock, or threads at different barriers
            noticed = True
        else:
            noticed |= not all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert noticed


def third(convolution, case: Case, given: str) -> list[Tensor]:
    """Gradients of Σ second derivatives squared, by all that they depend on."""
    leaves = [t.detach().requires_grad_() for t in case.inputs if t is not None]
    g = case.gradient.clone().requires_grad_()
    first = torch.autograd.grad(convolution(*leaves), leaves, g, create_graph=True)
    along = [None if t is None else t.requires_grad_() for t in probes(case, given)]
    phi = sum((a * b).sum() for a, b in zip(along, first, strict=False) if a is not None)
    found = torch.autograd.grad(phi, [*leaves, g], create_graph=True, materialize_grads=True)
    total = sum((1 + i) * t.square().sum() for i, t in enumerate(found))
    last = [*leaves, g, *(t for t in along if t is not None)]
    return list(torch.autograd.grad(total, last, materialize_grads=True))


@pytest.mark.parametrize(("n_radial", "given"), [(0, "xYb"), (2, "xYbK"), (2, "Y")])
def test_third_derivatives_equal_the_definition(n_radial, given):
    case = Case(SMALL, torch.float64, n_radial)

    def kernels(x: Tensor, harmonics: Tensor, radial: Tensor, kernel=None) -> Tensor:
        return packed_convolution(
            x, harmonics, radial, kernel, case.rowptr, case.source, case.text
        )  # fmt: skip

    expected = third(case.definition, case, given)
    for a, b in zip(third(kernels, case, given), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


def test_cotangents_alone_may_be_differentiated():
    case = Case(SMALL, torch.float64, 2)
    graph = (case.rowptr, case.source, case.text, ALL)
    found = []
    for arguments_too in (True, False):
        arguments = [t.detach().clone() for t in (*case.inputs, case.gradient)]
        along = [t.requires_grad_() for t in probes(case, "xYbK")]
        for tensor in arguments if arguments_too else ():
            tensor.requires_grad_()
        values = packed_double_backward(*arguments, *along, *graph)
        found.append(torch.autograd.grad([t.square().sum() for t in values], along))
    for a, b in zip(*found, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_operator_follows_the_rules_of_torch():
    case = Case(SMALL, torch.float64, 2)
    tensors = [*case.inputs, case.gradient, *probes(case, "xYbK")]
    tensors = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(
        packed_double_backward, (*tensors, case.rowptr, case.source, case.text, ALL)
    )


REGISTERS = {"float": 168, "double": 255}
SPILLS = {"float": 16, "double": 352}  # bytes; in float64 two sets of 28 rows at L = 3
# The same with 8 radial functions, their cotangents and gradients.
RADIAL_REGISTERS = {"float": 230, "double": 255}
RADIAL_SPILLS = {"float": 0, "double": 1200}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", shipped())
def test_registers(name, architecture):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    signature = encode(shipped()[name][0])
    for n_radial, most, most_spilled in (
        (0, REGISTERS, SPILLS),
        (8, RADIAL_REGISTERS, RADIAL_SPILLS),
    ):
        for program in second_programs(signature, n_radial):
            for kernel, (stack, spills, registers) in usage(program, architecture).items():
                real = "double" if kernel.endswith("<double>") else "float"
                assert registers <= most[real], kernel
                assert max(stack, spills) <= most_spilled[real], kernel
