"""Canonical polyadic (CP) decomposition of three-way tensors: T[i,j,k] ≈ Σ_r A[i,r] B[j,r] C[k,r].

Damped Gauss–Newton steps (Levenberg–Marquardt) on all factors at once, their linear systems solved
by conjugate gradients in O(R² d). Factors start small: they then grow one direction of the tensor
after the other and end in better minima than from random factors of full size. Where the rank
suffices the error ends at rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip.errors import InputError

Triple = tuple[Tensor, Tensor, Tensor]
START = (0.01, 0.1)  # standard deviation of the first factors, in turns
NEWTON_STEPS = 200
CONJUGATE_GRADIENT_STEPS = 60
NEAR = 1e-2  # error below which steps are solved more accurately
PATIENCE = 40  # steps in which the error must fall by a hundredth
EXACT = 1e-13  # relative error below which nothing is gained


class Decomposition(NamedTuple):
    """Factors A [d1, R], B [d2, R], C [d3, R] and the relative error in the Frobenius norm."""

    factors: Triple
    error: float


def decompose(
    tensor: Tensor,
    rank: int,
    *,
    seed: int = 0,
    starts: int = 1,
    newton_steps: int = NEWTON_STEPS,
) -> Decomposition:
    """Find a decomposition of small error; the best of several random starts.

    Args:
        tensor: T, float64 [d1, d2, d3].
        rank: R.
        seed: of the first start; equal seeds give equal factors on the same machine.
        starts: how many to try; the search ends early at rounding error.
        newton_steps: at most, of each start.

    Raises:
        InputError: ``rank`` or ``starts`` is not positive.
    """
    if rank < 1 or starts < 1:
        raise InputError(f"rank {rank} and starts {starts}: expected 1 or more each")
    best: Decomposition | None = None
    for start in range(starts):
        found = _newton(tensor, _start(tensor, rank, seed + start, START[start % 2]), newton_steps)
        if best is None or found.error < best.error:
            best = found
        if best.error < EXACT:
            break
    assert best is not None
    return best


def reconstruct(factors: Triple) -> Tensor:
    """Sum the decomposition, [d1, d2, d3]."""
    return torch.einsum("ir,jr,kr->ijk", *factors)


def _start(tensor: Tensor, rank: int, seed: int, size: float) -> Triple:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, rank) for size in tensor.shape]
    return _triple([size * torch.randn(s, generator=generator, dtype=tensor.dtype) for s in shapes])


def _newton(tensor: Tensor, factors: Triple, steps: int) -> Decomposition:
    """Levenberg–Marquardt with the damping rule of Nielsen (IMM-REP-1999-05)."""
    norm = float(tensor.norm())
    damping, growth = 1.0, 2.0
    residual = reconstruct(factors) - tensor
    value = float(residual.square().sum())
    error = before = value**0.5 / norm
    for number in range(steps):
        if number % PATIENCE == PATIENCE - 1:
            if error > 0.99 * before:
                break
            before = error
        if error < EXACT or damping > 1e8:
            break
        gradient = _gradient(residual, factors)
        step = _damped_step(factors, gradient, damping, error)
        trial = _triple([f + s for f, s in zip(factors, step, strict=True)])
        trial_residual = reconstruct(trial) - tensor
        trial_value = float(trial_residual.square().sum())
        expected = float(damping * _dot(step, step) - _dot(step, gradient))
        gain = (value - trial_value) / expected if expected > 0 else -1.0
        if gain > 0:
            factors, residual, value = trial, trial_residual, trial_value
            damping = max(damping * max(0.2, 1 - (2 * gain - 1) ** 3), 1e-15)
            growth = 2.0
            error = value**0.5 / norm
        else:
            damping, growth = damping * growth, growth * 2
    return Decomposition(_triple(_balance(list(factors))), error)


def _gradient(residual: Tensor, factors: Triple) -> Triple:
    """Half the gradient of the squared residual."""
    a, b, c = factors
    return (
        torch.einsum("ijk,jr,kr->ir", residual, b, c),
        torch.einsum("ijk,ir,kr->jr", residual, a, c),
        torch.einsum("ijk,ir,jr->kr", residual, a, b),
    )


def _damped_step(factors: Triple, gradient: Triple, damping: float, error: float) -> Triple:
    """Solve (JᵀJ + damping) step = −gradient by preconditioned conjugate gradients."""
    grams = [f.T @ f for f in factors]
    identity = torch.eye(len(grams[0]), dtype=torch.float64)
    blocks = [
        torch.linalg.cholesky(grams[n] * grams[p] + damping * identity)
        for n, p in map(_others, range(3))
    ]

    def precondition(vector: Triple) -> Triple:
        pairs = zip(vector, blocks, strict=True)
        return _triple([torch.cholesky_solve(v.T, block).T for v, block in pairs])

    step = _triple([torch.zeros_like(g) for g in gradient])
    residual = _triple([-g for g in gradient])
    direction = conditioned = precondition(residual)
    product = _dot(residual, conditioned)
    goal = (0.1 * min(1.0, error)) ** 2 * float(_dot(residual, residual))
    for _ in range(CONJUGATE_GRADIENT_STEPS * (5 if error < NEAR else 1)):
        if float(_dot(residual, residual)) <= goal:
            break
        image = _normal_matrix(factors, grams, direction, damping)
        length = product / _dot(direction, image)
        step = _add(step, direction, length)
        residual = _add(residual, image, -length)
        conditioned = precondition(residual)
        previous, product = product, _dot(residual, conditioned)
        direction = _add(conditioned, direction, product / previous)
    return step


def _normal_matrix(factors: Triple, grams: list[Tensor], v: Triple, damping: float) -> Triple:
    """Apply JᵀJ + damping, in O(R² d), never forming it."""
    cross = [part.T @ factor for part, factor in zip(v, factors, strict=True)]
    images = []
    for mode in range(3):
        n, p = _others(mode)
        own = v[mode] @ (grams[n] * grams[p]) + damping * v[mode]
        images.append(own + factors[mode] @ (cross[n] * grams[p] + grams[n] * cross[p]))
    return _triple(images)


def _balance(factors: list[Tensor]) -> list[Tensor]:
    """Give the three vectors of each term the same length."""
    norms = [f.norm(dim=0).clamp_min(1e-300) for f in factors]
    common = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    return [f * (common / norm) for f, norm in zip(factors, norms, strict=True)]


def _others(mode: int) -> tuple[int, int]:
    return ((1, 2), (0, 2), (0, 1))[mode]


def _triple(parts: list[Tensor]) -> Triple:
    return parts[0], parts[1], parts[2]


def _dot(a: Triple, b: Triple) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _add(a: Triple, b: Triple, factor: Tensor) -> Triple:
    return _triple([x + factor * y for x, y in zip(a, b, strict=True)])
