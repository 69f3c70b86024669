"""The average of potentials has the mean of their weights, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch

from mlip.errors import InputError
from mlip.models import create_model
from mlip.potential import Potential

SETTINGS = {"elements": [13, 29], "cutoff": 4.0, "hidden": [[4, 3]], "message": [4, 4]}
UNITS = {"reference_energies": {13: -3.5, 29: -4.0}, "scale": {13: 0.7, 29: 1.3}}


@pytest.fixture(scope="module")
def average(load_script):
    return load_script("average_potentials").average


def potential(seed: int, **changes) -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model("facet", {**SETTINGS, **changes.pop("settings", {})})
    return Potential(model, **{**UNITS, **changes}, metadata={"best_epoch": seed, "licence": "MIT"})


def test_mean_of_three(average):
    found = average([potential(seed) for seed in (1, 2, 3)])
    states = [potential(seed).state_dict() for seed in (1, 2, 3)]
    for name, value in found.state_dict().items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)
    assert found.metadata["licence"] == "MIT"
    assert "best_epoch" not in found.metadata


@pytest.mark.parametrize(
    "changes", [{"scale": {13: 0.7, 29: 1.0}}, {"settings": {"message": [4, 3]}}]
)
def test_others_are_refused(average, changes):
    with pytest.raises(InputError, match="differ"):
        average([potential(1), potential(1, **changes)])
