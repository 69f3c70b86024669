"""The data sets that the shipped potential is trained on, and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("train_mlearn")


@pytest.mark.parametrize("densities", [False, True])
def test_every_file_has_a_weight_and_one_is_optional(script, tmp_path, densities):
    if densities:
        (tmp_path / "Mo_densities.extxyz.xz").touch()
    sets = script.data(tmp_path)["train"]
    weights = {Path(each["paths"]).name.removesuffix(".extxyz.xz"): each["weight"] for each in sets}
    kinds = {"bulk", "strained", "surfaces"}
    names = {f"{e}_{kind}" for e in script.ELEMENTS for kind in kinds}
    assert set(weights) == names | ({"Mo_densities"} if densities else set())
    assert weights["Si_strained"] == script.APPEARANCES["strained"]
    assert weights["Li_strained"] == script.OF_ELEMENT["Li_strained"]


def test_one_element_alone(script, tmp_path):
    (tmp_path / "Mo_bulk_taught.extxyz.xz").touch()
    found = script.data(tmp_path, ["Mo"])
    names = [Path(each["paths"]).name.removesuffix(".extxyz.xz") for each in found["train"]]
    assert sorted(names) == ["Mo_bulk", "Mo_bulk_taught", "Mo_strained", "Mo_surfaces"]
    assert [Path(path).parent.name for path in found["test"]] == ["mlearn_Mo"]
