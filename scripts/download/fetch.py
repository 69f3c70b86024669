"""What the recipes of this folder share: download, verify, unpack, then `mlip convert` and `check`.

A recipe says where a data set lies and how it is converted; this file does it. Every command is
printed before it runs, so that a recipe can be followed by hand; --dry-run only prints.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

GB = 1e9
META = "https://dl.fbaipublicfiles.com/opencatalystproject/data"
# Disk for an archive of .aselmdb files, their copy and the store, as a multiple of the archive: the
# rows are compressed one by one, so that an archive is hardly smaller than its content.
DISK = 3.2


class Archive(NamedTuple):
    """A file to download.

    url: where it lies. size: GB, as published. disk: GB that archive, files and store need in all,
    estimated. md5: as published; None where no checksum is. file: its name if the address has none.
    """

    url: str
    size: float
    disk: float
    md5: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        return self.file or self.url.rsplit("/", 1)[-1]


class Conversion(NamedTuple):
    """What becomes of the files: a pattern, the output, and flags that say what they hold."""

    pattern: str
    output: Path
    flags: tuple[str, ...] = ()


def parser(description: str, sets: Iterable[str]) -> argparse.ArgumentParser:
    """Give the command line that every recipe has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("sets", nargs="+", choices=list(sets), metavar="SET", help=", ".join(sets))
    made.add_argument("--out", type=Path, default=Path("data-sets"), help="folder for everything")
    made.add_argument("--workers", type=int, default=4, help="processes that convert")
    made.add_argument("--dry-run", action="store_true", help="print what would be done")
    return made


def run_recipe(
    archive: Archive, folder: Path, conversion: Conversion, arguments: argparse.Namespace
) -> None:
    """Download, verify and unpack an archive into a folder, then convert and check its files."""
    dry, output = arguments.dry_run, str(conversion.output)
    if conversion.output.exists():
        print(f"# {output} is there")
        return
    size, disk = archive.size, archive.disk
    print(f"\n# {archive.name}: {size:.3g} GB to load, {disk:.3g} GB of disk in all")
    target = folder / archive.name
    if not dry:
        if not target.exists() and not part_of(target).exists():
            check_space(folder, disk)
        folder.mkdir(parents=True, exist_ok=True)
    download(archive, target, dry)
    if archive.name.endswith((".tar", ".tar.gz")):
        run(["tar", "-xf", str(target), "-C", str(folder)], dry)
    how = [*conversion.flags, "--workers", str(arguments.workers), "--resume"]
    run(["mlip", "convert", conversion.pattern, output, *how], dry)
    run(["mlip", "check", output], dry)


def check_space(folder: Path, gigabytes: float) -> None:
    """Stop if the disk that holds a folder (which may not exist yet) is too small."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free / GB
    if free < gigabytes:
        sys.exit(f"{folder}: {free:.1f} GB are free, {gigabytes:.1f} are needed: choose --out")


def download(archive: Archive, target: Path, dry_run: bool = False) -> None:
    """Download a file with curl, going on where an earlier try stopped, and verify it."""
    if target.exists():
        print(f"# {target} is there")
        return
    part = part_of(target)
    curl = ["curl", "--location", "--fail", "--retry", "10", "--continue-at", "-"]
    run([*curl, "--output", str(part), archive.url], dry_run)
    if archive.md5 is None:
        print("# no checksum is published for it; unpacking and mlip check will notice damage")
    else:
        print(f"# expect MD5 {archive.md5}")
    if dry_run:
        return
    if archive.md5 is not None and (found := md5_of(part)) != archive.md5:
        sys.exit(f"{part}: MD5 is {found}, expected {archive.md5}: delete it and start again")
    part.replace(target)


def part_of(target: Path) -> Path:
    """Name the file that a download grows in."""
    return target.with_name(target.name + ".part")


def md5_of(path: Path) -> str:
    """Give the MD5 checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def run(command: Sequence[str], dry_run: bool = False) -> None:
    """Print a command and run it; stop if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    if dry_run:
        return
    try:
        code = subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed")
    # `mlip check` and `mlip convert` end with 1 when they had something to complain about.
    if code != 0 and not (command[0] == "mlip" and code == 1):
        sys.exit(f"{command[0]} ended with exit code {code}; run the recipe again to go on")
