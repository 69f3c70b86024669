"""The words: links lead somewhere, examples run, documented commands and settings exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mlip.cli.app import COMMANDS, app
from mlip.potential import shipped_potentials
from mlip.training.config import apply_override, build_config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "docs", "data", "data/pretrained", "kernels")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def documented_commands() -> list[str]:
    """Collect every ``mlip …`` line of the pages and the examples in tables."""
    lines = []
    for page in PAGES:
        lines += [line for block in blocks(page, "bash") for line in block.splitlines()]
        lines += re.findall(r"`(mlip [a-z]+ [^`]+)`", page.read_text(encoding="utf-8"))
    commands = [line.split("#")[0].strip() for line in lines]
    return sorted({line for line in commands if line.startswith("mlip ")})


@pytest.fixture(scope="module")
def group() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line: str, group: Any) -> None:
    """Every flag exists and every argument has its place; nothing is run."""
    name, *arguments = shlex.split(line)[1:]
    if name == "COMMAND":
        return
    assert name in COMMANDS
    with group.make_context("mlip", [name, *arguments], resilient_parsing=False) as context:
        context.meta["mlip.load"] = True
        command = group.get_command(context, name)
        command.make_context(name, list(arguments), parent=context).close()


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`mlip {name}`" not in text] == []


def test_documented_configuration_is_valid() -> None:
    initial, block, several, denoising = blocks(ROOT / "docs" / "training.md", "yaml")
    for part in (initial, denoising):
        build_config({"data": {"train": "a"}, **yaml.safe_load(part)})
    config = build_config(yaml.safe_load(block))
    assert config.data.test == ("test.extxyz",)
    assert len(build_config(yaml.safe_load(several)).data.train) == 2
    for override in re.findall(r"--set (\S+=\S+)", (ROOT / "docs/training.md").read_text()):
        values = yaml.safe_load(block)
        if override != "a.b=c`":
            apply_override(values, override)
            build_config(values)


@pytest.mark.skipif("mlearn-facet" not in shipped_potentials(), reason="no potential is shipped")
def test_readme_example_runs() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line]) <= 12
    result = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "converged" in result.stdout
    assert "completed" in result.stdout
