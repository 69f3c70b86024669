"""Second derivatives of the convolution as one operator, ``mlip::convolution_double_backward``.

F = ⟨g, f(x, Y, b, K)⟩, f the convolution, is linear in each of its five arguments: features,
harmonics, radial, kernel and the gradient g of the result. The backward pass gives its gradients by
the first four. For cotangents of these, second derivatives are gradients of

    φ = Σ_i F(argument i replaced by its cotangent)

and third ones replace two arguments. On the CPU one pass makes the terms of features, harmonics
and radial, what a force loss asks for (``second_text.py``); other terms, and all of them above
degree 4, are forward and backward passes. On CUDA see ``mlip.ops.cuda.double_backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlip.ops.backend import CHECK_EDGES, use_kernel
from mlip.ops.cpu import runner, second_runner
from mlip.ops.cpu.library import (
    as_array,
    check_indices,
    check_shapes,
    layout,
    only,
    packed_convolution,
    packed_convolution_backward,
)
from mlip.ops.cpu.memory import empty_for

Optional = Tensor | None
Arguments = tuple[Tensor, Tensor, Tensor, Optional, Tensor]
Graph = tuple[Tensor, Tensor, str]  # rowptr, source, signature
Passes = tuple[Callable[..., Tensor], Callable[..., Sequence[Tensor]]]  # forward, backward
N_ARGUMENTS = 5


class OnePass(NamedTuple):
    """Second derivatives of the convolution with an encoded signature, for `use_kernel`."""

    signature: str

    def __str__(self) -> str:
        shape = layout(self.signature)
        of = f"convolution of channels {shape.channels}, {len(shape.paths)} paths"
        return f"second derivatives of the {of}, in one pass"


def gradients(
    arguments: Sequence[Optional],
    graph: Graph,
    wanted: Sequence[bool],
    passes: Passes = (packed_convolution, packed_convolution_backward),
) -> list[Optional]:
    """Differentiate F by those of its five arguments that are wanted; None for the others."""
    forward, backward = passes
    found: list[Optional] = [None] * N_ARGUMENTS
    first = list(wanted[:4])
    if any(first):
        values = backward(*arguments, *graph, first)
        found[:4] = only(values, first)
    if wanted[4]:
        found[4] = forward(*arguments[:4], *graph)
    return found


def add(total: list[Optional], terms: Sequence[Optional]) -> None:
    """Add terms to a list, in place; None is zero."""
    for i, term in enumerate(terms):
        if term is not None:
            known = total[i]
            total[i] = term if known is None else known + term


def replaced(arguments: Sequence[Optional], i: int, value: Tensor) -> list[Optional]:
    """Put a value in the place of argument i."""
    return [*arguments[:i], value, *arguments[i + 1 :]]


def sum_of_passes(
    arguments: Arguments,
    along: Sequence[Optional],
    graph: Graph,
    wanted: Sequence[bool],
    passes: Passes = (packed_convolution, packed_convolution_backward),
) -> list[Optional]:
    """Differentiate φ by forward and backward passes, up to two for each cotangent."""
    total: list[Optional] = [None] * N_ARGUMENTS
    for i, cotangent in enumerate(along):
        if cotangent is not None:
            others = [want and i != j for j, want in enumerate(wanted)]
            add(total, gradients(replaced(arguments, i, cotangent), graph, others, passes))
    return total


def one_pass(
    arguments: Arguments,
    along: tuple[Optional, Tensor, Tensor],
    graph: Graph,
    wanted: Sequence[bool],
) -> list[Optional]:
    """Differentiate φ for cotangents of features (or None), harmonics and radial in one pass.

    Nothing is checked here: ``second_derivatives`` does.
    """
    features, harmonics, radial, kernel, gradient = arguments
    along_features, along_harmonics, along_radial = along
    rowptr, source, signature = graph
    out = [
        empty_for(argument, argument.shape) if want and argument is not None else None
        for argument, want in zip(arguments, wanted, strict=True)
    ]
    if out[0] is not None:
        out[0].zero_()
    second_runner.second_derivatives(
        layout(signature), as_array(features), as_array(harmonics), as_array(radial),
        None if kernel is None else as_array(kernel), as_array(gradient),
        None if along_features is None else as_array(along_features), as_array(along_harmonics),
        as_array(along_radial), runner.EdgeList(as_array(rowptr), as_array(source)),
        second_runner.Second(*(None if tensor is None else tensor.numpy() for tensor in out)),
    )  # fmt: skip
    return out


def agrees(arguments: Arguments, graph: Graph) -> bool:
    """Whether one pass gives what the passes do that a back end has checked; looked at once."""
    return use_kernel(
        "auto",
        OnePass(graph[2]),
        [tensor for tensor in arguments if tensor is not None],
        lambda: _difference(arguments, graph),
        otherwise="several passes",
    )


def _difference(arguments: Arguments, graph: Graph) -> float:
    """Compare for random numbers, of which no derivative vanishes, on the first edges."""
    rowptr, source, signature = graph
    count = min(CHECK_EDGES, len(source))
    part = (rowptr.clamp(max=count), source[:count], signature)
    generator = torch.Generator().manual_seed(0)

    def random(i: int) -> Optional:
        tensor = arguments[i]
        if tensor is None:
            return None
        shape = (count, *tensor.shape[1:]) if i in (1, 2) else tensor.shape
        return torch.randn(shape, generator=generator, dtype=tensor.dtype)

    given = tuple(random(i) for i in range(N_ARGUMENTS))
    along = (random(0), random(1), random(2))
    wanted = [tensor is not None for tensor in given]
    one = one_pass(given, along, part, wanted)  # type: ignore[arg-type]
    pairs = zip(one, sum_of_passes(given, (*along, None), part, wanted), strict=True)  # type: ignore[arg-type]
    found = [(a, b) for a, b in pairs if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in found)


def second_derivatives(
    arguments: Arguments,
    along: Sequence[Optional],
    graph: Graph,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``packed_double_backward`` on the CPU."""
    of_features, of_harmonics, of_radial, of_kernel = along
    covered = second_runner.covers(layout(graph[2]))
    if covered and of_harmonics is not None and of_radial is not None:
        first = (of_features, of_harmonics, of_radial)
        _check(arguments, first, graph)  # what does not fit must not count as a fault of the pass
        if len(graph[1]) and agrees(arguments, graph):  # without edges nothing can be compared
            total = one_pass(arguments, first, graph, wanted)
            add(total, sum_of_passes(arguments, (None, None, None, of_kernel), graph, wanted))
            return filled(arguments, total, wanted)
    return filled(arguments, sum_of_passes(arguments, along, graph, wanted), wanted)


