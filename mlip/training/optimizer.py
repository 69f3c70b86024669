"""AdamW, and which weights decay: those of linear maps, told by the module that owns them."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from mlip.nn.equivariant import EquivariantLinear
from mlip.nn.graph_attention import EquivariantGraphAttention
from mlip.nn.mlp import MLP
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import SO3Linear
from mlip.training.config import OptimizerConfig

_LINEAR_MAPS = (nn.Linear, SO3Linear, SO2Linear, EquivariantLinear, MLP)


def decayed_names(module: nn.Module) -> set[str]:
    """Name the parameters that weight decay acts on.

    They are the matrices of linear maps and the vectors that attention logits are contracted with;
    not embeddings, biases, and what layer norms, radial bases and gains learn.
    """
    names = set()
    for prefix, owner in module.named_modules():
        if isinstance(owner, _LINEAR_MAPS):
            found = owner.named_parameters(prefix)
            names |= {name for name, parameter in found if parameter.dim() > 1}
        elif isinstance(owner, EquivariantGraphAttention):
            names.add(f"{prefix}.alpha_dot" if prefix else "alpha_dot")
    return names


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """Build AdamW for the parameters of a module that are trained."""
    decays = decayed_names(module)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trained if name in decays],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trained if name not in decays], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        amsgrad=config.amsgrad,
        fused=True,
    )
