"""Bias-free multilayer perceptron with the options of the published models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mlip.nn.equivariant import normalized_shifted_softplus, normalized_silu

Activation = Literal["silu", "normalized_silu", "normalized_shifted_softplus", "identity"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "normalized_silu": normalized_silu,
    "normalized_shifted_softplus": normalized_shifted_softplus,
    "identity": lambda x: x,
}


class MLP(nn.Module):
    """Dense layers x · W with an activation after each, optionally a layer norm between them.

    Weights are stored (in, out) and start with variance 1/in.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: Activation = "silu",
        final_activation: Activation = "identity",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.randn(n_in, n_out) / math.sqrt(n_in))
            for n_in, n_out in itertools.pairwise(widths)
        )
        self.norm_scales = nn.ParameterList(
            nn.Parameter(torch.ones(width)) for width in (widths[1:-1] if normalize else ())
        )
        self.activation = ACTIVATIONS[activation]
        self.final_activation = ACTIVATIONS[final_activation]
        self.final_is_linear = final_activation == "identity"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., widths[0]] to [..., widths[-1]]."""
        return self.final_activation(self.hidden(x) @ self.kernels[-1])

    def hidden(self, x: Tensor) -> Tensor:
        """Map [..., widths[0]] to the input of the last layer, [..., widths[-2]]."""
        for i, kernel in enumerate(list(self.kernels)[:-1]):
            x = self.activation(x @ kernel)
            if i < len(self.norm_scales):
                scale = self.norm_scales[i]
                x = nn.functional.layer_norm(x, scale.shape, weight=scale, eps=1e-6)
        return x
