"""ASE calculator of a potential: energies, forces and stress of one structure at a time.

Batches of structures are evaluated by predict.py, not here.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators import calculator as ase_calculator
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress

from mlip.errors import CheckpointError, InputError
from mlip.graph import as_atoms
from mlip.potential import Potential, load_potential
from mlip.simulation.conservation import IN_GENERAL, warn_of_direct_forces
from mlip.simulation.verlet_list import VerletList

logger = logging.getLogger("mlip")

DERIVATIVES = frozenset({"forces", "stress"})
SKIN = 0.5  # Å; atoms of a crystal at room temperature move half of it in some 100 fs


class Calculator(ase_calculator.Calculator):
    """Give ASE the energy, forces, stress and atomic energies of a potential.

    Forces and stress are derivatives of the energy, and energies alone are cheaper: no backward
    pass. A potential that predicts forces directly gives everything in any case; the first forces
    come with one NonConservativeWarning, unless ``run_md`` or ``relax`` has told more already.
    Stress is defined for structures periodic in three directions only. Atoms are never changed.

    Args:
        potential: a potential, the path of its file, or the name of a shipped one. Change the
            weights of one in use by optimisers, ``load_state_dict`` or operations in place: what is
            written through ``weight.data`` may not be noticed.
        device: where to compute, for instance ``"cuda"``; default the CPU, or where a potential
            given as object already is.
        dtype: ``"float32"`` or ``"float64"``; default float32, or what a potential given as
            object already has. Energies are summed in float64 either way.
        skin: extra neighbour distance, Å; neighbours are searched again only after atoms moved
            half of it, where one structure follows another. It changes no result, bit for bit; 0
            searches each time.
        tabulate: take splines for the radial networks of EquiformerV3, made when elements first
            occur; the error is told to the logger "mlip", about 1e-8 of the weights.

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
        InputError: unknown dtype, a device that is not there, a negative skin, or ``tabulate`` for
            a model that has nothing to tabulate.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]  # noqa: RUF012
    atoms: Atoms | None

    def __init__(
        self,
        potential: Potential | str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        skin: float = SKIN,
        tabulate: bool = False,
    ) -> None:
        super().__init__()
        self.announced = False  # that forces are direct, here or by who runs the calculator
        self._source: str | None = None
        if isinstance(potential, Potential):
            self.potential = _converted(potential, device, dtype)
        else:
            path = Path(potential)
            check_device(device or "cpu")
            self._source = str(path.resolve()) if path.is_file() else str(potential)
            self.potential = load_potential(self._source, device or "cpu", dtype or "float32")
            self.potential.requires_grad_(False)
        if tabulate:
            self.potential = _tabulated(self.potential)
        self._neighbours = VerletList(self.potential.cutoff, skin)
        self.parameters.update(
            potential=self._source or type(self.potential.model).__name__,
            model_hash=self.potential.model_hash(),
            device=str(self.potential.device),
            dtype=str(self.potential.dtype).removeprefix("torch."),
            skin=float(skin),
            tabulate=tabulate,
        )
        logger.info("%s", self.description)

    @property
    def conservative(self) -> bool:
        """Whether forces and stress are derivatives of the energy: phonon programs may ask."""
        return self.potential.conservative

    @property
    def has_stress(self) -> bool:
        """Whether there is a stress at all: direct forces may come without."""
        return self.potential.has_stress

    @property
    def description(self) -> str:
        """One line: which potential (with the hash of its weights), device, dtype, back end."""
        p = self.parameters
        return (
            f"potential {p['potential']} (hash {p['model_hash']}), device {p['device']}, "
            f"dtype {p['dtype']}, back end {getattr(self.potential.model, 'backend', 'torch')}"
            + (", radial networks as splines" if p["tabulate"] else "")
            + ("" if self.conservative else ", direct forces (not conservative)")
        )

    def calculate(
        self,
        atoms: Any = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = ase_calculator.all_changes,  # noqa: ARG002
    ) -> None:
        """Fill ``results``; asked for energies alone, it leaves forces and stress out.

        Args:
            atoms: ASE atoms or a pymatgen structure.
            properties: names of ``implemented_properties``.
            system_changes: part of ASE's interface, not needed here.

        Raises:
            UnknownElementError: the potential does not know an element of the structure.
            PropertyNotImplementedError: stress of a structure not periodic in three directions, or
                of a potential that predicts none.
            InputError: the structure is empty or has non-finite positions or a flat cell.
        """
        structure = self.atoms if atoms is None else atoms
        if structure is None:
            raise InputError("the calculator has no structure: pass atoms")
        structure = as_atoms(structure)
        if self.atoms is None or self.check_state(structure, 0.0):  # else ASE has copied it
            self.atoms = structure.copy()
        self.results = {}
        periodic = bool(structure.pbc.all())
        if "stress" in properties and not periodic:
            raise PropertyNotImplementedError(
                "stress is defined for structures periodic in three directions; "
                f"this one has pbc = {structure.pbc.tolist()}"
            )
        if "stress" in properties and not self.has_stress:
            raise PropertyNotImplementedError(
                "this potential predicts forces directly and has no stress head"
            )
        self.potential.check_elements(structure.numbers)
        wanted = bool(DERIVATIVES & set(properties))
        stress = periodic and self.has_stress
        self.results = self._evaluate(structure, wanted or not self.conservative, stress)

    def _evaluate(self, atoms: Atoms, derivatives: bool, stress: bool) -> dict[str, Any]:
        graph = self._neighbours.graph(atoms)
        if self.potential.device.type != "cpu":
            graph = graph.to(self.potential.device)
        with torch.set_grad_enabled(derivatives):
            prediction = self.potential(graph, forces=derivatives, stress=derivatives and stress)
        energy = prediction.energy.item()
        results = {
            "energy": energy,
            "free_energy": energy,
            "energies": prediction.energies.detach().cpu().numpy(),
        }
        if prediction.forces is not None:
            results["forces"] = prediction.forces.cpu().numpy()
        if prediction.stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].cpu().numpy())
        return results

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Tell what changed since the last call: what ASE tells, faster where nothing did."""
        known = self.atoms
        special = {"initial_charges", "initial_magmoms"}
        if known is None or special & (known.arrays.keys() | atoms.arrays.keys()):
            return super().check_state(atoms, tol)
        return [
            name
            for name in ("positions", "numbers", "cell", "pbc")
            if _differ(_array(known, name), _array(atoms, name), tol)
        ]

    def get_property(self, name: str, atoms: Any = None, allow_calculation: bool = True) -> Any:
        """Return one property; pymatgen structures are accepted too (see ASE)."""
        if name in DERIVATIVES and not self.announced and not self.conservative:
            warn_of_direct_forces(self, IN_GENERAL)
        structure = None if atoms is None else as_atoms(atoms)
        return super().get_property(name, structure, allow_calculation)

    def _get_name(self) -> str:
        return "mlip"

    def __deepcopy__(self, memo: dict[int, Any]) -> Calculator:
        """Copy caches and settings; the weights, which nothing here changes, are shared."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        shared = {"potential", "_neighbours"}
        for name, value in self.__dict__.items():
            if name not in shared and not callable(value):
                setattr(other, name, copy.deepcopy(value, memo))
        other.potential = self.potential
        other._neighbours = VerletList(self.potential.cutoff, self._neighbours.skin)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Keep path and settings; weights only of a potential that has no file."""
        p = self.parameters
        state = {key: p[key] for key in ("device", "dtype", "skin", "tabulate", "model_hash")}
        state["source"], state["announced"] = self._source, self.announced
        state["weights"] = _to_bytes(self.potential) if self._source is None else None
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Load the potential again.

        Raises:
            CheckpointError: the file is gone or holds other weights than when it was pickled.
        """
        settings = {key: state[key] for key in ("device", "dtype", "skin", "tabulate")}
        if state["weights"] is None:
            Calculator.__init__(self, state["source"], **settings)
        else:
            Calculator.__init__(self, _from_bytes(state["weights"], state["dtype"]), **settings)
        if self.parameters["model_hash"] != state["model_hash"]:
            raise CheckpointError(
                f"{state['source']}: the weights changed since this calculator was pickled "
                f"(hash {state['model_hash']} became {self.parameters['model_hash']}); "
                "build the calculator again"
            )
        self.announced = state["announced"]


