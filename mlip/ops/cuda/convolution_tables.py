"""The convolution of any degrees on CUDA: launches of ``kernels/convolution_tables.cu``.

Gradients by the kernel of radial functions are those of ``kernels/convolution_kernel_gradient.cu``.

One module a precision serves all sets of products. Weights are made from radial functions as they
are needed, in both directions, if a tile of edges fits in shared memory with them: no memory grows
with edges × paths × channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.cpu.library import layout
from mlip.ops.cuda.convolution_table import LARGEST_BLOCK, SHARED_BYTES
from mlip.ops.cuda.program import Program, whole_warps
from mlip.ops.cuda.slots import slots
from mlip.ops.cuda.table_plan import TablePlan, tabulate

PROGRAM = Program("convolution_tables.cu", {})
KERNEL_PROGRAM = Program("convolution_kernel_gradient.cu", {})
BLOCKS = (128, 64, 32)  # threads
TILES = (32, 16)  # edges in shared memory at a time
COPIES = 64  # partial sums of the gradient by a kernel; fixed, so that bits depend on no device


@dataclass(frozen=True)
class Inputs:
    """Arguments of a convolution, contiguous; kernel: None if ``radial`` holds weights."""

    features: Tensor
    harmonics: Tensor
    radial: Tensor
    kernel: Tensor | None
    rowptr: Tensor
    source: Tensor

    @property
    def n_atoms(self) -> int:
        """Atoms, which may have no edges."""
        return len(self.rowptr) - 1

    @property
    def n_radial(self) -> int:
        """Radial functions; 0 if weights are given."""
        return 0 if self.kernel is None else len(self.kernel)

    @property
    def weights_of_radial(self) -> Tensor:
        """The kernel, or a null pointer."""
        return self.radial.new_empty(0) if self.kernel is None else self.kernel


@dataclass(frozen=True)
class Sizes:
    """Threads of a block, edges of a tile, bytes of shared memory."""

    block: int
    tile: int
    shared: int


@lru_cache(maxsize=1024)
def plan(signature: str, degree: int, backward: bool) -> TablePlan:
    """The tables of one input degree; see ``table_plan.tabulate``."""
    return tabulate(layout(signature), degree, backward)


@lru_cache(maxsize=1024)
def _tables(
    signature: str, degree: int, backward: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same on a device: integers, and factors in one precision."""
    found = plan(signature, degree, backward)
    with torch.inference_mode(False), torch.no_grad():
        table = torch.from_numpy(found.table).to(device)
        return table, torch.from_numpy(found.factors).to(device, dtype)


def sum_sizes(found: TablePlan, channels: int, n_radial: int, itemsize: int) -> Sizes:
    """Of ``table_sums``: harmonics, radial functions, weights, and the sums."""
    each = found.n_slots + n_radial
    return _sizes(
        channels, itemsize, lambda block, tile: tile * (each + block) + found.n_rows * block
    )


