"""Second derivatives of the convolution on CUDA: launches of ``convolution_double_backward.cu``.

Kernel of the operator ``mlip::convolution_double_backward``, declared and differentiated in
``mlip.ops.cpu.double_backward``. One launch for each input degree, and a sum over the edges that
leave an atom. Weights made from up to 16 radial functions, w = b·K, are made as they are needed,
and the gradient by K goes through ``convolution_tables``; with more functions weights and their
derivatives are stored, [E, n_weights]. Terms of cotangents of the gradient by K, which no loss of
forces has, and other derivatives than by K above degree 4 are forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from mlip.ops.convolution import FEW_RADIAL
from mlip.ops.cpu.double_backward import (
    N_ARGUMENTS,
    Arguments,
    Graph,
    add,
    filled,
    packed_double_backward,
    sum_of_passes,
)
from mlip.ops.cpu.library import check_shapes, layout
from mlip.ops.cuda import convolution_tables as tables
from mlip.ops.cuda.convolution import (
    GroupProgram,
    convolve,
    convolve_backward,
    programs,
    sum_of_sources,
    table_inputs,
    written_out,
)
from mlip.ops.cuda.program import Program

Optional = Tensor | None
PASSES = (convolve, convolve_backward)


@lru_cache(maxsize=256)
def second_programs(signature: str, n_radial: int) -> tuple[Program, ...]:
    """The kernel of each input degree; compiled when it is first launched."""
    return tuple(
        Program("convolution_double_backward.cu", {"convolution_table.h": each.group.text()})
        for each in programs(signature, n_radial)
    )


@packed_double_backward.register_kernel("cuda")
def cuda_double_backward(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: torch.Tensor | None,
    gradient: Tensor,
    along_features: torch.Tensor | None,
    along_harmonics: torch.Tensor | None,
    along_radial: torch.Tensor | None,
    along_kernel: torch.Tensor | None,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of ``mlip::convolution_double_backward``."""
    arguments = (features, harmonics, radial, kernel, gradient)
    along = (along_features, along_harmonics, along_radial, along_kernel)
    graph = (rowptr, source, signature)
    if written_out(layout(signature)):
        return second_derivatives(arguments, along, graph, wanted)
    check_shapes(layout(signature), *arguments[:4], rowptr, source)
    return filled(arguments, _several_passes(arguments, along, graph, wanted), wanted)


