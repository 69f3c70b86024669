"""Small models, and of each architecture one that is put on every back end."""

from __future__ import annotations

from typing import Any

SMALL_EQUIFORMER: dict[str, Any] = {
    "cutoff": 4.2,
    "layers": 2,
    "channels": 6,
    "attention_hidden": 4,
    "heads": 2,
    "alpha_channels": 3,
    "value_channels": 3,
    "feed_forward_hidden": 8,
    "edge_channels": 8,
    "n_radial": 5,
    "average_degree": 20.0,
}
SMALL_TDN: dict[str, Any] = {
    "cutoff": 4.2,
    "layers": 2,
    "channels": 8,
    "heads": 2,
    "n_radial": 5,
    "radial_hidden": (8,),
    "average_degree": 20.0,
}
FACET = (
    "facet",
    {"cutoff": 4.2, "hidden": ((16, 16, 16), (16, 16)), "embedding": 8, "outputs": 8},
)
EQUIFORMER_V3 = (
    "equiformer_v3",
    {
        **SMALL_EQUIFORMER,
        "lmax": 2,
        "mmax": 1,
        "layers": 1,
        "channels": 16,
        "attention_hidden": 16,
        "feed_forward_hidden": 16,
        "value_channels": 8,
    },
)
TDN = ("tdn", {**SMALL_TDN, "lmax": 2, "layers": 1, "channels": 16})
