"""What depends on edge vectors alone, in inference: harmonics and radial functions of Facet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlip.nn.radial import SineBasis
from mlip.ops.backend import CHECK_EDGES, compare, tracing, use_kernel

if TYPE_CHECKING:
    from mlip.models.facet import Facet
    from mlip.ops.cpu.edge_functions import EdgeFunctions


def functions_in_inference(model: Facet, vectors: Tensor) -> tuple[Tensor, Tensor] | None:
    """Evaluate harmonics [E, K] and enveloped radial functions [E, R], once differentiable.

    Args:
        model: of the default setting; None is returned for others, and where no kernel runs.
        vectors: [E, 3] Å.
    """
    config = model.config
    covered = (
        isinstance(model.radial_basis, SineBasis)
        and config.envelope == "polynomial"
        and config.node_update == "sphere_product"
        and not config.trainable_cutoff
    )
    if not covered or model.backend == "torch" or tracing() or not len(vectors):
        return None

    def check() -> tuple[float, float]:
        def plain(some: Tensor) -> tuple[Tensor, ...]:
            return model.functions(some)

        def fast(some: Tensor) -> tuple[Tensor, ...]:
            return _evaluate(model, some)

        return compare(plain, fast, [vectors[:CHECK_EDGES]])

    name = f"functions of edges: degree {model.lmax_edge}, {config.n_radial} radial"
    if not use_kernel("auto", name, [vectors], check, cuda="it is written for processors"):
        return None
    return _evaluate(model, vectors)


def _evaluate(model: Facet, vectors: Tensor) -> tuple[Tensor, Tensor]:
    from mlip.ops.cpu.edge_functions import EdgeFunctions

    config, basis = model.config, model.radial_basis
    assert isinstance(basis, SineBasis)
    frequencies = basis.frequencies.detach()
    functions = EdgeFunctions(model.lmax_edge, frequencies, config.cutoff, config.envelope_order)
    found: tuple[Tensor, Tensor] = _Functions.apply(functions, vectors)  # type: ignore[no-untyped-call]
    return found


class _Functions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, functions: EdgeFunctions, vectors: Tensor) -> tuple[Tensor, Tensor]:
        harmonics, basis, waves = functions.values(vectors)
        ctx.functions = functions
        ctx.save_for_backward(vectors, *waves)
        return harmonics, basis

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_harmonics: Tensor, of_basis: Tensor) -> tuple[None, Tensor]:
        vectors, *waves = ctx.saved_tensors
        return None, ctx.functions.gradient(vectors, tuple(waves), of_harmonics, of_basis)
