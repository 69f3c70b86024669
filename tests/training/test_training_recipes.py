"""Recipes of EquiformerV3: all load; the small ones train, hand over, resume, feed from workers."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.io import write
from rich.console import Console
from torch import Tensor

from mlip.datasets.convert import convert
from mlip.errors import InputError
from mlip.models import create_model
from mlip.potential import Potential
from mlip.training.choose import check_model_settings
from mlip.training.config import TrainConfig, build_config, load_config
from mlip.training.report import read_metrics
from mlip.training.run import POTENTIAL_FILE, resume, train
from mlip.training.start import check_denoising, settings_of_initial
from mlip.training.state import below, read_newest_state

QUIET = Console(quiet=True)
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TINY = [  # a smaller model of the same kind, for the time of the tests
    "model.cutoff=4.0", "model.layers=1", "model.lmax=2", "model.channels=8", "model.heads=2",
    "model.attention_hidden=4", "model.alpha_channels=4", "model.value_channels=4",
    "model.feed_forward_hidden=8", "model.edge_channels=8", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, emt_frame: Callable[..., Atoms]) -> Path:
    """Store of twelve frames of 4 or 8 atoms."""
    folder = tmp_path_factory.mktemp("recipes")
    write(folder / "frames.extxyz", [emt_frame(i, size=(1 + i % 3 // 2, 1, 1)) for i in range(12)])
    convert(folder / "frames.extxyz", folder / "frames.lmdb")
    return folder / "frames.lmdb"


def recipe(name: str, data: Path, out: Path, *changes: str) -> TrainConfig:
    common = [f"data.train={data}", f"out={out}", "device=cpu"]
    return load_config(RECIPES / f"{name}.yaml", [*common, *changes])


def direct(data: Path, out: Path, *changes: str) -> TrainConfig:
    few = ["epochs=3", "batch.max_edges=250", "data.valid_fraction=0.2"]
    return recipe("equiformer_v3_small_direct", data, out, *TINY, *few, *changes)


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Result of a short first stage."""
    out = tmp_path_factory.mktemp("stage") / "direct"
    return train(direct(data, out), console=QUIET).path


def test_published_sizes_come_out_of_the_recipes(data: Path, tmp_path: Path) -> None:
    """Parameter counts of the official models, without their tables for unused elements."""
    assert len(NAMES) == 6
    elements, tables = range(1, 90), 128 - 89
    for name, published, n_attentions in (
        ("equiformer_v3_mptrj_direct", 34_859_044, 9),
        ("equiformer_v3_omat24_direct", 34_928_164, 9),
    ):
        config = recipe(name, data, tmp_path)
        with torch.device("meta"):
            model = create_model(
                "equiformer_v3",
                {**{k: v for k, v in config.model.items() if k != "name"}, "elements": elements},
            )
        found = sum(p.numel() for p in model.parameters())
        rows = 128 + 2 * 128 * (n_attentions + 1)  # sphere embedding; two tables per radial MLP
        assert found + tables * rows == published, name


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads(name: str, data: Path, tmp_path: Path) -> None:
    config = recipe(name, data, tmp_path)
    assert config.loss.normalised
    assert (config.denoising is not None) == name.endswith("direct")
    if config.initial is None:
        check_model_settings(config.model)
        check_denoising(config)
    else:
        assert config.initial.split("/")[1] == name.replace("gradient", "direct")
        assert "name" not in config.model


@pytest.mark.parametrize("size", [[], TINY])
def test_both_stages_run_and_hand_over(data: Path, tmp_path: Path, size: list[str]) -> None:
    steps = ["max_steps=2", "batch.max_edges=700"]
    first = recipe("equiformer_v3_small_direct", data, tmp_path / "direct", *size, *steps)
    one = train(first, console=QUIET)
    assert read_metrics(one.folder)[-1]["step"] == 2
    start = f"initial={one.path}"
    second = recipe("equiformer_v3_small_gradient", data, tmp_path / "gradient", start, *steps)
    two = train(second, console=QUIET)
    assert read_metrics(two.folder)[-1]["step"] == 2
    models = [Potential.load(result.path) for result in (one, two)]
    assert [model.conservative for model in models] == [False, True]
    assert models[1].scale == models[0].scale
    if not size:  # what the comments of the recipes say
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        assert [round(count, -4) for count in counts] == [1_310_000, 950_000]