def second_derivatives(
    arguments: Arguments,
    along: Sequence[Optional],
    graph: Graph,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``packed_double_backward`` without derivatives, up to degree 4."""
    kernel, (rowptr, source, signature) = arguments[3], graph
    check_shapes(layout(signature), *arguments[:4], rowptr, source)
    *first, along_kernel = along
    total: list[Optional] = [None] * N_ARGUMENTS
    if any(cotangent is not None for cotangent in first):
        many = kernel is not None and not 0 < len(kernel) <= FEW_RADIAL
        run = _with_stored_weights if many else _one_pass
        total = run(arguments, first, graph, wanted)
    if along_kernel is not None:
        alone = (None, None, None, along_kernel)
        add(total, sum_of_passes(arguments, alone, graph, wanted, PASSES))
    return filled(arguments, total, wanted)


def _several_passes(
    arguments: Arguments, along: Sequence[Optional], graph: Graph, wanted: Sequence[bool]
) -> list[Optional]:
    """Differentiate φ by forward and backward passes, by a kernel that fits in one launch."""
    kernel, gradient = arguments[3:]
    fits = kernel is not None and tables.fits(graph[2], len(kernel), gradient.element_size())
    once = wanted[3] and fits
    others = [*wanted[:3], wanted[3] and not once, wanted[4]]
    total = sum_of_passes(arguments, along, graph, others, PASSES)
    if once:
        total[3] = _by_kernel(arguments, along[:3], graph)
    return total


def _one_pass(
    arguments: Arguments, along: Sequence[Optional], graph: Graph, wanted: Sequence[bool]
) -> list[Optional]:
    """Differentiate φ for cotangents of features, harmonics and radial; a kernel has few rows."""
    found = _launches(arguments, along, graph, [*wanted[:3], False, wanted[4]])
    by_kernel = wanted[3] and arguments[3] is not None
    of_kernel = _by_kernel(arguments, along, graph) if by_kernel else None
    return [*found[:3], of_kernel, found[4]]


def _by_kernel(arguments: Arguments, along: Sequence[Optional], graph: Graph) -> Optional:
    """Gradient by the kernel for cotangents of features, harmonics and radial; None: it is zero."""
    features, harmonics, radial = along
    if features is None and harmonics is None and radial is None:
        return None
    inputs = table_inputs(*arguments[:4], *graph)
    cotangents = replace(
        inputs,
        features=inputs.features.new_empty(0) if features is None else features.contiguous(),
        harmonics=_filled(inputs.harmonics, harmonics),
        radial=_filled(inputs.radial, radial),
    )
    return tables.gradient_by_kernel(inputs, arguments[4].contiguous(), graph[2], cotangents)


def _filled(tensor: Tensor, cotangent: Optional) -> Tensor:
    return tensor.new_zeros(tensor.shape) if cotangent is None else cotangent.contiguous()


def _with_stored_weights(
    arguments: Arguments, along: Sequence[Optional], graph: Graph, wanted: Sequence[bool]
) -> list[Optional]:
    """Do the same for many radial functions: weights and their derivatives are [E, n_weights]."""
    features, harmonics, radial, kernel, gradient = arguments
    along_radial, of_radial, of_kernel = along[2], None, None
    assert kernel is not None
    along_weights = None if along_radial is None else along_radial @ kernel
    of_features, of_harmonics, second, first, of_gradient = _launches(
        (features, harmonics, radial @ kernel, None, gradient),
        (*along[:2], along_weights),
        graph,
        [*wanted[:2], wanted[2] or wanted[3], wanted[3] and along_radial is not None, wanted[4]],
    )
    if wanted[2]:
        of_radial = second @ kernel.T
    if wanted[3]:
        of_kernel = radial.T @ second
        if along_radial is not None:
            of_kernel = of_kernel + along_radial.T @ first
    return [of_features, of_harmonics, of_radial, of_kernel, of_gradient]


def _launches(
    arguments: Arguments, along: Sequence[Optional], graph: Graph, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Launch the kernel of each input degree.

    Args:
        arguments: features, harmonics, radial, kernel and gradient; without kernel, radial holds
            weights.
        along: cotangents of the first three.
        graph: rowptr, source, signature.
        wanted: whether to differentiate by features, harmonics and radial, to make first
            derivatives by weights, and to differentiate by the gradient.

    Returns:
        These five; empty if not wanted.
    """
    features, harmonics, radial, kernel, gradient = arguments
    rowptr, source, signature = graph
    n_radial, empty = 0 if kernel is None else len(kernel), features.new_empty(0)
    found = (  # features of degrees without paths stay zero
        features.new_zeros(features.shape) if wanted[0] else empty,
        harmonics.new_zeros(harmonics.shape) if wanted[1] else empty,
        radial.new_empty(radial.shape) if wanted[2] else empty,
        radial.new_empty(radial.shape) if wanted[3] else empty,
        gradient.new_empty(gradient.shape) if wanted[4] else empty,
    )
    inputs = [
        empty if tensor is None else tensor.contiguous()
        for tensor in (features, harmonics, radial, kernel, gradient, *along, rowptr, source)
    ]
    pairs = zip(second_programs(signature, n_radial), programs(signature, n_radial), strict=True)
    for i, (second, each) in enumerate(pairs if any(wanted) else ()):
        _launch(second, each, inputs, found, i > 0)
    if not layout(signature).degrees:
        found[2].zero_()
    return found


def _launch(
    second: Program, each: GroupProgram, inputs: list[Tensor], found: tuple[Tensor, ...], add_: bool
) -> None:
    """Write the second derivatives of the paths with one input degree."""
    group, (features, *_, rowptr, source) = each.group, inputs
    of_features, *rest = found
    n_atoms, width = len(rowptr) - 1, (2 * group.degree + 1) * group.channels
    of_edges = features.new_empty(len(source) * width if of_features.numel() else 0)
    second.launch(
        "convolution_double_backward", features.dtype, (n_atoms,), group.block,
        group.second_shared_bytes(features.element_size()),
        (*inputs, of_edges, *rest, n_atoms, int(add_)),
    )  # fmt: skip
    if of_features.numel():
        sum_of_sources(each, of_edges, source, of_features, n_atoms)
