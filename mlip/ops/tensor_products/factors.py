"""Low-rank factors of the Clebsch–Gordan tensor: found once, kept on disk, imported, judged."""

from __future__ import annotations

import contextlib
import os
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from mlip.errors import DataError, InputError, MlipError
from mlip.files import atomic_write, user_cache
from mlip.ops.tensor_products.interface import Degrees, coupling_tensor
from mlip.ops.tensor_products.solver import Triple, decompose, reconstruct
from mlip.so3 import wigner_matrices

NAMES = ("cp_a", "cp_b", "cp_c")  # as the published files have them
EXACT_RANK = {0: 1, 1: 8, 2: 30, 3: 90, 4: 216}  # least ranks known to give the exact tensor
SOLVER_VERSION = 1


class Factors(NamedTuple):
    """M[i,j,k] ≈ Σ_r first[i,r] second[j,r] out[k,r], each float64 [(L+1)², R]."""

    first: Tensor
    second: Tensor
    out: Tensor

    @property
    def lmax(self) -> int:
        """L."""
        return round(self.first.shape[0] ** 0.5) - 1

    @property
    def rank(self) -> int:
        """R."""
        return self.first.shape[1]

    @property
    def tensor(self) -> Tensor:
        """The sum, [(L+1)²]³."""
        return reconstruct(_triple(self))

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm, ‖sum − M‖ / ‖M‖."""
        exact = coupling_tensor(Degrees(self.lmax, self.lmax, self.lmax))
        return float((self.tensor - exact).norm() / exact.norm())


def published_rank(lmax: int, rule: str = "quadratic") -> int:
    """Return the rank that the published model takes: 7L², or 7L ("linear"), (L+1)⁴ ("full").

    Raises:
        InputError: unknown rule.
    """
    ranks = {"linear": 7 * lmax, "quadratic": 7 * lmax**2, "full": (lmax + 1) ** 4}
    if rule not in ranks:
        raise InputError(f"rank rule {rule!r} is unknown: use one of {', '.join(ranks)}")
    return ranks[rule]


@lru_cache(maxsize=32)
def find_factors(lmax: int, rank: int, seed: int = 0, starts: int = 6) -> Factors:
    """Return factors of all paths up to degree ``lmax``, from the cache or the solver.

    A start takes seconds up to L = 3, up to a minute at L = 4; the result is kept in
    ``factors`` of the user's cache (``$MLIP_CACHE``). From the ranks of ``EXACT_RANK`` on the
    error is that of rounding: nothing is approximated then.

    Args:
        lmax: L.
        rank: R.
        seed: of the solver.
        starts: random starts at most, the best is kept.

    Raises:
        InputError: ``lmax`` is negative, ``rank`` or ``starts`` not positive.
    """
    if lmax < 0:
        raise InputError(f"lmax is {lmax}; expected 0 or more")
    name = f"cp-v{SOLVER_VERSION}-L{lmax}-R{rank}-seed{seed}-starts{starts}.safetensors"
    path = _cache_folder() / name
    if path.is_file():
        with contextlib.suppress(DataError):  # a damaged file is replaced
            return _check_shapes(load_factors(path), path, lmax, rank)
    tensor = coupling_tensor(Degrees(lmax, lmax, lmax))
    found = decompose(tensor, rank, seed=seed, starts=starts)
    factors = Factors(*found.factors)
    with contextlib.suppress(MlipError):  # a read-only home costs the search once a process
        save_factors(path, factors)
    return factors


def save_factors(path: str | os.PathLike[str], factors: Factors) -> None:
    """Write factors to a safetensors file; its header states rank and error.

    Raises:
        MlipError: the file cannot be written.
    """
    tensors = {name: f.contiguous() for name, f in zip(NAMES, factors, strict=True)}
    facts = {"lmax": factors.lmax, "rank": factors.rank, "error": f"{factors.error:.3e}"}
    with atomic_write(path) as file:
        file.write(serialize(tensors, metadata={k: str(v) for k, v in facts.items()}))


def load_factors(path: str | os.PathLike[str]) -> Factors:
    """Read factors: our .safetensors, .npz, or the published .pt; nothing in them is executed.

    Raises:
        DataError: missing or unreadable file, or no factors of one rank and L in it.
    """
    try:
        arrays = _read(Path(path))
        return _factors([arrays[name] for name in NAMES])
    except KeyError as error:
        raise DataError(f"{path}: no array {error} in it; expected {', '.join(NAMES)}") from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        AttributeError,
        EOFError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise DataError(
            f"{path}: not a file of factors ({type(error).__name__}: {error}); expected arrays "
            f"{', '.join(NAMES)} [(L+1)², R] as .safetensors, .npz or .pt"
        ) from error


def equivariance_error(factors: Factors, n_rotations: int = 200, seed: int = 0) -> float:
    """Measure ‖f(Dx, Dy) − D f(x, y)‖ / ‖f‖ over random rotations and normal x, y."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_rotations, len(factors.first), 1)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    normal = torch.randn(n_rotations, 3, 3, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(normal).Q
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]
    blocks = wigner_matrices(factors.lmax, rotation)
    wigner = torch.stack([torch.block_diag(*each) for each in zip(*blocks, strict=True)])

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("ijk,nic,njc->nkc", factors.tensor, x, y)

    value = wigner @ product(x, y)
    return float((product(wigner @ x, wigner @ y) - value).norm() / value.norm())


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return deserialize(path.read_bytes())
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    arrays = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(arrays, dict):
        raise ValueError(f"holds a {type(arrays).__name__}")
    return arrays


def _factors(arrays: list[Any]) -> Factors:
    parts = [torch.as_tensor(array).detach().to(torch.float64) for array in arrays]
    size, rank = parts[0].shape
    if any(part.shape != (size, rank) for part in parts) or (size**0.5) % 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"shapes {shapes} are not three times [(L+1)², R]")
    return Factors(parts[0], parts[1], parts[2])


def _check_shapes(factors: Factors, path: Path, lmax: int, rank: int) -> Factors:
    if (factors.lmax, factors.rank) != (lmax, rank):
        raise DataError(f"{path}: factors of L = {factors.lmax}, rank {factors.rank}")
    return factors


def _cache_folder() -> Path:
    return user_cache() / "factors"


def _triple(factors: Factors) -> Triple:
    return factors.first, factors.second, factors.out
