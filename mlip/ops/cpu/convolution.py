"""The convolution by kernels, in the features of the models: one tensor for each degree."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mlip.ops.convolution import ConvolutionSignature, Features
from mlip.ops.cpu.library import encode, packed_convolution
from mlip.ops.cpu.runner import BLOCK


def kernel_convolution(
    signature: ConvolutionSignature,
    features: Features,
    harmonics: Tensor,
    radial: Tensor,
    kernel: Tensor | None,
    rowptr: Tensor,
    source: Tensor,
) -> Features:
    """Evaluate ``mlip.ops.convolution``, or ``radial_convolution`` if there is a kernel.

    Args:
        signature: shapes and paths.
        features: [N, 2l+1, C_l] for each degree.
        harmonics: [E, (lmax_edge+1)²].
        radial: weights [E, n_weights], or radial functions [E, R].
        kernel: None, or [R, n_weights].
        rowptr: [N + 1] first edge of each target, int64.
        source: [E] int64.

    Returns:
        [N, 2l+1, out_channels[l]] for each degree.
    """
    if features[0].device.type == "cuda":
        from mlip.ops.cuda import convolution, double_backward  # noqa: F401  they register kernels

        block = 1
    else:
        block = BLOCK[str(features[0].dtype).removeprefix("torch.")]
    padded = replace(signature, channels=tuple(-(-n // block) * block for n in signature.channels))
    if padded.channels != signature.channels:
        features = tuple(
            _pad(x, n - x.shape[2]) for x, n in zip(features, padded.channels, strict=True)
        )
        if kernel is None:
            radial = _pad_paths(signature, padded, radial)
        else:
            kernel = _pad_paths(signature, padded, kernel)
    flat = (
        torch.cat([x.flatten() for x in features]) if len(features) > 1 else features[0].flatten()
    )
    out = packed_convolution(flat, harmonics, radial, kernel, rowptr, source, encode(padded))
    n_nodes = rowptr.shape[0] - 1
    sizes = [n_nodes * (2 * i + 1) * n for i, n in enumerate(padded.out_channels)]
    sums = tuple(
        part.view(n_nodes, 2 * i + 1, n)
        for i, (part, n) in enumerate(zip(out.split(sizes), padded.out_channels, strict=True))
    )
    return sums if padded.channels == signature.channels else _cut(signature, padded, sums)


def _pad(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, n)) if n else x


def _pad_paths(
    signature: ConvolutionSignature, padded: ConvolutionSignature, weights: Tensor
) -> Tensor:
    """Pad the channels of every path of weights or of a kernel."""
    parts = weights.split([signature.channels[l1] for l1, _, _ in signature.paths], dim=1)
    return torch.cat(
        [
            _pad(part, padded.channels[l1] - part.shape[1])
            for part, (l1, _, _) in zip(parts, signature.paths, strict=True)
        ],
        dim=1,
    ) if parts else weights  # fmt: skip


def _cut(signature: ConvolutionSignature, padded: ConvolutionSignature, sums: Features) -> Features:
    """Take the channels that are not padding."""
    out = []
    for degree, x in enumerate(sums):
        sources = [l1 for l1, _, l3 in signature.paths if l3 == degree]
        parts = x.split([padded.channels[l1] for l1 in sources], dim=2)
        cut = [
            part[:, :, : signature.channels[l1]]
            for part, l1 in zip(parts, sources, strict=True)
        ]  # fmt: skip
        out.append(torch.cat(cut, dim=2) if cut else x)
    return tuple(out)
