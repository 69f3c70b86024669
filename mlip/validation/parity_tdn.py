"""Compare the tensor product and the published setting of TDN with numbers of the official code.

Reads the golden format: one .npz with factors ``cp_a``, ``cp_b``, ``cp_c`` and products of them, or
with official weights ``sd/``, structures with their edges, outputs and intermediates ``mid/``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.errors import DataError
from mlip.graph import AtomicGraph, batch_graphs
from mlip.models.tdn import TDN, TDNBlock
from mlip.models.tdn_official import config_from_official, model_from_official
from mlip.ops.tensor_products import Degrees, Factors, mixed_product
from mlip.ops.tensor_products.factors import NAMES
from mlip.ops.tensor_products.interface import coupling_tensor
from mlip.potential import Potential
from mlip.so3 import spherical_harmonics
from mlip.validation.parity import TOLERANCE, Arrays, Deviation, read_arrays, worst


def compare_file(path: str | Path) -> list[Deviation]:
    """Compare one golden file, of a product or of a model, in float64 and float32.

    Raises:
        DataError: not a file of the golden format.
    """
    arrays = read_arrays(path)
    try:
        if {*NAMES, "x1", "out_cp"} <= set(arrays):
            return compare_product(arrays)
        if "meta" in arrays and any(name.startswith("sd/") for name in arrays):
            return compare_model(arrays)
    except KeyError as error:
        raise DataError(f"{path}: no array {error} in it: not a golden file of TDN") from error
    raise DataError(f"{path}: holds neither factors and products nor weights sd/ of TDN")


def compare_product(arrays: Arrays) -> list[Deviation]:
    """Compare a product with given factors and with the exact tensor."""
    mode = json.loads(str(arrays["meta"]))["mode"]
    factors = Factors(*(torch.from_numpy(arrays[name]).double() for name in NAMES))
    exact = coupling_tensor(Degrees(*(factors.lmax,) * 3))
    rows = [Deviation("exact tensor", "float64", worst(exact, arrays["cg"]), 1e-12)]
    x, y, w = (torch.from_numpy(arrays[name]) for name in ("x1", "x2", "w"))
    if y.shape[2] == 1 and "edge_vec" in arrays:
        vectors = torch.from_numpy(arrays["edge_vec"])
        harmonics = spherical_harmonics(factors.lmax, vectors)[:, :, None]
        rows.append(Deviation("harmonics", "float64", worst(harmonics, arrays["x2"]), 1e-12))
    for name, tensor in (("out_cp", factors.tensor), ("out_exact", exact)):
        truth = arrays[name]
        scale = max(1.0, float(np.abs(truth).max(initial=0.0)))
        for dtype, tolerance in (("float64", TOLERANCE["float64"]), ("float32", 3e-5 * scale)):
            a, b, c, d = (part.to(getattr(torch, dtype)) for part in (tensor, x, y, w))
            rows.append(
                Deviation(name, dtype, worst(mixed_product(a, b, c, d, mode), truth), tolerance)
            )
    return rows


def compare_model(arrays: Arrays) -> list[Deviation]:
    """Compare energies, forces of both kinds and intermediates of a whole model."""
    rows = []
    atoms = np.flatnonzero(_mask(arrays))
    for dtype in ("float64", "float32"):
        for prediction in ("direct", "gradient"):
            if f"forces_{prediction}" not in arrays:
                continue
            potential = Potential(_model(arrays, prediction)).to_dtype(getattr(torch, dtype)).eval()
            recorded: dict[str, Tensor] = {}
            handles = _record(potential.model, recorded)
            found = potential(_graph(arrays, potential.cutoff), stress=False)
            for handle in handles:
                handle.remove()
            rows += _compare_outputs(arrays, found, atoms, dtype, prediction)
            if dtype == "float64" and prediction == "direct":
                rows += _compare_intermediates(arrays, recorded, atoms)
    return rows


def _compare_outputs(
    arrays: Arrays, found: Any, atoms: np.ndarray, dtype: str, prediction: str
) -> list[Deviation]:
    name = f"forces_{prediction}"
    pairs = [("energy", found.energy, 2e-6), (name, found.forces[torch.from_numpy(atoms)], 1e-4)]
    rows = []
    for quantity, ours, relative in pairs:
        truth = arrays[quantity]
        largest = float(np.abs(truth).max(initial=0.0))
        tolerance = TOLERANCE["float64"] if dtype == "float64" else relative * max(largest, 0.1)
        label = f"{quantity} ({prediction})" if quantity == "energy" else quantity
        rows.append(Deviation(label, dtype, worst(ours, truth), tolerance))
    if len(atoms) < len(found.forces):
        outside = np.setdiff1d(np.arange(len(found.forces)), atoms)
        largest = float(found.forces[torch.from_numpy(outside)].abs().max())
        rows.append(Deviation(f"forces of lone atoms ({prediction})", dtype, largest, 0.0))
    return rows


def _compare_intermediates(
    arrays: Arrays, recorded: dict[str, Tensor], atoms: np.ndarray
) -> list[Deviation]:
    n_atoms = len(arrays["z"])
    rows = []
    for name, ours in recorded.items():
        if f"mid/{name}" in arrays:
            truth = arrays[f"mid/{name}"]
            if len(ours) == n_atoms and len(truth) == len(atoms):
                ours = ours[torch.from_numpy(atoms)]
            rows.append(Deviation(name, "float64", worst(ours, truth), TOLERANCE["float64"]))
    return rows


def _model(arrays: Arrays, prediction: str) -> TDN:
    meta = json.loads(str(arrays["meta"]))
    weights = {name[3:]: torch.from_numpy(a) for name, a in arrays.items() if name[:3] == "sd/"}
    config = config_from_official(
        meta["config"],
        sorted({int(z) for z in arrays["z"]}),
        average_atoms=meta["avg_num_nodes"],
        average_degree=meta["avg_degree"],
        prediction=prediction,
    )
    return model_from_official(weights, config)


def _graph(arrays: Arrays, cutoff: float) -> AtomicGraph:
    """Build our batch from the stored edges, whose indices count atoms with neighbours only."""
    mask = _mask(arrays)
    atoms = np.flatnonzero(mask)
    source, target = atoms[arrays["edge_src"]], atoms[arrays["edge_dst"]]
    shifts = arrays.get("shifts", np.zeros((len(source), 3)))
    cell = arrays.get("cell")
    graphs = []
    for i in range(int(arrays["batch"].max()) + 1):
        own = np.flatnonzero(arrays["batch"] == i)
        local = np.full(len(mask), -1)
        local[own] = np.arange(len(own))
        keep = np.flatnonzero(local[target] >= 0)
        keep = keep[np.argsort(local[target[keep]], kind="stable")]
        graphs.append(
            AtomicGraph(
                positions=torch.from_numpy(arrays["pos"][own]).double(),
                atomic_numbers=torch.from_numpy(arrays["z"][own].astype(np.int64)),
                cell=torch.from_numpy(np.zeros((1, 3, 3)) if cell is None else cell[None]),
                pbc=torch.full((1, 3), cell is not None),
                edge_index=torch.from_numpy(
                    np.stack([local[source[keep]], local[target[keep]]]).astype(np.int64)
                ),
                edge_shift=torch.from_numpy(shifts[keep].astype(np.int64)),
                cutoff=torch.tensor([cutoff], dtype=torch.float64),
            )
        )
    return batch_graphs(graphs)


def _mask(arrays: Arrays) -> np.ndarray:
    """Atoms that the official code keeps, those with neighbours."""
    return arrays.get("mask", np.ones(len(arrays["z"]), dtype=bool))


def _record(model: torch.nn.Module, recorded: dict[str, Tensor]) -> list[Any]:
    """Hook the modules whose outputs the golden files name."""

    def hook(name: str) -> Callable[..., None]:
        def store(_module: Any, _inputs: Any, output: Tensor) -> None:
            recorded[name] = output

        return store

    assert isinstance(model, TDN)
    first = model.blocks[0]
    assert isinstance(first, TDNBlock)
    named: dict[str, torch.nn.Module] = {
        "rbf": model.radial_basis,
        "edge_embed": model.edge_degree,
        "b0.norm1": first.norm_1,
        "b0.attn": first.attention,
        "b0.ffn": first.contract,
        "norm": model.norm,
    }
    named |= {f"block{i}": block for i, block in enumerate(model.blocks)}
    if hasattr(model, "force_head"):
        named["force_head"] = model.force_head
    return [module.register_forward_hook(hook(name)) for name, module in named.items()]
