"""The convolution on CUDA: launches of ``kernels/convolution.cu``, one for each input degree.

Kernels of the operators ``mlip::convolution`` and ``mlip::convolution_backward``, which are
declared and differentiated in ``mlip.ops.cpu.library``. Any number of channels. Weights are made
from up to 16 radial functions as they are needed; with more they are stored, [E, n_weights]. The
gradient by the kernel, and degrees above 4, go through ``convolution_tables``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mlip.ops.convolution import FEW_RADIAL, HIGHEST_WRITTEN_OUT
from mlip.ops.cpu.library import (
    check_shapes,
    layout,
    packed_convolution,
    packed_convolution_backward,
)
from mlip.ops.cpu.runner import Layout
from mlip.ops.cuda import convolution_tables as tables
from mlip.ops.cuda.convolution_table import Group
from mlip.ops.cuda.program import Program
from mlip.ops.cuda.slots import slots

Gradients = tuple[Tensor | None, ...]
SUM_BLOCK = 128  # threads of ``sum_of_sources``


class GroupProgram:
    """Kernels of the paths with one input degree."""

    def __init__(self, shape: Layout, degree: int, n_radial: int) -> None:
        self.group = Group(shape, degree, n_radial)
        self.program = Program("convolution.cu", {"convolution_table.h": self.group.text()})


@lru_cache(maxsize=256)
def programs(signature: str, n_radial: int) -> tuple[GroupProgram, ...]:
    """The kernels of all input degrees; compiled when they are first launched."""
    shape = layout(signature)
    return tuple(GroupProgram(shape, degree, n_radial) for degree in shape.degrees)


def written_out(shape: Layout) -> bool:
    """Whether products are code, not tables; code goes through all harmonics, used or not."""
    return max([shape.lmax_edge, *(max(path) for path in shape.paths)]) <= HIGHEST_WRITTEN_OUT


def table_inputs(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Tensor | None,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
) -> tables.Inputs:
    """What kernels with tables take; weights are stored only where radial functions do not fit."""
    if kernel is not None and not tables.fits(signature, len(kernel), features.element_size()):
        radial, kernel = radial @ kernel, None
    return tables.Inputs(
        features.contiguous(), harmonics.contiguous(), radial.contiguous(),
        None if kernel is None else kernel.contiguous(), rowptr.contiguous(), source.contiguous(),
    )  # fmt: skip


def stored_if_many(radial: Tensor, kernel: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Radial functions and kernel if they are few, else weights [E, n_weights] and None."""
    if kernel is None or 0 < len(kernel) <= FEW_RADIAL:
        return radial, kernel
    return radial @ kernel, None