def _array(atoms: Atoms, name: str) -> np.ndarray:
    if name in ("positions", "numbers"):
        return atoms.arrays[name]
    return atoms.cell.array if name == "cell" else atoms.pbc


def _differ(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Whether numbers differ by more than a tolerance, or shapes at all; NaN always differs."""
    if a.shape != b.shape:
        return True
    if (a == b).all():
        return False
    return a.dtype.kind != "f" or not bool((np.abs(a - b) <= tolerance).all())


def as_calculator(
    source: Any, *, device: str | None = None, dtype: str | None = None
) -> ase_calculator.BaseCalculator:
    """Return an ASE calculator for a calculator, a potential, a path or a shipped name.

    Args:
        source: any ASE calculator is returned as it is.
        device: where to compute, not for a calculator.
        dtype: precision, not for a calculator.

    Raises:
        InputError: ``source`` is none of these.
    """
    if isinstance(source, Potential | str | os.PathLike):
        return Calculator(source, device=device, dtype=dtype)
    if isinstance(source, ase_calculator.BaseCalculator) or hasattr(source, "get_potential_energy"):
        return source
    raise InputError(
        f"{type(source).__name__} cannot compute energies; give an ASE calculator, a Potential, "
        "the path of a potential or the name of a shipped one"
    )


def check_device(device: str | torch.device) -> torch.device:
    """Return the device if this machine has it.

    Raises:
        InputError: no such device; the text lists those there are.
    """
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    available = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if str(device) not in available:
        raise InputError(f"device is {str(device)!r}; this machine has {', '.join(available)}")
    return torch.device(device)


def describe(calculator: Any) -> str:
    """Name a calculator in run records: equal names give equal numbers on one machine."""
    if isinstance(calculator, Calculator):
        settings = calculator.parameters
        splines = " with splines" if settings["tabulate"] else ""
        return f"potential {settings['model_hash']} in {settings['dtype']}{splines}"
    return f"calculator {type(calculator).__name__}"


def _converted(
    potential: Potential, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Potential:
    """Return the potential itself, or a converted copy if device or dtype differ."""
    wanted = potential.dtype if dtype is None else getattr(torch, str(dtype).split(".")[-1], None)
    if wanted not in (torch.float32, torch.float64):
        raise InputError(f"dtype is {dtype!r}; use 'float32' or 'float64'")
    place = potential.device if device is None else check_device(device)
    if wanted == potential.dtype and place == potential.device:
        return potential
    return copy.deepcopy(potential).to_dtype(wanted).to(place)


def _tabulated(potential: Potential) -> Potential:
    """Return a copy that shares the weights and has splines for its radial networks."""
    make = getattr(potential.model, "with_tables", None)
    if not callable(make):
        raise InputError(
            f"tabulate is for EquiformerV3; this potential is a {type(potential.model).__name__}"
        )
    model = make()
    memo = {id(tensor): tensor for tensor in (*potential.parameters(), *potential.buffers())}
    return copy.deepcopy(potential, memo | {id(potential.model): model})


def _to_bytes(potential: Potential) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "potential.safetensors"
        potential.save(path)
        return path.read_bytes()


def _from_bytes(weights: bytes, dtype: str) -> Potential:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "potential.safetensors"
        path.write_bytes(weights)
        return Potential.load(path, dtype=dtype)
