"""``mlip info``: print the header of a potential's file, or versions and devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = (
    "torch", "torch-geometric", "ase", "numpy", "numba", "lmdb", "vesin", "safetensors",
    "lightning", "matplotlib", "pymatgen", "cupy-cuda13x",
)  # fmt: skip


def info(
    potential: Annotated[
        str | None, typer.Argument(help="File of a potential, or name of a shipped one.")
    ] = None,
    backends: Annotated[
        bool, typer.Option("--backends", help="Say which kernels this machine can run, and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a potential's card, or versions and devices.

    With a potential, --backends runs it once on a few atoms: what is compiled then is kept on disk.
    """
    if potential is not None:
        facts = _backends_of(potential) if backends else _card(potential)
    else:
        facts = _backends() if backends else _environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _print(facts)


def _card(potential: str) -> dict[str, Any]:
    from mlip.checkpoint import read_header
    from mlip.errors import CheckpointError
    from mlip.potential import shipped_potentials

    shipped = shipped_potentials()
    path = Path(potential)
    if not path.is_file():
        if potential not in shipped:
            raise CheckpointError(
                f"{potential}: no such file, and no shipped potential has this name; shipped are: "
                f"{', '.join(shipped) or '(none)'}"
            )
        path = shipped[potential]
    header = read_header(path)
    direct = "direct_scale" in header
    return {
        "file": f"{path} ({path.stat().st_size / 1e6:.2f} MB)",
        "forces": "direct, not derivatives of the energy"
        if direct
        else "derivatives of the energy",
        **header,
    }


def _backends_of(name: str) -> dict[str, Any]:
    """Run a potential on eight atoms and say what ran each of its operators, and why."""
    import time

    import numpy as np
    from ase import Atoms

    from mlip.graph import atoms_to_graph
    from mlip.ops.backend import decisions, default_backend
    from mlip.potential import load_potential

    potential = load_potential(name)
    numbers = np.resize(potential.elements, 8)
    atoms = Atoms(numbers, np.indices((2, 2, 2)).reshape(3, 8).T * 2.8, cell=[5.6] * 3, pbc=True)
    atoms.rattle(0.1, seed=0)
    begin = time.perf_counter()
    potential(atoms_to_graph(atoms, potential.cutoff))
    facts: dict[str, Any] = {
        "chosen": f"{default_backend()} (by the variable MLIP_BACKEND; auto if it is not set)",
        "first call": f"{time.perf_counter() - begin:.1f} s with compilation or compiled code read",
    }
    return {**facts, "operators": decisions()}


def _backends() -> dict[str, Any]:
    from mlip.ops.backend import cuda_missing, default_backend, numba_missing
    from mlip.ops.cpu import cache, team, threads

    missing = numba_missing()
    facts: dict[str, Any] = {
        "chosen": f"{default_backend()} (auto, torch, numba or cuda by the variable MLIP_BACKEND)",
        "torch": "always there; every operator, every device",
        "numba": f"cannot run: {missing}"
        if missing
        else "CPU, float32 and float64: convolution (any degrees), products on the sphere, "
        "rotations of EquiformerV3, shared operators of TDN, sums over edges, forces",
    }
    if missing is None:
        from llvmlite import binding

        from mlip.ops.cpu.simd import register_bytes

        facts["processor"] = (
            f"{binding.get_host_cpu_name()}, vectors of {8 * register_bytes()} bits, "
            f"{threads.available_threads()} threads "
            f"({'those of PyTorch' if team.is_usable() else 'a pool'})"
        )
        facts["compiled code"] = str(cache.cache_folder())
    reason = cuda_missing()
    facts["cuda"] = (
        f"cannot run: {reason}"
        if reason
        else "float32 and float64: convolution of Facet, rotations of EquiformerV3, shared "
        "operators of TDN, sums over edges, forces and virial; plain PyTorch for the rest"
    )
    return facts


def _environment() -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from mlip import __version__
    from mlip.potential import shipped_potentials

    facts: dict[str, Any] = {
        "mlip": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu threads"] = torch.get_num_threads()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    facts["gpus"] = [torch.cuda.get_device_name(k) for k in gpus] or "none"
    facts["shipped potentials"] = sorted(shipped_potentials()) or "none"
    return facts


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(_text(value)))
    Console().print(table)


def _text(value: Any) -> str:
    """Show nested facts one a line, short lists on one."""
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_inline(item)}" for key, item in value.items()) or "–"
    return _inline(value)


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    return str(value)
