"""Second derivatives of the convolution on CUDA: launches of ``convolution_double_backward.cu``.

Kernel of the operator ``mlip::convolution_double_backward``, declared and differentiated in
``mlip.ops.cpu.double_backward``. One launch for each input degree, and a sum over the edges that
leave an atom. Weights made from radial functions, w = b·K, and their derivatives are stored,
[E, n_weights]. Above degree 4 second derivatives are sums of first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mlip.ops.cpu.double_backward import (
    Arguments,
    Graph,
    add,
    filled,
    packed_double_backward,
    sum_of_passes,
)
from mlip.ops.cpu.library import check_shapes, layout
from mlip.ops.cuda.convolution import (
    GroupProgram,
    convolve,
    convolve_backward,
    programs,
    sum_of_sources,
    written_out,
)
from mlip.ops.cuda.program import Program

Optional = Tensor | None


@lru_cache(maxsize=256)
def second_programs(signature: str) -> tuple[Program, ...]:
    """The kernel of each input degree; compiled when it is first launched."""
    return tuple(
        Program("convolution_double_backward.cu", {"convolution_table.h": each.group.text()})
        for each in programs(signature, 0)
    )


@dataclass(frozen=True)
class Weights:
    """Weights of edges, and what their derivatives mean for radial functions and kernel.

    given, along: w and its cotangent, [E, n_weights].
    """

    radial: Tensor
    kernel: Optional
    along_radial: Optional
    along_kernel: Optional

    def given(self) -> Tensor:
        """w = b·K."""
        return self.radial if self.kernel is None else self.radial @ self.kernel

    def along(self) -> Optional:
        """w' = b'·K + b·K'."""
        if self.kernel is None:
            return self.along_radial
        total: list[Optional] = [None]
        if self.along_radial is not None:
            add(total, [self.along_radial @ self.kernel])
        if self.along_kernel is not None:
            add(total, [self.radial @ self.along_kernel])
        return total[0]

    def derivatives(
        self, first: Tensor, second: Tensor, wanted: Sequence[bool]
    ) -> tuple[Optional, Optional]:
        """Take first and second derivatives by weights to those by radial functions and kernel."""
        if self.kernel is None:
            return second, None
        of_radial: list[Optional] = [None]
        of_kernel: list[Optional] = [None]
        if wanted[0]:
            add(of_radial, [second @ self.kernel.T])
            if self.along_kernel is not None:
                add(of_radial, [first @ self.along_kernel.T])
        if wanted[1]:
            add(of_kernel, [self.radial.T @ second])
            if self.along_radial is not None:
                add(of_kernel, [self.along_radial.T @ first])
        return of_radial[0], of_kernel[0]


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
    passes = (convolve, convolve_backward)
    return filled(arguments, sum_of_passes(arguments, along, graph, wanted, passes), wanted)


def second_derivatives(
    arguments: Arguments,
    along: Sequence[Optional],
    graph: Graph,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``packed_double_backward`` in one pass, without derivatives."""
    features, harmonics, radial, kernel, gradient = arguments
    rowptr, source, signature = graph
    shape = layout(signature)
    check_shapes(shape, features, harmonics, radial, kernel, rowptr, source)
    weights = Weights(radial, kernel, *along[2:])
    empty = features.new_empty(0)

    given = weights.given()
    of_any_weight = wanted[2] or wanted[3]
    of_weights = given.new_empty(given.shape) if of_any_weight else empty
    of_slopes = given.new_empty(given.shape) if of_any_weight and kernel is not None else empty
    found = (  # features of degrees without paths stay zero
        features.new_zeros(features.shape) if wanted[0] else empty,
        harmonics.new_zeros(harmonics.shape) if wanted[1] else empty,
        of_weights,
        of_slopes,
        gradient.new_empty(gradient.shape) if wanted[4] else empty,
    )
    inputs = [
        empty if tensor is None else tensor.contiguous()
        for tensor in (
            features, harmonics, given, gradient, along[0], along[1], weights.along(), rowptr,
            source,
        )
    ]  # fmt: skip
    for i, (second, each) in enumerate(
        zip(second_programs(signature), programs(signature, 0), strict=True)
    ):
        _launch(second, each, inputs, found, i > 0)
    of_radial, of_kernel = weights.derivatives(of_slopes, of_weights, wanted[2:4])
    return filled(arguments, (found[0], found[1], of_radial, of_kernel, found[4]), wanted)


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
