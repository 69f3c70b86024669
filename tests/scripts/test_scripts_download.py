"""Download recipes: their command lines, downloads that go on, checksums, a whole recipe."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from mlip.cli.app import COMMANDS, app
from mlip.datasets import open_dataset
from mlip.demo.data_slabs import write_raw_files

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "download"
RECIPES = ("oc20", "omat24", "salex", "mptrj", "omol25")


def call(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def fetch(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("download/fetch")


def sets_of(recipe: str) -> list[str]:
    """Read the names of the sets from the error about an unknown one."""
    message = call(recipe, "nonsense", "--dry-run").stderr
    return re.findall(r"'([^']+)'", message.partition("choose from")[2]) or [
        name.strip() for name in message.partition("choose from")[2].strip(" )\n").split(",")
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_of_everything_prints_commands_that_exist(recipe: str, tmp_path: Path) -> None:
    names = sets_of(recipe)
    result = call(recipe, *names, "--out", str(tmp_path / "data"), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "data").exists()
    lines = [line[2:] for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert sum(line.startswith("curl ") for line in lines) == len(names)
    group = typer.main.get_command(app)
    for line in lines:
        words = shlex.split(line)
        if words[0] != "mlip":
            assert words[0] in {"curl", "tar"}
            continue
        assert words[1] in COMMANDS
        with group.make_context("mlip", words[1:], resilient_parsing=False) as context:
            context.meta["mlip.load"] = True
            command = group.get_command(context, words[1])
            command.make_context(words[1], words[2:], parent=context).close()


def test_checksums_are_md5_sums(load_script: Callable[[str], ModuleType]) -> None:
    oc20 = load_script("download/oc20")
    sums = [md5 for _, _, md5 in oc20.S2EF.values()] + [oc20.IS2RE.md5]
    sums.append(load_script("download/mptrj").ARCHIVE.md5)
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums)
    assert len(set(sums)) == len(sums)


def test_a_download_goes_on_and_is_verified(fetch: ModuleType, tmp_path: Path) -> None:
    source, target = tmp_path / "far" / "set.tar", tmp_path / "near" / "set.tar"
    source.parent.mkdir()
    target.parent.mkdir()
    content = os.urandom(100_000)
    source.write_bytes(content)
    fetch.part_of(target).write_bytes(content[:30_000])
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    fetch.download(fetch.Archive(source.as_uri(), 0.1, 0.1, md5), target)
    assert target.read_bytes() == content
    assert not fetch.part_of(target).exists()


def test_a_wrong_checksum_gives_no_file(fetch: ModuleType, tmp_path: Path) -> None:
    source, target = tmp_path / "set.tar", tmp_path / "copy.tar"
    source.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"MD5 is .*, expected 0000.*delete it"):
        fetch.download(fetch.Archive(source.as_uri(), 0.1, 0.1, "0" * 32), target)
    assert not target.exists()


def test_a_missing_file_stops_the_recipe(fetch: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="curl ended with exit code"):
        fetch.download(fetch.Archive((tmp_path / "no.tar").as_uri(), 0.1, 0.1), tmp_path / "x")


def test_a_full_disk_is_noticed_before_the_download(fetch: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"1000000000\.0 are needed: choose --out"):
        fetch.check_space(tmp_path / "not" / "yet", 1e9)


def test_a_whole_recipe(tmp_path: Path) -> None:
    """OC20's recipe on an archive of the same layout, from this disk instead of the network."""
    inner = tmp_path / "far" / "s2ef_train_200K" / "s2ef_train_200K"
    write_raw_files(inner, systems=2, frames=2, files=1, seed=1)
    subprocess.run(["xz", *map(str, inner.iterdir())], check=True)
    with tarfile.open(tmp_path / "far" / "s2ef_train_200K.tar", "w") as archive:
        archive.add(inner.parent, "s2ef_train_200K")
    content = (tmp_path / "far" / "s2ef_train_200K.tar").read_bytes()
    recipe = tmp_path / "oc20.py"
    text = (FOLDER / "oc20.py").read_text()
    published = re.search(r'"train_200K": \(.*"([0-9a-f]{32})"\)', text)
    assert published is not None
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    recipe.write_text(text.replace(published[1], md5))
    (tmp_path / "fetch.py").write_text(
        (FOLDER / "fetch.py")
        .read_text()
        .replace(
            "https://dl.fbaipublicfiles.com/opencatalystproject/data", (tmp_path / "far").as_uri()
        )
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(recipe), "s2ef/train_200K", "--out", str(tmp_path / "data")]
    result = subprocess.run(
        [*command, "--workers", "1"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    store = open_dataset(tmp_path / "data" / "oc20" / "s2ef" / "train_200K.lmdb")
    assert len(store) == 4
    assert store.facts.energy_convention == "adsorption"
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert again.returncode == 0
    assert "is there" in again.stdout
    assert "$" not in again.stdout
