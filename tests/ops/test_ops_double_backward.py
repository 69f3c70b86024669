"""Second and third derivatives of the convolution, on the CPU and by the CUDA kernel run on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlip.ops import ConvolutionSignature
from mlip.ops.cpu.double_backward import packed_double_backward
from mlip.ops.cpu.library import encode, packed_convolution
from mlip.ops.cuda import compiler
from mlip.ops.cuda.double_backward import cuda_double_backward, second_programs
from tests.ops.host_cuda import BACKWARDS, FORWARDS, SHUFFLED, needs_compiler
from tests.ops.test_ops_cuda_convolution import (
    ALL_PATHS,
    UNEVEN,
    WIDE,
    Case,
    relative,
    shipped,
    usage,
)

SMALL = ConvolutionSignature((8, 8), 1, (0, 1), True)
MANY = ConvolutionSignature((130, 5), 1, (0, 1), True)  # two groups, one of two blocks of channels
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
        (UNEVEN, 4, "x"), (UNEVEN, 4, "K"),
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
def test_only_what_is_wanted(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64, 4)
    along = probes(case, "xYbK")
    whole = second(cuda_double_backward, case, along)
    for i in range(5):
        part = second(cuda_double_backward, case, along, [j == i for j in range(5)])
        assert len(part) == 1
        assert torch.equal(part[0], whole[i])


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
def test_no_edges(on_host):
    on_host()
    case = Case(UNEVEN, torch.float64)
    case.rowptr = torch.zeros_like(case.rowptr)
    case.source, case.harmonics, case.radial = case.source[:0], case.harmonics[:0], case.radial[:0]
    found = second(cuda_double_backward, case, probes(case, "xYb"))
    assert [t.shape for t in found[1:3]] == [case.harmonics.shape, case.radial.shape]
    assert not any(t.any() for t in found)


# What the tests must notice: the same text with a mistake in it.
KERNEL = "convolution_double_backward.cu"
MISTAKES = {
    "barrier after matrices": ("__syncthreads();\n      for (int t = 0", "for (int t = 0"),
    "barrier before sums over warps": (
        "__syncthreads();\n      for (int i = threadIdx.x; of", "for (int i = threadIdx.x; of",
    ),
    "barrier for some threads": (
        "__syncthreads();\n      for (int t", "if (on) __syncthreads();\n      for (int t",
    ),
    "harmonics of an earlier group lost": ("add || c_first", "c_first"),
    "harmonics of earlier channels lost": ("add || c_first", "add"),
    "other edge": ("along_matrices + t * STRIDE", "along_matrices"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(on_host, name):
    old, new = MISTAKES[name]
    assert old in compiler.source(KERNEL)
    case = Case(MANY, torch.float64)
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


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", shipped())
def test_registers(name, architecture):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    for program in second_programs(encode(shipped()[name][0])):
        for kernel, (stack, spills, registers) in usage(program, architecture).items():
            real = "double" if kernel.endswith("<double>") else "float"
            assert registers <= REGISTERS[real], kernel
            assert max(stack, spills) <= SPILLS[real], kernel
