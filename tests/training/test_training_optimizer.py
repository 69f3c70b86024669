"""Which weights decay, and the learning rate of a run."""

from __future__ import annotations

import math
import re

import pytest
from torch import nn

from mlip.models import create_model
from mlip.training.config import OptimizerConfig, build_config
from mlip.training.optimizer import decayed_names, make_optimizer
from mlip.training.schedule import learning_rate, progress_of
from mlip.training.state import Position

SMALL = {
    "elements": (1, 8), "layers": 1, "lmax": 2, "channels": 6, "attention_hidden": 4, "heads": 2,
    "alpha_channels": 3, "value_channels": 2, "feed_forward_hidden": 5, "edge_channels": 4,
    "prediction": "direct", "denoising": True,
}  # fmt: skip


def test_published_rule_for_equiformer() -> None:
    """Decay on Linear and SO3Linear weights and alpha_dot; not on embeddings, biases, norms."""
    model = create_model("equiformer_v3", SMALL)
    exempt = re.compile(r"bias$|norm|(^|source_|target_)embedding\.weight$")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    layer_norms = {  # of the radial MLPs, whatever their names
        f"{prefix}.weight" for prefix, m in model.named_modules() if isinstance(m, nn.LayerNorm)
    }
    expected = {n for n in shapes if not exempt.search(n)} - layer_norms
    assert decayed_names(model) == expected
    assert {"blocks.0.attention.alpha_dot", "force_embedding.weight"} <= expected
    merged = {name for name in shapes if re.search(r"norm(_\d)?\.weight$", name)}
    assert any(len(shapes[name]) == 2 for name in merged), "a norm was meant to be a matrix"


@pytest.mark.parametrize("extra", [{}, {"trainable_cutoff": True, "rescale": "species_sum"}])
def test_facet_decays_matrices_but_the_embedding(extra: dict) -> None:
    model = create_model("facet", {"elements": (1, 8), **extra})
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert decayed_names(model) == matrices - {"embedding"}
    assert "embedding" in matrices


def test_every_weight_is_in_one_group_and_settings_arrive() -> None:
    model = create_model("equiformer_v3", SMALL)
    config = OptimizerConfig(weight_decay=1e-3, eps=1e-6, betas=(0.9, 0.98))
    decay, rest = make_optimizer(model, config).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (1e-3, 0.0)
    assert decay["eps"] == 1e-6
    assert decay["betas"] == (0.9, 0.98)
    together = [id(p) for p in (*decay["params"], *rest["params"])]
    assert sorted(together) == sorted(id(p) for p in model.parameters())


def test_published_schedule() -> None:
    steps, epochs = 50, 4
    config = build_config(
        {
            "data": {"train": "a"}, "epochs": epochs, "optimizer": {"lr": 2e-4},
            "schedule": {"warmup_epochs": 0.1, "warmup_start": 0.2, "lr_min_fraction": 0.01},
        }
    )  # fmt: skip
    for step in range(steps * epochs):
        position = Position(epoch=step // steps, step=step % steps, global_step=step)
        rate = learning_rate(config, position, progress_of(config, position, steps), steps)
        if step < 5:
            factor = 0.2 + 0.8 * step / 5
        else:
            factor = 0.01 + 0.99 * (1 + math.cos(math.pi * step / (steps * epochs))) / 2
        assert rate == pytest.approx(2e-4 * factor, rel=1e-12), step
