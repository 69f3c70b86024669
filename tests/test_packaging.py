"""The package as installed: every folder listed, shipped files readable, no forbidden pins."""

from __future__ import annotations

import configparser
import importlib.resources
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def metadata(repository: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def packages_on_disk(repository: Path) -> set[str]:
    """Name every folder with an ``__init__.py`` as it is imported once installed."""
    roots = {"mlip": "mlip", "data": "mlip.data", "kernels": "mlip.kernels"}
    found = set()
    for folder, name in roots.items():
        for file in (repository / folder).rglob("__init__.py"):
            parts = file.parent.relative_to(repository / folder).parts
            found.add(".".join((name, *parts)))
    return found


def test_every_package_is_listed(metadata: configparser.ConfigParser, repository: Path) -> None:
    listed = set(lines(metadata["options"]["packages"]))
    on_disk = packages_on_disk(repository)
    assert on_disk - listed == set(), "add these to [options] packages in setup.cfg"
    assert listed - on_disk == set(), "setup.cfg lists packages without __init__.py"


@pytest.mark.parametrize("package", ["mlip.data", "mlip.data.pretrained", "mlip.kernels"])
def test_shipped_files_are_readable(package: str, repository: Path) -> None:
    files = importlib.resources.files(package)
    folder = repository.joinpath(*package.split(".")[1:])
    shipped = {entry.name for entry in files.iterdir()} - {"__pycache__"}
    expected = {entry.name for entry in folder.iterdir()} - {"__pycache__"}
    assert shipped == expected
    assert "Holds no code" in (files / "__init__.py").read_text(encoding="utf-8")


def test_every_shipped_file_has_a_pattern(
    metadata: configparser.ConfigParser, repository: Path
) -> None:
    """A new sub-folder of data/ or kernels/ without a pattern would miss in the wheel."""
    patterns = metadata["options.package_data"]
    roots = {"data": "mlip.data", "kernels": "mlip.kernels"}
    for folder, name in roots.items():
        for file in (repository / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                parts = file.parent.relative_to(repository / folder).parts
                assert patterns.get(".".join((name, *parts))) == "*", file


def test_no_upper_pins(metadata: configparser.ConfigParser) -> None:
    """Upper pins are what stops two packages from living in one environment."""
    requirements = lines(metadata["options"]["install_requires"])
    for extra in metadata["options.extras_require"].values():
        requirements += lines(extra)
    pinned = [line for line in requirements if re.search(r"<|==|~=", line)]
    assert pinned == []


def test_constraints_pin_every_direct_dependency(
    metadata: configparser.ConfigParser, repository: Path
) -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in lines((repository / "constraints.txt").read_text(encoding="utf-8"))
        if not line.startswith("#")
    }
    wanted = lines(metadata["options"]["install_requires"])
    for extra in metadata["options.extras_require"].values():
        wanted += lines(extra)
    names = {re.split(r"[ <>=\[]", line)[0].lower() for line in wanted} - {"mlip"}
    assert names - pins == set()
