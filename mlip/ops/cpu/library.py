"""The convolution as two PyTorch operators, ``mlip::convolution`` and its backward pass.

f(x, Y, w) is linear in each argument, with w given or w = b·K, so derivatives of any order are
again convolutions (``double_backward``). Compilers and tracers see one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.convolution import ConvolutionSignature
from mlip.ops.cpu import cache, runner
from mlip.ops.cpu.memory import empty_for

Optional = Tensor | None


def encode(signature: ConvolutionSignature) -> str:
    """Write a signature as text, because operators take tensors and simple values only."""
    return "|".join(
        (
            ",".join(map(str, signature.channels)),
            str(signature.lmax_edge),
            ",".join(map(str, signature.out_degrees)),
            str(int(signature.natural_parity)),
        )
    )


@lru_cache(maxsize=256)
def layout(text: str) -> runner.Layout:
    """Read what ``encode`` wrote."""
    channels, lmax_edge, out_degrees, natural = text.split("|")
    signature = ConvolutionSignature(
        tuple(map(int, channels.split(","))),
        int(lmax_edge),
        tuple(map(int, out_degrees.split(","))),
        natural == "1",
    )
    return runner.Layout(
        signature.channels, signature.lmax_edge, signature.paths, signature.out_channels
    )


def check_shapes(
    shape: runner.Layout,
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Optional,
    rowptr: Tensor | runner.Array,
    source: Tensor | runner.Array,
) -> None:
    """Raise an error for shapes and types with which kernels would read outside of their arrays."""
    n_nodes, n_edges = len(rowptr) - 1, len(source)
    n_radial = shape.n_weights if kernel is None else kernel.shape[0]
    _demand(
        n_nodes,
        n_edges,
        {
            "features": features.shape == (shape.feature_size(n_nodes),),
            "harmonics": harmonics.shape == (n_edges, (shape.lmax_edge + 1) ** 2),
            "weights or radial functions": radial.shape == (n_edges, n_radial),
            "kernel": kernel is None or kernel.shape[1:] == (shape.n_weights,),
            "precision": {t.dtype for t in (features, harmonics, radial, kernel) if t is not None}
            == {features.dtype},
            "index type": {str(i.dtype).removeprefix("torch.") for i in (rowptr, source)}
            == {"int64"},
        },
    )


def check_indices(rowptr: Tensor, source: Tensor) -> None:
    """Raise an error for edges that do not exist; it reads them, so not on a GPU."""
    exist = cache.loops().edges_exist(as_array(rowptr), as_array(source))
    _demand(len(rowptr) - 1, len(source), {"rowptr and source": exist})


def _demand(n_nodes: int, n_edges: int, facts: dict[str, bool]) -> None:
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise InputError(
            f"convolution of {n_nodes} atoms and {n_edges} edges: {', '.join(wrong)} do not fit; "
            "expected the shapes of mlip.ops.sum_messages, one precision, int64 indices, "
            "sources among the atoms"
        )


def atoms_exist(index: Tensor, n_atoms: int) -> bool:
    """Whether all of an index lie within 0 … n_atoms − 1."""
    return not index.numel() or (int(index.min()) >= 0 and int(index.max()) < n_atoms)


def as_array(tensor: Tensor) -> Any:
    """View a tensor on the CPU as a contiguous NumPy array, copied if it must be."""
    return tensor.detach().contiguous().numpy()


def edge_list(rowptr: Tensor, source: Tensor) -> runner.EdgeList:
    """Give edges as passes take them.

    Raises:
        InputError: an edge does not exist.
    """
    check_indices(rowptr, source)
    return runner.EdgeList(as_array(rowptr), as_array(source))


def convolve(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Optional,
    edges: runner.EdgeList,
    signature: str,
) -> Tensor:
    """Evaluate ``packed_convolution`` without derivatives, on edges that exist."""
    shape = layout(signature)
    check_shapes(shape, features, harmonics, radial, kernel, edges.rowptr, edges.source)
    out = empty_for(features, (shape.out_size(edges.n_nodes),))
    runner.forward(
        shape, as_array(features), as_array(harmonics), as_array(radial),
        None if kernel is None else as_array(kernel), edges, out.numpy(),
    )  # fmt: skip
    return out


def convolve_backward(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Optional,
    gradient: Tensor,
    edges: runner.EdgeList,
    signature: str,
    wanted: Sequence[bool],
    onto: Optional = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate ``packed_convolution_backward`` without derivatives.

    ``onto``: what the gradient of the features is added to, and returned as; default zeros.
    """
    inputs = (features, harmonics, radial, kernel)
    slopes = wanted[1] or wanted[2] or wanted[3]
    needs = (wanted[0], slopes, slopes, wanted[3] and kernel is not None)
    out = [
        empty_for(tensor, tensor.shape) if need and tensor is not None else features.new_empty(0)
        for tensor, need in zip(inputs, needs, strict=True)
    ]
    if wanted[0]:
        out[0] = torch.zeros_like(features) if onto is None else onto
    runner.backward(
        layout(signature), as_array(features), as_array(harmonics), as_array(radial),
        None if kernel is None else as_array(kernel), as_array(gradient), edges,
        runner.Gradients(*(o.numpy() if n else None for o, n in zip(out, needs, strict=True))),
    )  # fmt: skip
    for i in (1, 2):
        if not wanted[i]:
            out[i] = features.new_empty(0)
    return out[0], out[1], out[2], out[3]


