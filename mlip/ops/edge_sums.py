"""Sums and softmax over the edges of each atom, sorted by atom, and sums over atoms."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mlip.ops.backend import CHECK_EDGES, Backend, compare, default_backend, tracing, use_kernel
from mlip.ops.neighborhood import row_pointers
from mlip.ops.segment import segment_sum


def edge_sum(
    values: Tensor, target: Tensor, n_atoms: int, backend: Backend | None = None
) -> Tensor:
    """Sum the rows of the edges of each atom, with a kernel in the order of the edges.

    Args:
        values: [E, ...].
        target: [E] atom of each edge, int64; ascending, or plain PyTorch adds on the CPU, and sums
            are wrong on CUDA, where nobody looks.
        n_atoms: N.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        [N, ...] in the dtype of ``values``.
    """
    return _sorted_sum("sums over the edges of atoms", values, target, n_atoms, backend)


def structure_sum(values: Tensor, batch: Tensor, n_graphs: int) -> Tensor:
    """Sum the rows of the atoms of each structure.

    PyTorch adds them in order on the CPU, and in any order on CUDA, where a kernel does it in one.

    Args:
        values: [N, ...].
        batch: [N] structure of each atom, ascending, int64.
        n_graphs: B.

    Returns:
        [B, ...] in the dtype of ``values``.
    """
    if values.device.type == "cuda":
        return _sorted_sum("sums over the atoms of structures", values, batch, n_graphs)
    return segment_sum(values, batch, n_graphs)


def envelope_softmax(
    logits: Tensor,
    envelope: Tensor,
    target: Tensor,
    n_atoms: int,
    epsilon: float,
    backend: Backend | None = None,
) -> Tensor:
    """Normalise env·exp(logit) over the edges of each atom.

    a = env·exp(z − z_max) / (Σ env·exp(z − z_max) + ε) with z_max the largest logit of the atom,
    a constant for derivatives (EquiformerV3, arXiv 2604.09130, eq. 4): edges that reach the cutoff
    leave the sum smoothly.

    Args:
        logits: z, [E, H].
        envelope: [E], 0 at the cutoff.
        target: [E] atom of each edge, as for ``edge_sum``.
        n_atoms: N.
        epsilon: keeps atoms finite whose envelopes all vanish.
        backend: as for ``sum_messages``; None for that of the environment.

    Returns:
        [E, H].
    """

    def check() -> tuple[float, float]:
        index = target[:CHECK_EDGES]
        return compare(  # for random numbers: of equal edges, in a crystal, derivatives vanish
            lambda z, w: (_softmax(z, w.sigmoid(), index, n_atoms, epsilon),),
            lambda z, w: (_kernel_softmax(z, w.sigmoid(), index, n_atoms, epsilon),),
            [_random(logits), _random(envelope)],
        )

    backend = backend or default_backend()
    name, tensors = "softmax over the edges of atoms", [logits, envelope]
    use = len(logits) and _ascending(target) and use_kernel(backend, name, tensors, check)
    return (_kernel_softmax if use else _softmax)(logits, envelope, target, n_atoms, epsilon)


def _sorted_sum(
    name: str, values: Tensor, target: Tensor, n: int, backend: Backend | None = None
) -> Tensor:
    """Sum rows with equal targets; ``name`` stands in what ``mlip info --backends`` prints."""

    def check() -> tuple[float, float]:
        index = target[:CHECK_EDGES]
        return compare(
            lambda x: (segment_sum(x, index, n),),
            lambda x: (_kernel_sum(x, index, n),),
            [_random(values)],
        )

    possible = len(values) and _ascending(target)
    use = possible and use_kernel(backend or default_backend(), name, [values], check)
    return (_kernel_sum if use else segment_sum)(values, target, n)


def _ascending(target: Tensor) -> bool:
    """Whether a kernel may run; to look would wait for a device, or break a trace."""
    return target.device.type == "cuda" or tracing() or bool((target[1:] >= target[:-1]).all())


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (min(CHECK_EDGES, len(like)), *like.shape[1:])
    return torch.randn(shape, generator=generator).to(like)


def _softmax(
    logits: Tensor, envelope: Tensor, target: Tensor, n_atoms: int, epsilon: float
) -> Tensor:
    rows = target[:, None].expand_as(logits)
    largest = logits.new_zeros(n_atoms, logits.shape[1])
    largest = largest.scatter_reduce(0, rows, logits.detach(), "amax", include_self=False)
    weights = envelope[:, None] * torch.exp(logits - largest[target])
    return weights / (segment_sum(weights, target, n_atoms)[target] + epsilon)


def _kernels(tensor: Tensor) -> ModuleType:
    """Import the operators, with their kernels for the device of a tensor."""
    from mlip.ops.cpu import segments

    if tensor.device.type == "cuda":
        from mlip.ops.cuda import segments as _launches  # noqa: F401  registers them
    return segments


def _kernel_sum(values: Tensor, target: Tensor, n_atoms: int) -> Tensor:
    sums: Tensor = _kernels(values).csr_segment_sum(values, target, row_pointers(target, n_atoms))
    return sums


def _kernel_softmax(
    logits: Tensor, envelope: Tensor, target: Tensor, n_atoms: int, epsilon: float
) -> Tensor:
    rowptr = row_pointers(target, n_atoms)
    softmax = _kernels(logits).csr_segment_softmax
    shares: Tensor = softmax(logits, envelope, target, rowptr, epsilon)
    return shares
