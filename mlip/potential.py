"""From node energies of a model to energy, forces and stress of structures.

Saving and loading live in ``mlip.checkpoint``; neighbours come with the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch import Tensor, nn

from mlip import checkpoint
from mlip.energy_derivatives import (
    AnyGraph,
    EnergyPart,
    GraphView,
    gradient_by_edges,
    stress_of,
    vectors_of,
)
from mlip.errors import CheckpointError, InputError, UnknownElementError
from mlip.graph import batch_index, number_of_graphs
from mlip.models import create_model, model_name
from mlip.models.direct import DirectPrediction
from mlip.nn.zbl import ZBLRepulsion
from mlip.ops import forces_and_virial, structure_sum

DTYPES = {"float32": torch.float32, "float64": torch.float64}
PerElement = float | Mapping[int, float]


class Prediction(NamedTuple):
    """What a potential says of a batch of B structures with N atoms.

    energy: [B] eV. energies: [N] eV, energy of each atom. forces: [N, 3] eV/Å.
    stress: [B, 3, 3] eV/Å³, tension positive; NaN where a structure is not periodic in three
    directions, or if direct forces come without a stress. All float64; forces and stress are None
    when not asked for.
    """

    energy: Tensor
    energies: Tensor
    forces: Tensor | None
    stress: Tensor | None

    def detach(self) -> Prediction:
        """Give the same numbers without their history."""
        rest = (None if value is None else value.detach() for value in (self.forces, self.stress))
        return Prediction(self.energy.detach(), self.energies.detach(), *rest)


class Potential(nn.Module):
    """Total energy E = Σ_i reference[z_i] + shift[z_i] + scale[z_i]·ε_i (+ ZBL), its derivatives.

    Args:
        model: maps a graph to dimensionless node energies ε [N]; has ``config``, ``cutoff`` and
            ``elements``.
        reference_energies: eV of each atomic number, default 0.
        scale: eV, one number or one for each atomic number.
        shift: eV, one number or one for each atomic number.
        direct_scale: eV/Å and eV/Å³, unit of the forces and stress that a model with direct heads
            gives; default ``scale``. Such forces are not derivatives of the energy.
        zbl: add the Ziegler–Biersack–Littmark short-range repulsion.
        metadata: JSON-able facts on training data, theory, licence; stored in the checkpoint.
    """

    _reference: Tensor
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        reference_energies: Mapping[int, float] | None = None,
        scale: PerElement = 1.0,
        shift: PerElement = 0.0,
        direct_scale: float | None = None,
        zbl: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.direct_scale = self._direct_scale(direct_scale, scale, zbl)
        self.zbl = ZBLRepulsion(float(model.cutoff)) if zbl else None  # type: ignore[arg-type]
        self.metadata = dict(metadata or {})
        self._known: NDArray[np.bool_] = np.zeros(119, dtype=bool)
        self._known[list(self.elements)] = True
        references = {int(z): float(e) for z, e in (reference_energies or {}).items()}
        for name, value in (("reference", references), ("scale", scale), ("shift", shift)):
            self.register_buffer(f"_{name}", self._table(value), persistent=False)

    def _direct_scale(self, given: float | None, scale: PerElement, zbl: bool) -> float:
        """Choose the unit of direct forces and refuse what direct forces cannot have."""
        if self.conservative:
            return 1.0
        if zbl:
            raise InputError("zbl needs forces that are derivatives: this model predicts them")
        scales = set(scale.values()) if isinstance(scale, Mapping) else {scale}
        if given is None and len(scales) > 1:
            raise InputError("scale differs between elements: give direct_scale for the forces")
        return float(scales.pop() if given is None else given)

    def _table(self, value: PerElement) -> Tensor:
        """Expand one number, or one for each element, to [119] float64 by atomic number."""
        table = torch.zeros(119, dtype=torch.float64)
        if isinstance(value, Mapping):
            for z, number in value.items():
                table[int(z)] = float(number)
        else:
            table[:] = float(value)
        return table

    def to_dtype(self, dtype: torch.dtype) -> Potential:
        """Convert the model's arithmetic in place; reference energies stay float64."""
        self.model.to(dtype)
        return self

    @property
    def cutoff(self) -> float:
        """Neighbour cutoff of the graphs this potential reads, Å."""
        return float(self.model.cutoff)  # type: ignore[arg-type]

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the potential knows."""
        return tuple(self.model.elements)  # type: ignore[arg-type]

    @property
    def conservative(self) -> bool:
        """Whether forces and stress are derivatives of the energy, not outputs of heads."""
        return bool(getattr(self.model, "conservative", True))

    @property
    def has_stress(self) -> bool:
        """Whether stress is predicted: a derivative always is, a direct one needs its head."""
        return self.conservative or bool(getattr(self.model.config, "direct_stress", True))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model's arithmetic."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._reference.device

    @property
    def reference_energies(self) -> dict[int, float]:
        """Reference energy of each element, eV."""
        return {z: float(self._reference[z]) for z in self.elements}

    @property
    def scale(self) -> dict[int, float]:
        """Energy scale of each element, eV."""
        return {z: float(self._scale[z]) for z in self.elements}

    def forward(
        self,
        graph: AnyGraph,
        *,
        forces: bool = True,
        stress: bool = True,
        create_graph: bool = False,
    ) -> Prediction:
        """Predict a graph or a batch of graphs.

        Args:
            graph: on the device of the potential, with the neighbours within ``cutoff``.
            forces: compute −∂E/∂r.
            stress: compute (1/V) ∂E/∂ε for symmetric strain ε.
            create_graph: keep what training needs to differentiate forces and stress again.

        Raises:
            UnknownElementError: the graph holds elements the potential was not trained on.
            InputError: the graph lacks neighbours, its cutoff being shorter than the potential's.
        """
        self.check_elements(graph.atomic_numbers)
        self._check_cutoff(graph)
        if not self.conservative:
            return self._direct(graph, forces, stress, create_graph)
        numbers, batch = graph.atomic_numbers, batch_index(graph)
        sizes = (len(numbers), number_of_graphs(graph))
        derivatives = forces or stress
        with torch.set_grad_enabled(derivatives or torch.is_grad_enabled()):
            vectors = vectors_of(graph, batch)
            if derivatives and not vectors.requires_grad:
                vectors.requires_grad_(True)
            keep = create_graph or vectors.grad_fn is not None
            inference = not keep if derivatives else not torch.is_grad_enabled()
            parts = self._parts(graph, vectors, inference=inference)
            wanted = [part.detach() for part in parts] if derivatives and not keep else parts
            energies = self._node_energies(wanted, numbers)
            energy = structure_sum(energies, batch, sizes[1])
            if not derivatives:
                return Prediction(energy, energies, None, None)
            gradient = gradient_by_edges(parts, vectors, keep)
            force, virial = forces_and_virial(
                gradient, vectors if keep else vectors.detach(), graph.edge_index, batch, *sizes
            )
        tensor = stress_of(virial, graph) if stress else None
        result = Prediction(energy, energies, force if forces else None, tensor)
        if create_graph or not keep or (torch.is_grad_enabled() and graph.positions.requires_grad):
            return result
        return result.detach()

    def _direct(
        self, graph: AnyGraph, forces: bool, stress: bool, create_graph: bool
    ) -> Prediction:
        """Predict with a model that has heads for forces and stress."""
        n_graphs = number_of_graphs(graph)
        keep = create_graph or graph.positions.requires_grad or not (forces or stress)
        with torch.set_grad_enabled(torch.is_grad_enabled() and keep):
            batch = batch_index(graph)
            vectors = vectors_of(graph, batch).to(self.dtype)
            output: DirectPrediction = self.model(
                GraphView(graph, vectors, not torch.is_grad_enabled())
            )
            numbers = graph.atomic_numbers
            part = EnergyPart(output.energies, self._scale.index_select(0, numbers))
            energies = self._node_energies([part], numbers)
            energy = structure_sum(energies, batch, n_graphs)
            force = output.forces.double() * self.direct_scale if forces else None
            tensor = None
            if stress:
                raw = energy.new_full((n_graphs, 3, 3), torch.nan)
                raw = raw if output.stress is None else output.stress.double() * self.direct_scale
                tensor = torch.where(graph.pbc.all(1)[:, None, None], raw, torch.nan)
        return Prediction(energy, energies, force, tensor)

    def _parts(self, graph: AnyGraph, vectors: Tensor, *, inference: bool) -> list[EnergyPart]:
        numbers = graph.atomic_numbers
        found = self.model(GraphView(graph, vectors.to(self.dtype), inference))
        parts = [EnergyPart(found, self._scale.index_select(0, numbers))]
        if self.zbl is not None:
            repulsion = self.zbl(numbers, vectors, graph.edge_index, inference=inference)
            parts.append(EnergyPart(repulsion, torch.ones_like(repulsion)))
        return parts

    def _node_energies(self, parts: Sequence[EnergyPart], numbers: Tensor) -> Tensor:
        energies = (self._reference + self._shift).index_select(0, numbers)
        for values, unit in parts:
            energies = energies + unit * values.double()
        return energies

    def check_elements(self, numbers: Tensor | NDArray[np.int64]) -> None:
        """Raise UnknownElementError if any atomic number is not among ``elements``."""
        given = numbers.cpu().numpy() if isinstance(numbers, Tensor) else numbers
        known = self._known.take(given, mode="clip")
        if known.all():
            return
        unknown = sorted(set(given[~known].tolist()))
        raise UnknownElementError(
            f"the potential does not know {_symbols(unknown)}; it was trained on "
            f"{_symbols(self.elements)}: choose another potential or train one on these elements"
        )

    def _check_cutoff(self, graph: AnyGraph) -> None:
        shortest = min(graph.cutoff.tolist(), default=self.cutoff)
        if shortest < self.cutoff - 1e-6:
            raise InputError(
                f"the graph holds neighbours within {shortest:g} Å and the potential needs "
                f"{self.cutoff:g} Å: build it with atoms_to_graph(atoms, potential.cutoff)"
            )

    def to_header(self) -> dict[str, Any]:
        """Describe everything but the weights, JSON-able."""
        elements = self.elements
        tables = {
            name: {chemical_symbols[z]: float(getattr(self, f"_{name}")[z]) for z in elements}
            for name in ("reference", "scale", "shift")
        }
        direct = {} if self.conservative else {"direct_scale": self.direct_scale}
        return {
            "model": self.metadata.get("model", model_name(self.model)),
            "config": self.model.config.model_dump(mode="json"),  # type: ignore[union-attr,operator]
            "elements": [chemical_symbols[z] for z in elements],
            "cutoff": self.cutoff,
            "units": {"energy": "eV", "length": "Å", "stress": "eV/Å³, tension positive"},
            "reference_energies": tables["reference"],
            "scale": tables["scale"],
            "shift": tables["shift"],
            **direct,
            "zbl": self.zbl is not None,
            "metadata": self.metadata,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a JSON header; all or nothing.

        Raises:
            MlipError: the file cannot be written.
        """
        checkpoint.save(path, dict(self.model.state_dict()), self.to_header())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> Potential:
        """Read a file written by :meth:`save`.

        Args:
            path: the file.
            device: where the weights go.
            dtype: precision of the model's arithmetic, ``"float32"`` or ``"float64"``.

        Raises:
            CheckpointError: missing, corrupt, truncated, foreign or newer file.
        """
        precision = _dtype(dtype)
        tensors, header = checkpoint.load(path)
        try:
            with torch.random.fork_rng(devices=[]):
                model = create_model(header["model"], header["config"])
            model.to(precision)
            model.load_state_dict(tensors)
            numbers = {symbol: z for z, symbol in enumerate(chemical_symbols)}
            tables = {
                name: {numbers[symbol]: value for symbol, value in header[name].items()}
                for name in ("reference_energies", "scale", "shift")
            }
            potential = cls(
                model,
                **tables,
                direct_scale=header.get("direct_scale"),
                zbl=header["zbl"],
                metadata=header["metadata"],
            )
        except (InputError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: weights and header do not fit together ({type(error).__name__}: "
                f"{error}); the file is damaged or was written by another version"
            ) from error
        return potential.to(device).eval()

    def model_hash(self) -> str:
        """Short SHA-256 of configuration and weights, to name a potential in logs."""
        digest = hashlib.sha256()
        header = {k: v for k, v in self.to_header().items() if k != "metadata"}
        digest.update(json.dumps(header, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().double().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]


def shipped_potentials() -> dict[str, Path]:
    """Find the potentials that come with the package, by name."""
    from importlib.resources import files

    try:
        folder = Path(str(files("mlip.data"))) / "pretrained"
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parent.parent / "data" / "pretrained"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load_potential(
    path_or_name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Potential:
    """Load a potential from a file, or a shipped one by its name.

    Raises:
        CheckpointError: neither a file nor a shipped name, or the file cannot be read.
    """
    if Path(path_or_name).is_file():
        return Potential.load(path_or_name, device, dtype)
    shipped = shipped_potentials()
    if str(path_or_name) in shipped:
        return Potential.load(shipped[str(path_or_name)], device, dtype)
    raise CheckpointError(
        f"{path_or_name}: no such file, and no shipped potential has this name; give the path of "
        f"a .safetensors file or one of: {', '.join(shipped) or '(none is shipped)'}"
    )


def _symbols(numbers: Any) -> str:
    return ", ".join(
        chemical_symbols[z] if 0 < z < len(chemical_symbols) else f"atomic number {z}"
        for z in numbers
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"dtype is {dtype!r}; use 'float32' or 'float64'")
    return found