def _check(arguments: Arguments, along: tuple[Optional, Tensor, Tensor], graph: Graph) -> None:
    features, harmonics, radial, kernel, _ = arguments
    rowptr, source, signature = graph
    check_indices(rowptr, source)
    changed = features if along[0] is None else along[0]
    for tensors in ((features, harmonics, radial), (changed, *along[1:])):
        check_shapes(layout(signature), *tensors, kernel, rowptr, source)


@torch.library.custom_op("mlip::convolution_double_backward", mutates_args=(), device_types="cpu")
def packed_double_backward(
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
    """Differentiate the gradients of the convolution.

    Args:
        features, harmonics, radial, kernel, rowptr, source, signature: of the convolution.
        gradient: g, of its result.
        along_features, along_harmonics, along_radial, along_kernel: cotangents of the gradients by
            these, or None.
        wanted: whether to differentiate by features, harmonics, radial, kernel and g.

    Returns:
        Gradients of φ by the five; empty if not wanted.
    """
    arguments = (features, harmonics, radial, kernel, gradient)
    along = (along_features, along_harmonics, along_radial, along_kernel)
    return second_derivatives(arguments, along, (rowptr, source, signature), wanted)


def filled(
    arguments: Arguments, total: Sequence[Optional], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Put zeros for what is wanted and nothing contributes to, empty tensors for the rest."""
    return tuple(  # type: ignore[return-value]
        arguments[0].new_empty(0)
        if argument is None or not want
        else argument.new_zeros(argument.shape)
        if value is None
        else value
        for argument, value, want in zip(arguments, total, wanted, strict=True)
    )


@packed_double_backward.register_fake
def _(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Optional,
    gradient: Tensor,
    along_features: Optional,  # noqa: ARG001
    along_harmonics: Optional,  # noqa: ARG001
    along_radial: Optional,  # noqa: ARG001
    along_kernel: Optional,  # noqa: ARG001
    rowptr: Tensor,  # noqa: ARG001
    source: Tensor,  # noqa: ARG001
    signature: str,  # noqa: ARG001
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    arguments = (features, harmonics, radial, kernel, gradient)
    return tuple(
        features.new_empty(tensor.shape if want and tensor is not None else 0)
        for tensor, want in zip(arguments, wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.signature, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
    *tensors, rowptr, source = ctx.saved_tensors
    arguments, along = tensors[:N_ARGUMENTS], tensors[N_ARGUMENTS:]
    needs = ctx.needs_input_grad
    of_arguments: list[Optional] = [None] * N_ARGUMENTS
    of_along: list[Optional] = [None] * len(along)
    for i, first in enumerate(along):
        for j, second in enumerate(cotangents):
            if first is None or second is None or i == j or not ctx.wanted[j]:
                continue
            if arguments[i] is None or arguments[j] is None:
                continue
            terms = gradients(
                replaced(replaced(arguments, i, first), j, second),
                (rowptr, source, ctx.signature),
                [k != j and needs[N_ARGUMENTS + i if k == i else k] for k in range(N_ARGUMENTS)],
            )
            add(of_along, [terms[i] if k == i else None for k in range(len(along))])
            terms[i] = None
            add(of_arguments, terms)
    return (*of_arguments, *of_along, None, None, None, None)


packed_double_backward.register_autograd(_backward, setup_context=_setup)
