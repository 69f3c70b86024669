"""The convolution through the fastest back end that can run it."""

from __future__ import annotations

from torch import Tensor

from mlip.ops.backend import CHECK_EDGES, Backend, compare, disturbed, use_kernel
from mlip.ops.convolution import (
    FEW_RADIAL,
    ConvolutionSignature,
    Features,
    convolution,
    radial_convolution,
)
from mlip.ops.neighborhood import Neighborhood

CACHED_WEIGHTS = 1 << 22


def sum_messages(
    signature: ConvolutionSignature,
    features: Features,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Tensor | None,
    neighbors: Neighborhood,
    backend: Backend = "auto",
) -> Features:
    """Sum tensor products over neighbours; the mathematics is that of ``convolution``.

    Args:
        signature: shapes and paths.
        features: [N, 2l+1, C_l] for each degree.
        harmonics: [E, (lmax_edge+1)²].
        radial: weights [E, n_weights], or radial functions [E, R] if there is a kernel.
        kernel: [R, n_weights], weights of the radial functions, or None. Weights of all edges are
            not stored where that is cheaper.
        neighbors: edges sorted by target.
        backend: ``auto`` takes the kernel of the device where it can run and has agreed with the
            definition; ``numba`` (CPU) and ``cuda`` take it unchecked; ``torch`` is plain PyTorch.

    Returns:
        [N, 2l+1, out_channels[l]] for each degree.

    Raises:
        InputError: ``numba`` or ``cuda`` was asked for and cannot run.
    """
    if kernel is not None and _multiplied_first(signature, radial, backend):
        radial, kernel = radial @ kernel, None
    tensors = [*features, harmonics, radial, *([] if kernel is None else [kernel])]

    def check() -> tuple[float, float]:
        return _compared(signature, tensors, len(features), neighbors)

    if radial.shape[0] and use_kernel(backend, signature, tensors, check):
        from mlip.ops.cpu.convolution import kernel_convolution

        return kernel_convolution(
            signature, features, harmonics, radial, kernel, neighbors.rowptr, neighbors.source
        )
    if kernel is None:
        return convolution(signature, features, harmonics, radial, neighbors)
    return radial_convolution(signature, features, harmonics, radial, kernel, neighbors)


def _multiplied_first(signature: ConvolutionSignature, radial: Tensor, backend: Backend) -> bool:
    """Whether to store the weights of all edges.

    With few radial functions, to make them anew in each pass costs less than to read them. With
    many, as behind hidden layers, it saves memory, which pays where weights leave the caches; only
    the kernels of the CPU can.
    """
    n_edges, n_radial = radial.shape
    if n_radial <= FEW_RADIAL:
        return False
    in_cache = n_edges * signature.n_weights <= CACHED_WEIGHTS
    return in_cache or backend == "torch" or radial.device.type != "cpu"


def _compared(
    signature: ConvolutionSignature, tensors: list[Tensor], n: int, neighbors: Neighborhood
) -> tuple[float, float]:
    """Errors of the kernel and of the definition on the first edges."""
    from mlip.ops.cpu.convolution import kernel_convolution

    count = min(CHECK_EDGES, tensors[n].shape[0])
    part = neighbors.first(count)

    def plain(*inputs: Tensor) -> Features:
        weights = inputs[n + 1] @ inputs[n + 2] if len(inputs) == n + 3 else inputs[n + 1]
        return convolution(signature, inputs[:n], inputs[n], weights, part)

    def fast(*inputs: Tensor) -> Features:
        last = inputs[n + 2] if len(inputs) == n + 3 else None
        return kernel_convolution(
            signature, inputs[:n], inputs[n], inputs[n + 1], last, part.rowptr, part.source
        )

    harmonics = disturbed([tensors[n][:count]])
    inputs = [*disturbed(tensors[:n]), *harmonics, tensors[n + 1][:count], *tensors[n + 2 :]]
    return compare(plain, fast, inputs)
