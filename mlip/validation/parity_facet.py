"""Compare the published setting of Facet with numbers of the official code.

Reads the golden format: one .npz with weights ``w:``, inputs ``in:``, constants ``const:``,
outputs ``out64:`` and ``out32:``, optionally intermediates ``mid:``; or a file of parts.
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
from mlip.models.facet import Facet
from mlip.models.facet_jax import facet_from_jax
from mlip.potential import Potential
from mlip.validation.parity import TOLERANCE, Arrays, Deviation, read_arrays, worst
from mlip.validation.parity_facet_parts import compare_parts, flatten


def compare_file(path: str | Path) -> list[Deviation]:
    """Compare one golden file in float64 and float32.

    Raises:
        DataError: not a file of the golden format.
    """
    arrays = read_arrays(path)
    if "config_json" in arrays:
        return compare_model(arrays)
    if "edge_sh_l3" in arrays:
        return [Deviation(name, "float64", d, 1e-10) for name, d in compare_parts(arrays).items()]
    raise DataError(f"{path}: holds neither config_json nor parts: not a golden file of Facet")


def compare_model(arrays: Arrays) -> list[Deviation]:
    """Compare energy, forces, stress and recorded intermediates of a whole model."""
    rows = []
    for dtype in ("float64", "float32"):
        model = _model(arrays)
        potential = Potential(model).to_dtype(getattr(torch, dtype))
        recorded: dict[str, Tensor] = {}
        handles = _record(model, recorded)
        prediction = potential(_graph(arrays, model))
        for handle in handles:
            handle.remove()
        real = np.flatnonzero(arrays["in:graph_mask"])
        atoms = np.flatnonzero(arrays["in:numbers"])
        found = {
            "energy": (prediction.energy, "energy_total", real),
            "forces": (prediction.forces, "forces", atoms),
            "stress": (prediction.stress, "stress", real),
        }
        for quantity, (ours, name, index) in found.items():
            truth = arrays[f"out64:{name}"][index]
            tolerance = TOLERANCE[dtype]
            if dtype == "float32" and f"out32:{name}" in arrays:
                official = np.abs(arrays[f"out32:{name}"][index] - truth).max(initial=0.0)
                tolerance = max(tolerance, 10 * float(official))
            rows.append(Deviation(quantity, dtype, worst(ours, truth), tolerance))
        if dtype == "float64":
            rows += _compare_intermediates(arrays, recorded, atoms)
    return rows


def _compare_intermediates(
    arrays: Arrays, recorded: dict[str, Tensor], atoms: np.ndarray
) -> list[Deviation]:
    rows = []
    for name, ours in recorded.items():
        if f"mid:{name}" in arrays:
            truth = arrays[f"mid:{name}"]
            truth = truth.reshape(len(arrays["in:numbers"]), -1)[atoms]
            rows.append(Deviation(name, "float64", worst(ours, truth), TOLERANCE["float64"]))
    return rows


def _element_rows(arrays: Arrays) -> tuple[int, ...]:
    """Atomic number of each species row after padding; rows that no atom uses get a spare one."""
    n_rows = arrays["w:params/node_embedding/embed/embedding"].shape[0]
    number_of = dict(zip(arrays["in:species"].tolist(), arrays["in:numbers"].tolist(), strict=True))
    spare = iter(z for z in range(118, 0, -1) if z not in number_of.values())
    return tuple(number_of.get(row) or next(spare) for row in range(1, n_rows))


def _model(arrays: Arrays) -> Facet:
    prefix = "const:meta_"
    return facet_from_jax(
        {name[2:]: array for name, array in arrays.items() if name.startswith("w:")},
        json.loads(str(arrays["config_json"])),
        _element_rows(arrays),
        float(arrays["const:avg_num_neighbors"].reshape(-1)[0]),
        {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)},
    )


def _graph(arrays: Arrays, model: Facet) -> AtomicGraph:
    """Build our batch from the stored edges; their vectors run from sender to receiver."""
    graphs = []
    owner = arrays["in:graph_i"]
    for i in np.flatnonzero(arrays["in:graph_mask"]):
        atoms = np.flatnonzero((owner == i) & (arrays["in:numbers"] > 0))
        local = np.full(len(owner), -1)
        local[atoms] = np.arange(len(atoms))
        sender, receiver = arrays["in:edge_sender"], arrays["in:edge_receiver"]
        keep = np.flatnonzero((local[sender] >= 0) & (local[receiver] >= 0))
        keep = keep[np.argsort(local[receiver[keep]], kind="stable")]
        graphs.append(
            AtomicGraph(
                positions=torch.from_numpy(arrays["in:positions"][atoms]),
                atomic_numbers=torch.from_numpy(arrays["in:numbers"][atoms].astype(np.int64)),
                cell=torch.from_numpy(arrays["in:cell"][i][None]),
                pbc=torch.ones(1, 3, dtype=torch.bool),
                edge_index=torch.from_numpy(
                    np.stack([local[sender[keep]], local[receiver[keep]]]).astype(np.int64)
                ),
                edge_shift=torch.from_numpy(-arrays["in:edge_shift"][keep].astype(np.int64)),
                cutoff=torch.tensor([model.cutoff], dtype=torch.float64),
            )
        )
    return batch_graphs(graphs)


def _record(model: Facet, recorded: dict[str, Tensor]) -> list[Any]:
    """Hook the modules whose outputs the golden files name."""

    def hook(name: str) -> Callable[..., None]:
        def store(_module: Any, _inputs: Any, output: Any) -> None:
            recorded[name] = flatten(output) if isinstance(output, tuple) else output

        return store

    handles = [model.head.register_forward_hook(hook("head"))]
    for i, block in enumerate(model.blocks):
        prefix = f"mace/layer_{i}"
        for module, name in (
            (block.after, "interaction/SimpleInteraction_0/linear_outro"),
            (block.skip, "interaction/resid_adapter"),
            (block.update, "self_connection"),
        ):
            assert isinstance(module, torch.nn.Module)
            handles.append(module.register_forward_hook(hook(f"{prefix}/{name}")))
    return handles
