"""Settings: strictness, overrides, YAML in and out."""

from __future__ import annotations

import pytest

from mlip.errors import InputError
from mlip.training.config import TrainConfig, build_config, load_config, write_config

DATA = {"data": {"train": "a.extxyz"}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**DATA, "epoch": 3}, r"'epoch'.*'epochs'"),
        ({**DATA, "loss": {"force_weight": 3}}, r"'loss.force_weight'.*'forces_weight'"),
        ({**DATA, "optimizer": {"zzz": 3}}, r"'optimizer.zzz'.*known: lr"),
        ({**DATA, "optimizer": {"lr": -1}}, r"optimizer.lr.*greater than 0.*-1"),
        ({**DATA, "epochs": "many"}, r"epochs.*integer.*many"),
        ({**DATA, "precision": "half"}, r"precision.*float32"),
        ({**DATA, "loss": dict.fromkeys(("energy_weight", "forces_weight", "stress_weight"), 0)},
         "nothing would be learned"),
        ({"epochs": 3}, "data"),
    ],
)  # fmt: skip
def test_bad_settings_name_the_setting(values: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_config(values)


def test_overrides_replace_single_entries() -> None:
    changes = ["loss.kind=l1", "optimizer.lr=1e-4", "data.valid=[x.db, y.db]", "model.cutoff=6"]
    config = build_config(DATA, changes)
    assert config.loss.kind == "l1"
    assert config.optimizer.lr == 1e-4  # YAML 1.1 takes 1e-4 for a text
    assert config.data.valid == ("x.db", "y.db")
    assert config.model == {"name": "facet", "cutoff": 6}
    assert config.loss.forces_weight == TrainConfig.model_validate(DATA).loss.forces_weight


@pytest.mark.parametrize("override", ["epochs", "=3", "epochs.x=3", "epochs=[1"])
def test_bad_overrides_are_quoted(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        build_config({**DATA, "epochs": 3}, [override])


def test_written_settings_read_back_equal(tmp_path) -> None:
    config = build_config(
        DATA, ["optimizer.lr=1e-7", "model.hidden=[[4, 2], [4, 2]]", "reference_energies={Cu: -1}"]
    )
    write_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("data: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"bad.yaml.*{said}"):
        load_config(path)
    with pytest.raises(InputError, match=r"none\.yaml not found"):
        load_config(tmp_path / "none.yaml")
