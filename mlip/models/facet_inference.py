"""A block of Facet in inference: forward and backward pass written out, first derivatives only.

The arithmetic is that of ``FacetBlock`` with messages linear in radial functions and products on
the sphere, or a perceptron on scalars, as node update. What it saves is everything around it:
features stay in one array, degree after degree, the steps between two convolutions are one program,
constant factors are part of the weights, and autograd sees one operation.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlip.models import facet_elements, facet_product_block, facet_scalar_block
from mlip.models.facet_packed import by_degree, joined
from mlip.nn.node_update import ScalarUpdate, SphereProductUpdate
from mlip.nn.prepared import parameters_of
from mlip.ops import Features, Neighborhood
from mlip.ops.backend import CHECK_EDGES, compare, disturbed, odd_channels, tracing, use_kernel

if TYPE_CHECKING:
    from mlip.models.facet import Edges, FacetBlock

FOR_CPU = "it is written for processors"
MOST_SETS = 64  # of elements, whose weights are kept: data sets have thousands
Passes = facet_product_block.Passes | facet_scalar_block.Passes


def block_in_inference(block: FacetBlock, x: Features, edges: Edges) -> Features | None:
    """Run a block, or return None where it must go the general way.

    Args:
        block: of a Facet that is not trained.
        x: [N, 2l+1, C_l] for each degree.
        edges: what blocks share.
    """
    if block.backend == "torch" or tracing() or not edges.basis.shape[0] or not _simple(block):
        return None
    tensors = [*x, edges.harmonics, edges.basis]

    def check() -> tuple[float, float]:
        return _compared(block, x, edges)

    order = getattr(block.update, "order", 0)
    name = f"block of Facet: {block.signature}, {order} factors, to channels {block.target}"
    # asked for by name, the kernels of the general way tell why they cannot run
    if not use_kernel("auto", name, tensors, check, _uncovered(block, x), cuda=FOR_CPU):
        return None
    own = _own(block)
    found = None if edges.elements is None else _by_elements(block, own, x, edges, name)
    return found or _run(own, edges.neighbors, edges.harmonics, edges.basis, x)


class _Own(NamedTuple):
    """What runs a block. sources: features of messages where they are not x."""

    form: ModuleType
    passes: Passes
    sources: Tensor | None = None


def _own(block: FacetBlock) -> _Own:
    form = _form(block)
    assert form is not None
    return _Own(form, prepared(block))


def _by_elements(
    block: FacetBlock, own: _Own, x: Features, edges: Edges, name: str
) -> Features | None:
    """Run the first block by sums for elements, or return None where this is no gain."""
    assert edges.elements is not None
    if not isinstance(own.passes, facet_product_block.Passes):
        return None
    species, table = edges.elements
    present = tuple(species.unique().tolist())
    width = facet_elements.width_of(len(present), edges.basis.shape[1], table.dtype)
    if width >= table.shape[1]:
        return None
    cache = block.prepared_elements.get([table], dict)
    if present not in cache or cache[present].made_of is not own.passes:
        if len(cache) >= MOST_SETS:
            cache.clear()
        cache[present] = facet_elements.weights_of_elements(
            own.passes, block.signature, table, present
        )
    _, passes, features = cache[present]
    own = own._replace(passes=passes, sources=features[species].flatten())
    x = tuple(part.detach() for part in x)

    def check() -> tuple[float, float]:
        return _compared(block, x, edges, own)

    tensors = [edges.harmonics, edges.basis]
    if not use_kernel("auto", f"{name}, sums for elements", tensors, check, otherwise=name):
        return None
    return _run(own, edges.neighbors, edges.harmonics, edges.basis, x)


def _run(
    own: _Own, neighbors: Neighborhood, harmonics: Tensor, basis: Tensor, x: Features
) -> Features:
    found: Features = _Block.apply(own, neighbors, harmonics, basis, *x)  # type: ignore[no-untyped-call]
    return found


def _simple(block: FacetBlock) -> bool:
    """Whether this is the arithmetic of a block; for others nothing is decided here."""
    return (
        _form(block) is not None
        and block.before is None
        and len(block.radial.kernels) == 1
        and not block.residual_normalization
        and block.output_gain is None
    )


def _form(block: FacetBlock) -> ModuleType | None:
    """Give the module with the passes of a block, if there is one."""
    update = block.update
    if isinstance(update, SphereProductUpdate):
        return facet_product_block
    if isinstance(update, ScalarUpdate) and facet_scalar_block.covers(update):
        return facet_scalar_block
    return None


def _uncovered(block: FacetBlock, x: Features) -> str | None:
    """Why a block cannot run here, or None: its messages are not padded."""
    odd = (odd_channels(width, x[0].dtype) for width in block.signature.channels)
    return next((reason for reason in odd if reason is not None), None)


def prepared(block: FacetBlock) -> Passes:
    """Give what runs a block, made anew when a parameter has changed."""
    form = _form(block)
    assert form is not None
    return block.prepared.get(parameters_of(block), lambda: form.prepare(block))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: _Own,
        neighbors: Neighborhood,
        harmonics: Tensor,
        basis: Tensor,
        *x: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.channels = tuple(part.shape[2] for part in x)
        ctx.own, ctx.neighbors = own, neighbors
        flat = joined(x)
        sources = flat if own.sources is None else own.sources
        out, kept = own.form.forward(own.passes, neighbors, harmonics, basis, flat, sources)
        ctx.save_for_backward(harmonics, basis, *kept)
        return by_degree(out, neighbors.n_nodes, own.passes.weights.target)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        harmonics, basis, *kept = ctx.saved_tensors
        gradient = joined(gradients)
        wanted = any(ctx.needs_input_grad[4:])
        dx, of_harmonics, of_basis = ctx.own.form.backward(
            ctx.own.passes, ctx.neighbors, harmonics, basis, kept, gradient, wanted
        )
        if dx is None:
            return None, None, of_harmonics, of_basis, *[None] * len(ctx.channels)
        parts = by_degree(dx, ctx.neighbors.n_nodes, ctx.channels)
        return None, None, of_harmonics, of_basis, *parts


def _compared(
    block: FacetBlock, x: Features, edges: Edges, own: _Own | None = None
) -> tuple[float, float]:
    """Errors of this and of the general way in plain PyTorch, on the first edges.

    Harmonics have some noise; without ``own`` features are inputs, too, with noise.
    """
    count = min(CHECK_EDGES, edges.basis.shape[0])
    part = edges.neighbors.first(count)
    constant = () if own is None else x
    varied = disturbed(x) if own is None else []

    def plain(harmonics: Tensor, basis: Tensor, *features: Tensor) -> Features:
        general = copy.deepcopy(block).to(basis.dtype).requires_grad_(False)
        general.use_backend("torch")
        edge = edges._replace(harmonics=harmonics, basis=basis, neighbors=part, inference=False)
        given = features or tuple(each.to(basis) for each in constant)
        found: Features = general(given, edge)
        return found

    def fast(harmonics: Tensor, basis: Tensor, *features: Tensor) -> Features:
        return _run(own or _own(block), part, harmonics, basis, features or constant)

    harmonics = disturbed([edges.harmonics[:count]])
    return compare(plain, fast, [*harmonics, edges.basis[:count], *varied])
