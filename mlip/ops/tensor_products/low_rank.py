"""Low-rank product of the Tensor Decomposition Network (arXiv 2507.01131)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops.tensor_products.coupling import multiply_by, operator_table, tensor_operator
from mlip.ops.tensor_products.factors import Factors
from mlip.ops.tensor_products.interface import (
    Degrees,
    TensorProduct,
    tensor_path_weights,
)


@dataclass(frozen=True, eq=False)
class LowRankProduct(TensorProduct):
    """The product with one weight for all paths, its tensor replaced by low-rank factors.

    As equivariant as the factors are exact (`Factors.error`). Cheaper than `SharedProduct` only
    where factors are moved to the atoms; per edge, the operator K(y) costs the same.

    Attributes:
        factors: of the Clebsch–Gordan tensor.
        evaluation: "operator" sums the factors to K(y); "factors" multiplies term by term.
    """

    degrees: Degrees = field(init=False)
    factors: Factors
    evaluation: Literal["operator", "factors"] = "operator"

    def __post_init__(self) -> None:
        if self.evaluation not in ("operator", "factors"):
            raise InputError(f"evaluation is {self.evaluation!r}; use 'operator' or 'factors'")
        lmax = self.factors.lmax
        object.__setattr__(self, "degrees", Degrees(lmax, lmax, lmax))
        super().__post_init__()

    @property
    def n_weights(self) -> int:
        """One."""
        return 1

    def path_weights(self, weights: Tensor) -> Tensor:
        """Project on the paths; what is left of an inexact tensor is not equivariant."""
        fixed = tensor_path_weights(self.factors.tensor, self.degrees).to(weights)
        return weights * fixed[:, None]

    def operator(self, y: Tensor) -> Tensor:
        """Build K(y): [E, d] → [E, d, d]."""
        return tensor_operator(operator_table(self.factors.tensor).to(y), y)

    def multiply(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Multiply by K(y), or term by term."""
        if self.evaluation == "operator" and y.shape[2] == 1:
            return multiply_by(self.operator(y[:, :, 0]), x, weights)
        first, second, out = (factor.to(x) for factor in self.factors)
        return (out @ ((first.T @ x) * (second.T @ y))) * weights


ChannelMode = Literal["uvw", "uvu", "uvv", "uuw", "uuu"]
_CHANNELS = {  # indices of weights, first input, second input, output
    "uvw": ("euvw", "u", "v", "w"),
    "uvu": ("euv", "u", "v", "u"),
    "uvv": ("euv", "u", "v", "v"),
    "uuw": ("euw", "u", "u", "w"),
    "uuu": ("eu", "u", "u", "u"),
}


def mixed_product(
    tensor: Tensor, x: Tensor, y: Tensor, weights: Tensor, mode: ChannelMode
) -> Tensor:
    """Multiply with weights that connect channels u of x and v of y to channels w of the output.

    Args:
        tensor: bilinear map, [d1, d2, d3].
        x: [E, d1, U].
        y: [E, d2, V].
        weights: [E, U, V, W] for "uvw", [E, U, V] for "uvu" and "uvv", [E, U, W] for "uuw",
            [E, U] for "uuu".
        mode: letters of x, y and output; equal letters are one channel.

    Returns:
        [E, d3, channels of the output].

    Raises:
        InputError: unknown mode.
    """
    if mode not in _CHANNELS:
        raise InputError(f"channel mode {mode!r} is unknown: use one of {', '.join(_CHANNELS)}")
    w, u, v, out = _CHANNELS[mode]
    if u == v:
        return torch.einsum(f"{w},ei{u},ej{v},ijk->ek{out}", weights, x, y, tensor)
    operators = torch.einsum("ijk,ejv->evki", tensor, y)
    return torch.einsum(f"{w},ei{u},e{v}ki->ek{out}", weights, x, operators)