def test_hand_over_keeps_weights_and_resets_the_head(
    pretrained: Path, data: Path, tmp_path: Path
) -> None:
    changes = [
        f"initial={pretrained}", "optimizer.lr=1e-12", "epochs=1", "precision=float64",
        "ema_decay=0",
    ]  # fmt: skip
    states: list[dict[str, Tensor]] = [dict(Potential.load(pretrained).model.state_dict())]
    for seed in (0, 1):
        out = tmp_path / f"seed{seed}"
        config = recipe("equiformer_v3_small_gradient", data, out, *changes, f"seed={seed}")
        after = Potential.load(train(config, console=QUIET).path)
        assert after.scale == Potential.load(pretrained).scale, "another split, the same scale"
        assert after.metadata["training_settings"]["initial"] == pretrained.name, "no folder"
        states.append(dict(after.model.state_dict()))
    before, *found = states
    heads = ("force_head", "stress_head", "noise_head", "force_embedding")
    assert {name for name in before if not name.startswith(heads)} == set(found[0])
    for name in found[0]:
        same = all(torch.allclose(each[name], before[name], atol=1e-7) for each in found)
        assert same != name.startswith("energy_head"), name
    name = "energy_head.linear_1.weight"
    assert not torch.allclose(found[0][name], found[1][name], atol=1e-3), "seed has no influence"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["initial_reset=[energy_haed]"], "'energy_haed': did you mean 'energy_head'"),
        (["initial_reset=[zzz]"], "there are frames, embedding"),
        (["model.channels=16"], r"do not fit.*embedding\.weight has shape \[2, 8\], expected"),
        (["model.layers=2"], r"blocks\.1\..* is missing"),
        (["model.chanels=8"], "'chanels'.*'channels'"),
        (["model.name=facet"], "model.name is 'facet'.*equiformer_v3"),
        (["model.denoising=true"], "denoising needs prediction: direct"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    pretrained: Path, data: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    initial = f"initial={pretrained}"
    config = recipe("equiformer_v3_small_gradient", data, tmp_path / "x", initial, *changes)
    with pytest.raises(InputError, match=said):
        train(config, console=QUIET)


def test_layers_are_not_dropped_in_silence(data: Path, tmp_path: Path) -> None:
    two = train(direct(data, tmp_path / "two", "model.layers=2", "max_steps=1"), console=QUIET)
    config = recipe(
        "equiformer_v3_small_gradient", data, tmp_path / "x", f"initial={two.path}",
        "model.layers=1",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"blocks\.1\..* has no place"):
        train(config, console=QUIET)


def test_model_of_initial_stays_where_nothing_is_said(pretrained: Path) -> None:
    start = Potential.load(pretrained)
    config = build_config({"data": {"train": "a"}, "initial": str(pretrained)})
    found = settings_of_initial(start, config).model
    assert found == {"name": "equiformer_v3", **start.model.config.model_dump(mode="json")}
    with pytest.raises(InputError, match="initial_reset needs initial"):
        build_config({"data": {"train": "a"}, "initial_reset": ["energy_head"]})


def steps_of(folder: Path) -> bytes:
    return (folder / "steps.csv").read_bytes()


def test_workers_and_memory_change_no_bit_of_a_run_with_noise(
    pretrained: Path, data: Path, tmp_path: Path
) -> None:
    expected = steps_of(pretrained.parent)
    assert expected.count(b"\n") > 3 * 3
    for workers in (0, 2):
        out = tmp_path / f"workers{workers}"
        changes = ["data.memory_limit_GB=0", f"data.workers={workers}", "data.start_method=fork"]
        train(direct(data, out, *changes), console=QUIET)
        assert steps_of(out) == expected, workers
        assert not multiprocessing.active_children(), "workers outlive the run"
    train(direct(data, tmp_path / "quiet", "denoising.probability=0"), console=QUIET)
    assert steps_of(tmp_path / "quiet") != expected, "there was no noise"


def test_killed_with_noise_resumes_bit_for_bit(
    pretrained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlip.training.module import TrainingModule

    count = TrainingModule.on_train_batch_end

    def stop(module: TrainingModule, *args: Any) -> None:
        count(module, *args)
        if module.position.global_step == 5:
            raise RuntimeError("power cut")

    monkeypatch.setattr(TrainingModule, "on_train_batch_end", stop)
    out = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="power cut"):
        train(direct(data, out, "checkpoint.steps=2"), console=QUIET)
    monkeypatch.undo()
    position, _ = read_newest_state(out)
    assert position.global_step == 4
    resume(out, console=QUIET)
    assert steps_of(out) == steps_of(pretrained.parent)


def test_validation_has_no_noise_and_training_no_derivatives(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[bool]] = {True: [], False: []}
    forward = Potential.forward

    def look(self: Potential, graph: Any, **options: Any) -> Any:
        seen[self.training].append("noise" in graph)
        found = forward(self, graph, **options)
        assert found.forces.requires_grad == self.training
        if self.training:
            assert not graph.positions.requires_grad
        return found

    monkeypatch.setattr(Potential, "forward", look)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a derivative"))
    train(direct(data, tmp_path / "run", "denoising.probability=1"), console=QUIET)
    assert all(seen[True])
    assert seen[True]
    assert seen[False]
    assert not any(seen[False])


def test_noise_head_learns_where_force_head_does_not(data: Path, tmp_path: Path) -> None:
    always = ["denoising.probability=1", "denoising.ratio=0.7", "denoising.strict_max_ratio=1"]
    alone = [*always, "loss.forces_weight=1e-30", "denoising.weight=1", "ema_decay=0"]
    result = train(direct(data, tmp_path / "run", *alone), console=QUIET)
    _, tensors = read_newest_state(result.folder)
    found = below("optimizer", tensors)
    noise, force = (
        float(found[f"model.{head}.projection.weight/exp_avg_sq"].sum())
        for head in ("noise_head", "force_head")
    )
    assert noise > 1e-12 > force


def test_large_structures_are_left_out_of_training(data: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    config = direct(data, tmp_path / "run", "data.max_edges=100", f"data.valid={data}", "epochs=1")
    train(config, console=console)
    text = console.export_text()
    assert "train: 8 structures," in text
    assert "train: 4 structures left out (data.max_edges)" in text
    assert "valid: 12 structures" in text
    assert "direct forces with denoising" in text


def test_script_trains_both_stages_and_from_scratch(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load_script: Callable[[str], ModuleType],
) -> None:
    script = load_script("train_equiformer_v3")
    folder = data.parent
    for out, first in (("two", "1"), ("scratch", "0")):
        changes = [part for change in TINY if out == "scratch" for part in ("--set", change)]
        command = [
            "x", str(folder), "--steps", first, "1", "--out", str(tmp_path / out),
            "--train", "frames.extxyz", "--test", "frames.extxyz", *changes,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        assert Potential.load(tmp_path / out / "gradient" / POTENTIAL_FILE).conservative
        assert (tmp_path / out / "direct").exists() == (first == "1")
    with pytest.raises(InputError, match="holds no nothing"):
        script.data_files(folder, "nothing*")