@torch.library.custom_op("mlip::convolution", mutates_args=(), device_types="cpu")
def packed_convolution(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: torch.Tensor | None,
    rowptr: Tensor,
    source: Tensor,
    signature: str,
) -> Tensor:
    """Sum tensor products over neighbours; packed features as in ``runner``.

    Args:
        features: flat.
        harmonics: [E, K].
        radial: [E, n_weights], or [E, R] with a kernel.
        kernel: [R, n_weights] or None.
        rowptr: [N + 1] first edge of each atom.
        source: [E].
        signature: see ``encode``.

    Returns:
        Packed sums, flat.
    """
    edges = edge_list(rowptr, source)
    return convolve(features, harmonics, radial, kernel, edges, signature)


@torch.library.custom_op("mlip::convolution_backward", mutates_args=(), device_types="cpu")
def packed_convolution_backward(
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
    """Gradients with respect to features, harmonics, radial and kernel; empty if not wanted."""
    edges = runner.EdgeList(as_array(rowptr), as_array(source))
    return convolve_backward(
        features, harmonics, radial, kernel, gradient, edges, signature, wanted
    )


@packed_convolution.register_fake
def _(
    features: Tensor,
    harmonics: Tensor,  # noqa: ARG001
    radial: Tensor,  # noqa: ARG001
    kernel: Optional,  # noqa: ARG001
    rowptr: Tensor,
    source: Tensor,  # noqa: ARG001
    signature: str,
) -> Tensor:
    return features.new_empty(layout(signature).out_size(rowptr.shape[0] - 1))


@packed_convolution_backward.register_fake
def _(
    features: Tensor,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Optional,
    gradient: Tensor,  # noqa: ARG001
    rowptr: Tensor,  # noqa: ARG001
    source: Tensor,  # noqa: ARG001
    signature: str,  # noqa: ARG001
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        features.new_empty(tensor.shape if need and tensor is not None else 0)
        for tensor, need in zip((features, harmonics, radial, kernel), wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.signature = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Optional) -> tuple[Optional, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if gradient is None or not any(needs):
        return (None,) * 7
    features, harmonics, radial, kernel, rowptr, source = ctx.saved_tensors
    found = packed_convolution_backward(
        features, harmonics, radial, kernel, gradient, rowptr, source, ctx.signature, needs
    )
    return (*only(found, needs), None, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.signature, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
    from mlip.ops.cpu.double_backward import packed_double_backward

    *arguments, rowptr, source = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    along = [c if want else None for c, want in zip(cotangents, ctx.wanted, strict=True)]
    if not any(needs) or all(cotangent is None for cotangent in along):
        return (None,) * 9
    found = packed_double_backward(*arguments, *along, rowptr, source, ctx.signature, needs)
    return (*only(found, needs), None, None, None, None)


def only(found: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Optional, ...]:
    """Take what is needed; None for the rest."""
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


packed_convolution.register_autograd(_backward, setup_context=_setup)
packed_convolution_backward.register_autograd(_double_backward, setup_context=_setup_backward)
