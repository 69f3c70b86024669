"""The blocks of Facet in inference: forward and backward pass written out, first derivatives only.

The arithmetic is that of ``FacetBlock`` with messages linear in radial functions and products on
the sphere, or a perceptron on scalars, as node update. What it saves is everything around it:
features stay in one array, degree after degree, the steps between two convolutions are one program,
constant factors are part of the weights, and autograd sees one operation for all blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mlip.models import facet_elements, facet_product_block, facet_scalar_block
from mlip.models.facet_packed import by_degree, edge_list, joined
from mlip.nn.node_update import ScalarUpdate, SphereProductUpdate
from mlip.nn.prepared import parameters_of
from mlip.ops import Features, Neighborhood, neighborhood
from mlip.ops.backend import (
    CHECK_EDGES,
    compare,
    disturbed,
    odd_channels,
    refusal,
    tracing,
    use_kernel,
)

if TYPE_CHECKING:
    from mlip.models.facet import Edges, Facet, FacetBlock
    from mlip.ops.cpu.pairs import PairList
    from mlip.ops.cpu.runner import EdgeList

FOR_CPU = "it is written for processors"
MOST_SETS = 64  # of elements, whose weights are kept: data sets have thousands
Passes = facet_product_block.Passes | facet_scalar_block.Passes


class _Own(NamedTuple):
    """What runs a block. sources: packed features of messages where they are not x."""

    form: ModuleType
    passes: Passes
    sources: Tensor | None = None


def pairs_in_inference(
    model: Facet, neighbors: Neighborhood, shift: Tensor, vectors: Tensor
) -> PairList | None:
    """Give the pairs of opposite edges where all blocks can take them and all edges have one."""
    if model.backend == "torch" or tracing() or model.config.readout != "last":
        return None
    blocks = cast("list[FacetBlock]", list(model.blocks))
    if not len(vectors) or refusal(
        [vectors], next(filter(None, map(_uncovered, blocks)), None), FOR_CPU
    ):
        return None
    from mlip.ops.cpu.pairs import covers, find_pairs

    if not all(_form(block) and covers(block.signature.paths) for block in blocks):
        return None
    return find_pairs(edge_list(neighbors), shift)


def blocks_in_inference(
    model: Facet, x: Features, edges: Edges, species: Tensor
) -> Features | None:
    """Run all blocks, those that are covered here in one go, or return None if none can be.

    Args:
        model: in evaluation.
        x: [N, 1, C], rows of the embedding.
        edges: what blocks share.
        species: [N] row of each atom in the embedding.
    """
    if model.backend == "torch" or tracing() or not edges.basis.shape[0]:
        return None
    blocks = cast("list[FacetBlock]", list(model.blocks))
    tensors, covered = [edges.harmonics, edges.basis], list[bool]()
    for i, block in enumerate(blocks):

        def check(i: int = i, block: FacetBlock = block) -> tuple[float, float]:
            features = tuple(part.detach() for part in x)
            before = _through(blocks, _owns(model, covered), features, edges.detached())
            own = _owns(model, [True] * (i + 1))[i]
            assert own is not None
            return _compared(block, before, edges, own, varied=True)

        # asked for by name, the kernels of the general way tell why they cannot run
        given = (_name(block, edges), tensors, check, _uncovered(block), FOR_CPU)
        covered.append(_form(block) is not None and use_kernel("auto", *given))
    owns = _owns(model, covered)
    if owns[0] is not None:
        owns[0] = _by_elements(model, owns[0], x, edges, species) or owns[0]
    return _through(blocks, owns, x, edges)


def _owns(model: Facet, covered: Sequence[bool]) -> list[_Own | None]:
    """Give what runs the first blocks: None for those that are not covered."""
    if not any(covered):
        return [None] * len(covered)
    triples = zip(model.blocks, prepared(model), covered, strict=False)
    return [
        _Own(cast(ModuleType, _form(cast("FacetBlock", block))), passes)
        if is_covered and passes is not None
        else None
        for block, passes, is_covered in triples
    ]


def _through(
    blocks: Sequence[FacetBlock], owns: Sequence[_Own | None], x: Features, edges: Edges
) -> Features:
    """Run as many blocks as ``owns`` has entries: None is the general way."""
    pairs = zip(blocks, owns, strict=False)
    for is_general, group in groupby(pairs, lambda pair: pair[1] is None):
        if is_general:
            for block, _ in group:
                x = block(x, edges.of_all())
        else:
            together = [own for _, own in group if own is not None]
            x = _run(together, edges, x)
    return x


def _name(block: FacetBlock, edges: Edges) -> str:
    order = getattr(block.update, "order", 0)
    by = "" if edges.pairs is None else ", opposite edges together"
    return f"block of Facet: {block.signature}, {order} factors, to channels {block.target}{by}"


def _by_elements(
    model: Facet, own: _Own, x: Features, edges: Edges, species: Tensor
) -> _Own | None:
    """Give what runs the first block by sums for elements, or None where this is no gain."""
    block, table = cast("FacetBlock", model.blocks[0]), model.embedding
    if not isinstance(own.passes, facet_product_block.Passes):
        return None
    present = tuple(np.flatnonzero(np.bincount(species.numpy())).tolist())
    width = facet_elements.width_of(len(present), edges.basis.shape[1], table.dtype)
    if width >= table.shape[1]:
        return None
    cache = model.prepared_elements.get([table], dict)
    if present not in cache or cache[present].made_of is not own.passes:
        if len(cache) >= MOST_SETS:
            cache.clear()
        cache[present] = facet_elements.weights_of_elements(
            own.passes, block.signature, table, present
        )
    _, passes, features = cache[present]
    summed = own._replace(passes=passes, sources=features[species].flatten())

    def check() -> tuple[float, float]:
        return _compared(block, tuple(part.detach() for part in x), edges, summed, varied=False)

    name, tensors = _name(block, edges), [edges.harmonics, edges.basis]
    if not use_kernel("auto", f"{name}, sums for elements", tensors, check, otherwise=name):
        return None
    return summed


def _run(owns: Sequence[_Own], edges: Edges, x: Features) -> Features:
    given = (owns, edge_list(edges.neighbors), edges.pairs, edges.harmonics, edges.basis)
    found: Features = _Blocks.apply(*given, *x)  # type: ignore[no-untyped-call]
    return found


def _form(block: FacetBlock) -> ModuleType | None:
    """Give the module with the passes of a block, if there is one; else nothing is decided here."""
    if (
        block.before is not None
        or len(block.radial.kernels) != 1
        or block.residual_normalization
        or block.output_gain is not None
    ):
        return None
    update = block.update
    if isinstance(update, SphereProductUpdate):
        return facet_product_block
    if isinstance(update, ScalarUpdate) and facet_scalar_block.covers(update):
        return facet_scalar_block
    return None


def _uncovered(block: FacetBlock) -> str | None:
    """Why a block cannot run here, or None: its messages are not padded."""
    dtype = block.radial.kernels[0].dtype
    odd = (odd_channels(width, dtype) for width in block.signature.channels)
    return next((reason for reason in odd if reason is not None), None)


def prepared(model: Facet) -> list[Passes | None]:
    """Give what runs each block, made anew when a parameter has changed; None: nothing here."""

    def make() -> list[Passes | None]:
        blocks = cast("list[FacetBlock]", list(model.blocks))
        forms = [(_form(block), block) for block in blocks]
        return [None if form is None else form.prepare(block) for form, block in forms]

    return model.prepared.get(parameters_of(model.blocks), make)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        owns: Sequence[_Own],
        edges: EdgeList,
        pairs: PairList | None,
        harmonics: Tensor,
        basis: Tensor,
        *x: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.channels = tuple(part.shape[2] for part in x)
        ctx.owns, ctx.edges, ctx.kept = owns, pairs or edges, []
        ctx.save_for_backward(harmonics, basis)
        if pairs is not None:
            harmonics, basis = pairs.both_detached(harmonics, basis)
        flat = joined(x)
        for own in owns:
            sources = flat if own.sources is None else own.sources
            flat, kept = own.form.forward(own.passes, edges, harmonics, basis, flat, sources)
            ctx.kept.append(kept)
        return by_degree(flat, edges.n_nodes, owns[-1].passes.weights.target)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        harmonics, basis = ctx.saved_tensors
        gradient: Tensor | None = joined(gradients)
        total: list[Tensor] = []
        for i, (own, kept) in reversed(list(enumerate(zip(ctx.owns, ctx.kept, strict=True)))):
            wanted = i > 0 or any(ctx.needs_input_grad[5:])
            gradient, *of_edges = own.form.backward(
                own.passes, ctx.edges, harmonics, basis, kept, gradient, wanted
            )
            for of_all, own_part in zip(total, of_edges, strict=False):
                of_all += own_part
            total = total or of_edges
        if gradient is None:
            return None, None, None, *total, *[None] * len(ctx.channels)
        parts = by_degree(gradient, ctx.edges.n_nodes, ctx.channels)
        return None, None, None, *total, *parts


def _compared(
    block: FacetBlock, x: Features, edges: Edges, own: _Own, varied: bool
) -> tuple[float, float]:
    """Errors of this and of the general way in plain PyTorch, on the first edges.

    Harmonics have some noise; if ``varied`` features are inputs, too, with noise.
    """
    if edges.pairs is None:
        some = _first_edges(edges)
    else:
        some, atoms = _first_pairs(edges, edges.pairs)
        if own.sources is not None:
            own = own._replace(sources=own.sources.view(len(x[0]), -1)[atoms].flatten())
        x = tuple(part[atoms] for part in x)

    def given(harmonics: Tensor, basis: Tensor) -> Edges:
        return some._replace(harmonics=harmonics, basis=basis)

    def plain(harmonics: Tensor, basis: Tensor, *features: Tensor) -> Features:
        general = copy.deepcopy(block).to(basis.dtype).requires_grad_(False)
        general.use_backend("torch")
        x_or_table = features or tuple(each.to(basis) for each in x)
        found: Features = general(x_or_table, given(harmonics, basis).of_all())
        return found

    def fast(harmonics: Tensor, basis: Tensor, *features: Tensor) -> Features:
        return _run([own], given(harmonics, basis), features or x)

    harmonics = disturbed([some.harmonics])
    features = disturbed(x) if varied else []
    return compare(plain, fast, [*harmonics, some.basis, *features])


def _first_edges(edges: Edges) -> Edges:
    count = min(CHECK_EDGES, edges.basis.shape[0])
    functions = edges.harmonics[:count], edges.basis[:count]
    return type(edges)(*functions, edges.neighbors.first(count))


def _first_pairs(edges: Edges, pairs: PairList) -> tuple[Edges, Tensor]:
    """Give some pairs of edges and their atoms, none of them both a source and a target.

    Of a pair that an atom makes with itself, gradients by features of odd degree vanish.
    """
    count = min(CHECK_EDGES, pairs.n_edges)
    numbers = np.repeat(np.arange(pairs.n_nodes), np.diff(np.minimum(pairs.rowptr, count)))
    targets, target = np.unique(numbers, return_inverse=True)
    sources, source = np.unique(pairs.source[:count], return_inverse=True)
    source, n_atoms = source + len(targets), len(targets) + len(sources)
    first = np.searchsorted(target, np.arange(n_atoms + 1))
    both = np.concatenate([source, target]), np.concatenate([target, source])
    order = np.argsort(both[1], kind="stable")
    place = np.argsort(order)
    some = type(edges)(
        edges.harmonics[:count],
        edges.basis[:count],
        neighborhood(torch.from_numpy(np.stack(both)[:, order]), n_atoms),
        pairs=type(pairs)(first, source, place[:count], place[count:]),
    )
    return some, torch.from_numpy(np.concatenate([targets, sources]))