@packed_convolution.register_kernel("cuda")
def convolve(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: torch.Tensor | None,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
) -> Tensor:
    """Kernel of ``mlip::convolution``."""
    shape = layout(signature)
    check_shapes(shape, features, harmonics, radial, kernel, rowptr, source)
    if not written_out(shape):
        arguments = (features, harmonics, radial, kernel, rowptr, source, signature)
        return tables.forward(table_inputs(*arguments), signature)
    n_atoms = len(rowptr) - 1
    out = features.new_empty(shape.out_size(n_atoms))
    radial, kernel = stored_if_many(radial, kernel)
    given = (
        features.contiguous(), harmonics.contiguous(), radial.contiguous(),
        radial if kernel is None else kernel.contiguous(), rowptr.contiguous(),
        source.contiguous(), out, n_atoms,
    )  # fmt: skip
    for each in programs(signature, 0 if kernel is None else len(kernel)):
        group = each.group
        each.program.launch(
            "convolution_forward", features.dtype,
            (n_atoms, -(-group.channels // group.block)), group.block,
            group.shared_bytes(features.element_size(), backward=False), given,
        )  # fmt: skip
    return out


@packed_convolution_backward.register_kernel("cuda")
def convolve_backward(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: torch.Tensor | None,
    gradient: Tensor,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of ``mlip::convolution_backward``."""
    shape = layout(signature)
    check_shapes(shape, features, harmonics, radial, kernel, rowptr, source)
    arguments = (features, harmonics, radial, kernel, gradient, rowptr, source, signature)
    passes = _backward_written_out if written_out(shape) else _backward_of_tables
    return tuple(  # type: ignore[return-value]
        tensor if want and tensor is not None else features.new_empty(0)
        for tensor, want in zip(passes(*arguments, wanted), wanted, strict=True)
    )


def _backward_of_tables(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Tensor | None,
    gradient: Tensor,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
    wanted: Sequence[bool],
) -> Gradients:
    inputs = table_inputs(features, harmonics, radial, kernel, rowptr, source, signature)
    gradient = gradient.contiguous()
    if (inputs.kernel is None) == (kernel is None):
        return tables.backward(inputs, gradient, signature, wanted)
    needs = [*wanted[:2], wanted[2] or wanted[3], False]
    of_features, of_harmonics, of_weights, _ = tables.backward(inputs, gradient, signature, needs)
    return (of_features, of_harmonics, *_of_radial(of_weights, radial, kernel, wanted))


def _backward_written_out(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Tensor | None,
    gradient: Tensor,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
    wanted: Sequence[bool],
) -> Gradients:
    weights, fused = stored_if_many(radial, kernel)
    edges = wanted[1] or wanted[2] or (wanted[3] and fused is None)
    empty = features.new_empty(0)
    of_features = features.new_zeros(features.shape) if wanted[0] else empty
    of_harmonics = harmonics.new_zeros(harmonics.shape) if edges else empty
    of_weights = weights.new_empty(weights.shape) if edges else empty
    inputs = (
        features.contiguous(), harmonics.contiguous(), weights.contiguous(),
        empty if fused is None else fused.contiguous(), gradient.contiguous(), rowptr.contiguous(),
        source.contiguous(),
    )  # fmt: skip
    each_degree = programs(signature, 0 if fused is None else len(fused))
    for i, each in enumerate(each_degree):
        _launch_backward(each, inputs, of_features, of_harmonics, of_weights, i > 0)
    if not each_degree:
        of_weights.zero_()
    if fused is None:
        return (of_features, of_harmonics, *_of_radial(of_weights, radial, kernel, wanted))
    of_kernel = None
    if wanted[3]:
        arguments = (features, harmonics, radial, fused, rowptr, source, signature)
        of_kernel = tables.gradient_by_kernel(table_inputs(*arguments), inputs[4], signature)
    return of_features, of_harmonics, of_weights, of_kernel


def _of_radial(
    of_weights: Tensor | None, radial: Tensor, kernel: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Take gradients by weights w = b·K to those by radial functions and kernel."""
    if kernel is None or of_weights is None:
        return of_weights, None
    return (
        of_weights @ kernel.T if wanted[2] else None,
        radial.T @ of_weights if wanted[3] else None,
    )


def _launch_backward(
    each: GroupProgram,
    inputs: tuple[Tensor, ...],
    of_features: Tensor,
    of_harmonics: Tensor,
    of_weights: Tensor,
    add: bool,
) -> None:
    """Write the gradients of one input degree."""
    group, (features, *_, source) = each.group, inputs
    n_atoms, dtype = len(inputs[5]) - 1, features.dtype
    want_features, want_edges = bool(of_features.numel()), bool(of_harmonics.numel())
    if not want_features and not want_edges:
        return
    width = (2 * group.degree + 1) * group.channels
    of_edges = features.new_empty(len(source) * width if want_features else 0)
    each.program.launch(
        "convolution_backward", dtype, (n_atoms,), group.block,
        group.shared_bytes(features.element_size(), backward=True),
        (
            *inputs, of_edges, of_harmonics, of_weights, n_atoms, int(want_features),
            int(want_edges), int(add),
        ),
    )  # fmt: skip
    if want_features:
        sum_of_sources(each, of_edges, source, of_features, n_atoms)


def sum_of_sources(
    each: GroupProgram, of_edges: Tensor, source: Tensor, of_features: Tensor, n_atoms: int
) -> None:
    """Sum gradients of edges, [E, 2l+1, C] of one degree, into the packed ones of their sources."""
    group = each.group
    width = (2 * group.degree + 1) * group.channels
    each.program.launch(
        "sum_of_sources", of_features.dtype, (-(-n_atoms * width // SUM_BLOCK),), SUM_BLOCK, 0,
        (of_edges, *slots(source, n_atoms), of_features, n_atoms),
    )  # fmt: skip
