"""Which implementation of an operator runs, and why.

``torch`` is the definition and its rearrangements in plain PyTorch; ``numba`` the CPU kernels;
``cuda`` the CUDA kernels; ``auto`` the fastest that can run, after it has agreed with the
definition on a part of the user's own structure. What was decided for each set of shapes is kept,
and told once through the logger "mlip".
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.convolution import Features

Backend = Literal["auto", "torch", "numba", "cuda"]
Check = Callable[[], tuple[float, float] | float]

CHECK_EDGES = 512
CHANNEL_BLOCK = {torch.float32: 16, torch.float64: 8}  # channels of one vector
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative, of results and gradients

logger = logging.getLogger("mlip")
_lock = threading.RLock()
_refused: dict[tuple[Hashable, torch.dtype, str, int, str], str | None] = {}
_uncovered: dict[str, str] = {}


def default_backend() -> Backend:
    """The back end of ``$MLIP_BACKEND``, else auto.

    Raises:
        InputError: the variable holds another word.
    """
    name = os.environ.get("MLIP_BACKEND") or "auto"
    if name not in get_args(Backend):
        raise InputError(
            f"MLIP_BACKEND is {name!r}; expected one of {', '.join(get_args(Backend))}"
        )
    return cast(Backend, name)


@torch.compiler.assume_constant_result
def numba_missing() -> str | None:
    """Why no CPU kernel can run here, or None; a constant for a compiler that traces a model."""
    return _numba_missing()


@cache
def _numba_missing() -> str | None:
    try:
        import llvmlite.binding
        import numba  # noqa: F401
    except ImportError as error:
        return f"Numba cannot be imported ({error})"
    return None if llvmlite.binding.get_host_cpu_name() else "the processor is unknown to LLVM"


class InPart(NamedTuple):
    """An operator with channels that do not fill vectors: compiled code of its own."""

    signature: Hashable

    def __str__(self) -> str:
        return f"{self.signature}, any number of channels"


def of_width(signature: Hashable, channels: int, dtype: torch.dtype) -> Hashable:
    """Name the operator for `use_kernel`, which then checks both kinds of code."""
    return InPart(signature) if odd_channels(channels, dtype) else signature


def odd_channels(channels: int, dtype: torch.dtype) -> str | None:
    """Why compiled code without padding cannot take so many channels, or None."""
    block = CHANNEL_BLOCK.get(dtype, 1)
    return f"{channels} channels are not a multiple of {block}" if channels % block else None


@torch.compiler.assume_constant_result
def cuda_missing() -> str | None:
    """Why no CUDA kernel can run here, or None; a constant for a compiler that traces a model."""
    return _cuda_missing()


@cache
def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        from cupy_backends.cuda.api import runtime
        from cupy_backends.cuda.libs import nvrtc

        major, minor = nvrtc.getVersion()
        driver = runtime.driverGetVersion()
    except Exception as error:  # CuPy is missing, or finds no library or a wrong one
        return f"CuPy and NVRTC cannot be used ({error}): pip install 'mlip[cuda]'"
    if driver // 1000 < major:
        return (
            f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, the compiler NVRTC "
            f"for {major}.{minor}: update the driver"
        )
    return None


def refusal(tensors: list[Tensor], numba: str | None, cuda: str | None) -> str | None:
    """Why these inputs cannot go through a kernel, or None.

    Args:
        tensors: inputs.
        numba, cuda: what the kernels for the CPU and for CUDA do not cover, if they do not.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    if device.type not in ("cpu", "cuda") or any(t.device != device for t in tensors[1:]):
        found = sorted({str(tensor.device) for tensor in tensors})
        return f"tensors are on {', '.join(found)}"
    if dtype not in TOLERANCE or any(t.dtype != dtype for t in tensors[1:]):
        found = sorted({str(tensor.dtype) for tensor in tensors})
        return f"tensors are {', '.join(found)}; expected float32 or float64"
    if device.type == "cuda":
        return cuda or cuda_missing()
    return numba or numba_missing()


def use_kernel(
    backend: Backend,
    signature: Hashable,
    tensors: list[Tensor],
    check: Check,
    numba: str | None = None,
    cuda: str | None = None,
    otherwise: str = "plain PyTorch",
) -> bool:
    """Decide whether the kernel of the device runs.

    Args:
        backend: what was asked for.
        signature: the operator and its shapes; what ``str`` makes of it stands in messages.
        tensors: all inputs that carry gradients.
        check: computes the worst relative error against float64 of the kernel and of what runs
            otherwise on a part of the inputs, or the relative difference of the two, where nothing
            better is at hand; called at most once for each set of shapes.
        numba: why the CPU kernel does not cover the signature, if so.
        cuda: why no CUDA kernel covers it, if so.
        otherwise: what runs instead of the kernel and is compared with it.

    Raises:
        InputError: the kernel was asked for by name and cannot run.
    """
    if backend == "torch":
        return False
    reason = refusal(tensors, numba, cuda)
    device = tensors[0].device.type
    if backend == {"cpu": "cuda", "cuda": "numba"}.get(device):
        reason = f"tensors are on the device {device}"
    if reason is None and backend == "auto" and not tracing():
        key = (signature, tensors[0].dtype, device, len(tensors), otherwise)
        with _lock:
            if key not in _refused:
                _refused[key] = _checked(*key[:3], otherwise, check)
            reason = _refused[key]
    elif reason is not None and backend == "auto" and not tracing():
        _uncovered[_name(signature, tensors[0].dtype)] = reason
    elif reason is not None and backend != "auto":
        raise InputError(
            f"backend={backend!r} cannot run the {signature}: {reason}; choose 'auto' or 'torch'"
        )
    return reason is None