def slope_sizes(found: TablePlan, channels: int, n_radial: int, itemsize: int) -> Sizes:
    """Of ``table_slopes``: two numbers a thread and edge, and sums of each warp."""
    each = found.n_slots + n_radial
    return _sizes(
        channels, itemsize, lambda block, tile: tile * (each + each * block // 32 + 2 * block)
    )


def kernel_sizes(found: TablePlan, channels: int, n_radial: int, itemsize: int) -> Sizes:
    """Of ``table_kernel_slopes``: a slope for each thread and edge, and the sums."""
    return _kernel_sizes(found, channels, n_radial, itemsize, 1)


def second_kernel_sizes(found: TablePlan, channels: int, n_radial: int, itemsize: int) -> Sizes:
    """Of ``table_kernel_second``: the same with tiles of the edges and of their cotangents."""
    return _kernel_sizes(found, channels, n_radial, itemsize, 2)


def _kernel_sizes(
    found: TablePlan, channels: int, n_radial: int, itemsize: int, tiles: int
) -> Sizes:
    each = found.n_slots + n_radial
    return _sizes(
        channels,
        itemsize,
        lambda block, tile: tiles * tile * (each + block) + n_radial * block,
        tiles,
    )


def _sizes(
    channels: int, itemsize: int, numbers: Callable[[int, int], int], tiles: int = 1
) -> Sizes:
    """Choose a tile, then a block; ``numbers`` is what they need in shared memory."""
    for tile in TILES:
        for block in BLOCKS:
            shared = 16 * tile * tiles + itemsize * numbers(block, tile)
            if block <= whole_warps(channels, LARGEST_BLOCK) and shared <= SHARED_BYTES:
                return Sizes(block, tile, shared)
    raise InputError(f"{channels} channels: {TILES[-1]} edges do not fit in shared memory")


def fits(signature: str, n_radial: int, itemsize: int) -> bool:
    """Whether weights can be made from so many radial functions inside of the kernels."""
    if not n_radial:
        return False
    shape = layout(signature)
    try:
        for degree in shape.degrees:
            channels = shape.channels[degree]
            for backward in (False, True):
                sum_sizes(plan(signature, degree, backward), channels, n_radial, itemsize)
            for sizes in (slope_sizes, second_kernel_sizes):
                sizes(plan(signature, degree, False), channels, n_radial, itemsize)
    except InputError:
        return False
    return True


def forward(inputs: Inputs, signature: str) -> Tensor:
    """Evaluate ``mlip::convolution``: packed sums."""
    shape = layout(signature)
    out = inputs.features.new_empty(shape.out_size(inputs.n_atoms))
    edges = (inputs.rowptr, inputs.features.new_empty(0), inputs.source)
    for degree in shape.degrees:
        _launch_sums(inputs, inputs.features, edges, out, (signature, degree, False))
    return out


def gradient_by_features(inputs: Inputs, gradient: Tensor, signature: str) -> Tensor:
    """Sum over the edges that leave an atom; zero for degrees without paths."""
    of_features = inputs.features.new_zeros(inputs.features.shape)
    order, first = slots(inputs.source, inputs.n_atoms)
    target = torch.repeat_interleave(inputs.rowptr.diff(), output_size=len(inputs.source))
    for degree in layout(signature).degrees:
        edges = (first, order, target)
        _launch_sums(inputs, gradient, edges, of_features, (signature, degree, True))
    return of_features


def _launch_sums(
    inputs: Inputs,
    rows: Tensor,
    edges: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    which: tuple[str, int, bool],
) -> None:
    """Write sums over the edges of atoms: first of each, their order, atoms at the other end."""
    signature, degree, _ = which
    channels, found = layout(signature).channels[degree], plan(*which)
    sizes = sum_sizes(found, channels, inputs.n_radial, rows.element_size())
    PROGRAM.launch(
        "table_sums", rows.dtype,
        (inputs.n_atoms, found.n_owners, -(-channels // sizes.block)), sizes.block, sizes.shared,
        (
            rows, inputs.harmonics, inputs.radial, inputs.weights_of_radial,
            *_tables(*which, rows.dtype, rows.device), *edges, out,
            *_numbers(inputs, signature, sizes, found), channels, found.n_rows,
        ),
    )  # fmt: skip


def _numbers(inputs: Inputs, signature: str, sizes: Sizes, found: TablePlan) -> tuple[int, ...]:
    """Numbers that all kernels take."""
    return (
        inputs.n_atoms, inputs.harmonics.shape[1], layout(signature).n_weights, inputs.n_radial,
        sizes.tile, found.n_slots,
    )  # fmt: skip


def gradients_by_edges(inputs: Inputs, gradient: Tensor, signature: str) -> tuple[Tensor, Tensor]:
    """Gradients by harmonics, and by weights or radial functions."""
    shape, n_edges = layout(signature), len(inputs.source)
    itemsize = gradient.element_size()
    empty = gradient.new_empty(0)
    of_harmonics = inputs.harmonics.new_zeros(inputs.harmonics.shape)
    of_weights = empty if inputs.n_radial else inputs.radial.new_empty(inputs.radial.shape)
    shares = max((plan(signature, degree, False).n_shares for degree in shape.degrees), default=0)
    of_radial = inputs.radial.new_zeros(shares, n_edges, inputs.n_radial)
    for degree in shape.degrees:
        which = (signature, degree, False)
        channels, found = shape.channels[degree], plan(*which)
        sizes = slope_sizes(found, channels, inputs.n_radial, itemsize)
        PROGRAM.launch(
            "table_slopes", gradient.dtype, (inputs.n_atoms, found.n_shares), sizes.block,
            sizes.shared,
            (
                inputs.features, inputs.harmonics, inputs.radial, inputs.weights_of_radial,
                gradient, *_tables(*which, gradient.dtype, gradient.device), inputs.rowptr,
                inputs.source, of_harmonics, of_weights, of_radial, n_edges,
                *_numbers(inputs, signature, sizes, found), channels,
            ),
        )  # fmt: skip
    return of_harmonics, of_radial.sum(0) if inputs.n_radial else of_weights


def gradient_by_kernel(
    inputs: Inputs, gradient: Tensor, signature: str, along: Inputs | None = None
) -> Tensor:
    """Sum over all edges of b[e, r] times the slope of the weight, by groups of atoms.

    Args:
        inputs: of the convolution.
        gradient: of its result.
        signature: see ``mlip.ops.cpu.library.encode``.
        along: cotangents of the gradients by features (or an empty tensor), harmonics and radial:
            the gradient of their sum is meant.

    Returns:
        [n_radial, n_weights].
    """
    shape = layout(signature)
    cotangents = () if along is None else (along.features, along.harmonics, along.radial)
    name, sizes_of = (
        ("table_kernel_second", second_kernel_sizes)
        if cotangents
        else ("table_kernel_slopes", kernel_sizes)
    )
    copies = min(COPIES, inputs.n_atoms)
    parts = gradient.new_empty(copies, inputs.n_radial, shape.n_weights)
    for degree in shape.degrees:
        which = (signature, degree, False)
        channels, found = shape.channels[degree], plan(*which)
        sizes = sizes_of(found, channels, inputs.n_radial, gradient.element_size())
        KERNEL_PROGRAM.launch(
            name, gradient.dtype,
            (copies, found.n_paths, -(-channels // sizes.block)), sizes.block, sizes.shared,
            (
                inputs.features, inputs.harmonics, inputs.radial, *cotangents, gradient,
                *_tables(*which, gradient.dtype, gradient.device), inputs.rowptr, inputs.source,
                parts, *_numbers(inputs, signature, sizes, found), channels,
            ),
        )  # fmt: skip
    return parts.sum(0)


def backward(
    inputs: Inputs, gradient: Tensor, signature: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients by features, harmonics, radial and kernel; others than wanted may be there too."""
    of_features = of_harmonics = of_radial = of_kernel = None
    if wanted[0]:
        of_features = gradient_by_features(inputs, gradient, signature)
    if wanted[1] or wanted[2]:
        of_harmonics, of_radial = gradients_by_edges(inputs, gradient, signature)
    if wanted[3] and inputs.n_radial:
        of_kernel = gradient_by_kernel(inputs, gradient, signature)
    return of_features, of_harmonics, of_radial, of_kernel
