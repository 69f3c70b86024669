"""Time calls of other packages' potentials beside ours, at the sizes that those packages publish.

    OMP_NUM_THREADS=1 python scripts/bench/peers.py mace-small=PYTHON nequip-s=PYTHON orb-v3=PYTHON

PYTHON is the interpreter of an environment with that package and the same torch: ``python -m venv
V``, then ``V/bin/pip install torch mace-torch`` (or ``nequip``, ``orb-models``). Energy, forces and
stress of rattled copper through the ASE calculator of each, atoms moved before every call; float32,
random weights, which cost what trained ones do. Sizes differ, and so does what they can learn:

    mace-small, mace-medium    MACE-MP-0 (arXiv 2401.00096): 128×0e, or 128×0e + 128×1o; 6 Å
    nequip-s, nequip-m         presets of its foundation potentials, l = 1 and 2; 6 Å; TorchScript
    orb-v3                     conservative, at most 20 neighbours; 6 Å; torch.compile
    facet-s                    the published size; 6 Å
    mlearn-facet               the one that ships: six elements, 5 Å

Workers take turns, each repeat a process of its own; times are of the processor, one thread.
Memory is what calls add to a process that holds package and model. With --keep-memory processes
keep the memory that they free, as ``mlip`` commands do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from copper import simulation
from sevennet import memory, settings_of_memory, timed
from spread import spread

ELEMENTS = tuple(range(1, 90))
OURS = ("facet-s", "mlearn-facet")
WARMUP = 5  # calls in which TorchScript and torch.compile find their code


def mace(irreps: str) -> Any:
    """Make the calculator of a MACE-MP-0."""
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

    interaction = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=6.0, num_bessel=10, num_polynomial_cutoff=5, max_ell=3, num_interactions=2,
        interaction_cls=interaction, interaction_cls_first=interaction,
        num_elements=len(ELEMENTS), hidden_irreps=o3.Irreps(irreps), MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu, atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=60.0, atomic_numbers=list(ELEMENTS), correlation=3,
        radial_MLP=[64, 64, 64], atomic_inter_scale=1.0, atomic_inter_shift=0.0,
    )  # fmt: skip
    return MACECalculator(models=[model], device="cpu", default_dtype="float32")


def nequip(preset: str) -> Any:
    """Make the calculator of a preset of NequIP, scripted as ``nequip-compile`` does."""
    from ase.data import chemical_symbols
    from e3nn.util.jit import script
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms
    from nequip.model import PresetNequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    names = [chemical_symbols[number] for number in ELEMENTS]
    model = PresetNequIPGNNModel(
        preset=preset, seed=0, model_dtype="float32", r_max=6.0, type_names=names,
        avg_num_neighbors=60.0,
    )  # fmt: skip
    transforms = basic_transforms({}, 6.0, names, {name: name for name in names}, "matscipy")
    return NequIPCalculator(script(model.eval()), device="cpu", transforms=transforms)


def orb() -> Any:
    """Make the calculator of a conservative orb-v3, compiled as its loader does."""
    from orb_models.forcefield.atomic_system import SystemConfig
    from orb_models.forcefield.calculator import ORBCalculator
    from orb_models.forcefield.pretrained import orb_v3_conservative_architecture

    system = SystemConfig(radius=6.0, max_num_neighbors=20)
    model = orb_v3_conservative_architecture(device="cpu", system_config=system)
    model.eval().requires_grad_(False).compile(mode="default", dynamic=True)
    return ORBCalculator(model, device="cpu")


def facet_s() -> Any:
    """Make the calculator of an untrained Facet of the published size."""
    from time_model import UNTRAINED

    from mlip.models import create_model
    from mlip.potential import Potential
    from mlip.simulation.calculator import Calculator

    model = create_model("facet", {**UNTRAINED["facet-s"], "elements": ELEMENTS})
    potential = Potential(model, reference_energies=dict.fromkeys(ELEMENTS, 0.0))
    return Calculator(potential.eval().requires_grad_(False))


def shipped() -> Any:
    """Make the calculator of the potential that ships."""
    from mlip.simulation.calculator import Calculator

    return Calculator("mlearn-facet")


MAKERS: dict[str, Callable[[], Any]] = {
    "mace-small": lambda: mace("128x0e"),
    "mace-medium": lambda: mace("128x0e + 128x1o"),
    "nequip-s": lambda: nequip("S"),
    "nequip-m": lambda: nequip("M"),
    "orb-v3": orb,
    "facet-s": facet_s,
    "mlearn-facet": shipped,
}


def work(name: str, number: int) -> dict[str, float]:
    """Time one potential in this process."""
    import torch

    torch.set_num_threads(1)
    call = simulation(MAKERS[name](), number)
    before = memory()
    return {"seconds": timed(call, WARMUP), "MiB": memory() - before}


def run(python: str, name: str, number: int, environment: dict[str, str]) -> dict[str, float]:
    """Start a worker."""
    if name.startswith("mace"):  # its e3nn reads a table of its own in a way that torch refuses
        environment = {**environment, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command = [python, __file__, "--worker", name, str(number)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"{name}, {number} atoms:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def peer(text: str) -> tuple[str, str]:
    """Read NAME=PYTHON."""
    name, _, python = text.partition("=")
    known = [other for other in MAKERS if other not in OURS]
    if name not in known or not python:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(known)}, =PYTHON")
    return name, python


def main() -> None:
    """Print a table for each number of atoms, or the numbers of one worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", type=peer, metavar="NAME=PYTHON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--atoms", nargs="+", type=int, default=[108, 500])
    parser.add_argument("--keep-memory", action="store_true", help="ask the system for less")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker[0], int(args.worker[1]))))
        return
    environment = {**os.environ, **(settings_of_memory() if args.keep_memory else {})}
    pythons = dict(args.peers) | dict.fromkeys(OURS, sys.executable)
    print("| atoms | potential | call (ms) | times as long as facet-s | memory (MiB) |")
    print("|--:|---|--:|--:|--:|")
    for number in args.atoms:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
        for _ in range(args.repeats):
            for name, python in pythons.items():
                found[name].append(run(python, name, number, environment))
        for name, rows in found.items():
            ratios = [
                row["seconds"] / base["seconds"]
                for row, base in zip(rows, found["facet-s"], strict=True)
            ]
            times = [1e3 * row["seconds"] for row in rows]
            above = statistics.median(row["MiB"] for row in rows)
            print(f"| {number} | {name} | {spread(times, 0)} | {spread(ratios)} | {above:.0f} |")


if __name__ == "__main__":
    main()