def kernels_of(operator: str, tensor: Tensor) -> ModuleType:
    """Import what launches the kernels of an operator on the device of a tensor.

    Statements, not ``importlib``: compilers that trace a model follow these alone.
    """
    if tensor.device.type == "cuda":
        from mlip.ops.cuda import rotation, shared_operator
    else:
        from mlip.ops.cpu import rotation, shared_operator  # type: ignore[no-redef]
    return {"rotation": rotation, "shared_operator": shared_operator}[operator]


def decisions() -> dict[str, str]:
    """What ``auto`` chose in this process: an operator with its precision, and why it runs how."""
    found = {name: f"plain PyTorch: {reason}" for name, reason in _uncovered.items()}
    with _lock:
        for (signature, dtype, device, _, otherwise), reason in _refused.items():
            kernel = f"{device.upper()} kernel, agrees with {otherwise}"
            name = _name(signature, dtype)
            found[name] = kernel if reason is None else f"{otherwise}: {reason}"
    return found


def _name(signature: Hashable, dtype: torch.dtype) -> str:
    return f"{signature}, {str(dtype).removeprefix('torch.')}"


def tracing() -> bool:
    """Whether a compiler looks on, who must see operators and no comparison.

    ``make_fx`` and fake tensors work by modes of dispatch, which torch counts in private alone.
    Without that count they would see it too, as operations without effect.
    """
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    return torch.compiler.is_compiling() or modes() > 0


def _checked(
    signature: Hashable,
    dtype: torch.dtype,
    device: str,
    otherwise: str,
    check: Check,
) -> str | None:
    """Compare once; log what was found in one line."""
    kernel = f"{device.upper()} kernel"
    name = _name(signature, dtype)
    start = time.perf_counter()
    try:
        agrees, said = _judged(check(), dtype, otherwise)
        reason = None if agrees else said
    except Exception as failure:  # whatever a compiler may raise on an unknown machine
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    if reason is None:
        seconds = time.perf_counter() - start
        logger.info(
            "%s: %s, %s, ready after %.1f s",
            name, kernel, said, seconds,
            extra={"seconds": seconds},
        )  # fmt: skip
    else:
        logger.warning("%s: %s instead of the %s: %s", name, otherwise, kernel, reason)
    return reason


def _judged(
    found: tuple[float, float] | float, dtype: torch.dtype, otherwise: str
) -> tuple[bool, str]:
    """Whether what a comparison found is within the tolerance, and what it found."""
    if isinstance(found, float):  # both sides err
        return found <= 2 * TOLERANCE[dtype], f"relative difference from {otherwise} {found:.1e}"
    error, plain = found
    return error <= TOLERANCE[dtype], f"relative error {error:.1e} ({otherwise} {plain:.1e})"


def compare(
    plain: Callable[..., Features], fast: Callable[..., Features], inputs: list[Tensor]
) -> tuple[float, float]:
    """Worst relative errors of two implementations, result and gradients, against float64.

    Args:
        plain: the definition; also called in float64.
        fast: the kernel.
        inputs: [N, ...] and [E, ...] tensors, all differentiated.

    Returns:
        Error of ``fast`` and of ``plain``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        given = [tensor.detach().clone() for tensor in inputs]
        truth = _with_gradients(plain, [tensor.double() for tensor in given])
        errors = []
        for function in (fast, plain):
            found = _with_gradients(function, given)
            pairs = zip(found, truth, strict=True)
            errors.append(max((_relative(a.double(), b) for a, b in pairs), default=0.0))
    return errors[0], errors[1]


def disturbed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Add noise of their common size to features that `compare` takes.

    What vanishes by symmetry, in a perfect crystal, is rounding in any implementation and has no
    relative error; with the noise nothing vanishes.
    """
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    size = flat.double().square().mean().sqrt() if flat.any() else 1.0
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in tensors]
    return [
        (tensor.detach() + size * own).to(tensor.dtype)
        for tensor, own in zip(tensors, noise, strict=True)
    ]


def _with_gradients(function: Callable[..., Features], inputs: list[Tensor]) -> list[Tensor]:
    """Result and gradients of Σ result², scaled by its size."""
    leaves = [tensor.detach().requires_grad_(True) for tensor in inputs]
    out = torch.cat([part.flatten() for part in function(*leaves)])
    gradients = torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)
    return [out.detach(), *gradients]


def _relative(x: Tensor, truth: Tensor) -> float:
    size = float(torch.linalg.vector_norm(truth))
    return float(torch.linalg.vector_norm(x - truth)) / size if size else float(x.abs().sum())
