"""Compare EquiformerV3 with numbers of the official code.

Reads the golden format: one .npz with constructor arguments ``config_json``, weights ``sd/``,
structures with their edges, outputs ``*_f64`` and ``*_f32`` and intermediates ``feat_*``; or a file
of primitives. Two settings are compared: "published", which freezes directions near ±y as the
official code does, and "exact", whose derivatives hold everywhere (``*_exact_f64`` where the file
has edges along ±y).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.errors import DataError
from mlip.graph import AtomicGraph, batch_graphs
from mlip.graph.graph import make_graph
from mlip.models.equiformer_v3 import EquiformerV3
from mlip.models.equiformer_v3_official import config_from_official, model_from_official, our_name
from mlip.nn.edge_frames import POLE
from mlip.nn.sphere_product import is_exact
from mlip.potential import Potential, Prediction
from mlip.validation.parity import TOLERANCE, Arrays, Deviation, read_arrays, worst
from mlip.validation.parity_equiformer_v3_parts import compare_parts


def compare_file(path: str | Path) -> list[Deviation]:
    """Compare one golden file in float64 and float32.

    Raises:
        DataError: not a file of the golden format.
    """
    arrays = read_arrays(path)
    if "config_json" in arrays:
        return compare_model(arrays)
    if any(name.startswith("wigner_D_angles/") for name in arrays):
        return [Deviation(name, "float64", d, 1e-10) for name, d in compare_parts(arrays).items()]
    raise DataError(f"{path}: holds neither config_json nor primitives of EquiformerV3")


def compare_model(arrays: Arrays) -> list[Deviation]:
    """Compare outputs, intermediates, training gradients and edges of a whole model."""
    rows = [Deviation("edges", "float64", _compare_edges(arrays), TOLERANCE["float64"])]
    for published in _settings(arrays):
        label = "published" if published else "exact"
        model = _model(arrays, published)
        potential = Potential(model).eval()
        for dtype in ("float64", "float32"):
            potential.to_dtype(getattr(torch, dtype))
            rows += _compare_outputs(arrays, potential, dtype, label)
            if dtype == "float64" and published:
                rows += _compare_intermediates(arrays, potential)
                rows += _compare_training(arrays, potential)
    return rows


def _settings(arrays: Arrays) -> tuple[bool, ...]:
    """List the values of ``published`` that can be compared."""
    official = json.loads(str(arrays["config_json"]))
    lmax, mmax = official["lmax"], official["mmax"]
    exact = is_exact(lmax, mmax, official["attn_grid_resolution_list"]) and is_exact(
        lmax, lmax, official["ffn_grid_resolution_list"]
    )
    return (True, False) if exact else (True,)


def _model(arrays: Arrays, published: bool) -> EquiformerV3:
    official = json.loads(str(arrays["config_json"]))
    n_rows = arrays["sd/sphere_embedding.weight"].shape[0]
    elements = range(1, min(n_rows, 119))
    weights = {
        name.removeprefix("sd/"): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith("sd/")
    }
    return model_from_official(
        weights, config_from_official(official, elements, published=published)
    )


def _structures(arrays: Arrays) -> Iterator[tuple[int, slice]]:
    """Iterate over structures and the range of their atoms."""
    ends = np.cumsum(arrays["natoms"])
    for i, (end, count) in enumerate(zip(ends, arrays["natoms"], strict=True)):
        yield i, slice(int(end - count), int(end))


def _graph(arrays: Arrays, cutoff: float, *, denoising: bool = False) -> AtomicGraph:
    """Build our batch from the stored edges.

    All structures count as periodic: the official stress is ∂E/∂ε over the volume of the stored
    cell for every structure.
    """
    graphs = []
    for i, atoms in _structures(arrays):
        target = arrays["edge_index"][1]
        keep = np.flatnonzero((target >= atoms.start) & (target < atoms.stop))
        keep = keep[np.argsort(target[keep], kind="stable")]
        graphs.append(
            AtomicGraph(
                positions=torch.from_numpy(arrays["positions"][atoms]),
                atomic_numbers=torch.from_numpy(arrays["numbers"][atoms].astype(np.int64)),
                cell=torch.from_numpy(arrays["cell"][i][None]),
                pbc=torch.ones(1, 3, dtype=torch.bool),
                edge_index=torch.from_numpy(arrays["edge_index"][:, keep] - atoms.start),
                edge_shift=torch.from_numpy(arrays["edge_offsets"][keep].astype(np.int64)),
                cutoff=torch.tensor([cutoff], dtype=torch.float64),
            )
        )
    batch = batch_graphs(graphs)
    if denoising:
        batch.clean_forces = torch.from_numpy(arrays["dens_forces"])
        batch.noise_mask = torch.from_numpy(arrays["dens_noise_mask"])
        batch.noisy = torch.from_numpy(arrays["dens_batch_mask"])
    return batch


def _compare_edges(arrays: Arrays) -> float:
    """Compare the neighbour distances of every atom with those of our neighbour search."""
    official = json.loads(str(arrays["config_json"]))
    result = 0.0
    for i, atoms in _structures(arrays):
        graph = make_graph(
            arrays["numbers"][atoms],
            arrays["positions"][atoms],
            arrays["cell"][i],
            arrays["pbc"][i],
            official["max_radius"],
            max_neighbors=official["max_neighbors"],
        )
        graph.pbc = torch.ones(1, 3, dtype=torch.bool)
        vectors = _edge_vectors(graph)
        ours = np.stack([graph.edge_index[1].numpy(), np.linalg.norm(vectors, axis=1)], axis=1)
        target = arrays["edge_index"][1]
        keep = (target >= atoms.start) & (target < atoms.stop)
        theirs = np.stack([target[keep] - atoms.start, arrays["edge_dist_f64"][keep]], axis=1)
        if ours.shape != theirs.shape:
            return float("inf")
        ours, theirs = (rows[np.lexsort(rows.T[::-1])] for rows in (ours, theirs))
        result = max(result, float(np.abs(ours - theirs).max(initial=0.0)))
    return result


def _edge_vectors(graph: AtomicGraph) -> np.ndarray:
    source, target = graph.edge_index.numpy()
    positions = graph.positions.numpy()
    return positions[source] - positions[target] + graph.edge_shift.numpy() @ graph.cell[0].numpy()


def _compare_outputs(
    arrays: Arrays, potential: Potential, dtype: str, label: str
) -> list[Deviation]:
    """Compare energy, forces and stress, of denoising too."""
    rows = []
    cutoff = potential.cutoff
    prefixes = ["", "dens_"] if "dens_forces" in arrays else [""]
    for prefix in prefixes:
        prediction = potential(_graph(arrays, cutoff, denoising=bool(prefix)))
        for quantity, ours in _quantities(prediction).items():
            name = f"{prefix}{quantity}"
            truth = _truth(arrays, name, potential, label)
            if truth is None:
                continue
            allowed = TOLERANCE[dtype]
            if dtype == "float32" and f"{name}_f32" in arrays:
                official = np.abs(arrays[f"{name}_f32"] - arrays[f"{name}_f64"]).max(initial=0.0)
                allowed = max(allowed, 2 * float(official))
            rows.append(Deviation(f"{name} ({label})", dtype, worst(ours, truth), allowed))
    return rows


def _quantities(prediction: Prediction) -> dict[str, Tensor]:
    """Outputs as the official code lays them out."""
    assert prediction.forces is not None
    assert prediction.stress is not None
    return {
        "energy": prediction.energy,
        "forces": prediction.forces,
        "stress": prediction.stress.flatten(1),
    }


def _truth(arrays: Arrays, name: str, potential: Potential, label: str) -> np.ndarray | None:
    """Pick the reference; None where the file has none that this setting should match."""
    exact = label == "exact" and potential.conservative
    if exact and f"{name}_exact_f64" in arrays:
        return arrays[f"{name}_exact_f64"]
    cosine = np.abs(arrays["edge_vec_f64"][:, 1]) / arrays["edge_dist_f64"]
    if exact and (cosine > POLE).any():
        return None
    return arrays.get(f"{name}_f64")


def _compare_intermediates(arrays: Arrays, potential: Potential) -> list[Deviation]:
    """Compare features after each layer and the energies of atoms."""
    model: Any = potential.model
    recorded: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        return lambda _module, _inputs, output: recorded.update({name: output})

    handles = [
        model.blocks[0].register_forward_pre_hook(
            lambda _module, inputs: recorded.update({"feat_embed": inputs[0]})
        ),
        model.norm.register_forward_hook(store("feat_norm")),
        model.energy_head.register_forward_hook(
            lambda _module, _inputs, output: recorded.update({"node_energy": output[:, None]})
        ),
    ]
    for i, block in enumerate(model.blocks):
        handles.append(block.attention.register_forward_hook(store(f"feat_block{i}_attn")))
        handles.append(block.register_forward_hook(store(f"feat_block{i}")))
    potential(_graph(arrays, potential.cutoff), forces=False, stress=False)
    for handle in handles:
        handle.remove()
    return [
        Deviation(name, "float64", worst(ours, arrays[f"{name}_f64"]), TOLERANCE["float64"])
        for name, ours in recorded.items()
        if f"{name}_f64" in arrays
    ]


def _compare_training(arrays: Arrays, potential: Potential) -> list[Deviation]:
    """Compare gradients of a loss on energy, forces and stress with respect to all weights."""
    if "pgrad_norm" not in arrays:
        return []
    prediction = potential(_graph(arrays, potential.cutoff), create_graph=True)
    loss = torch.zeros((), dtype=torch.float64)
    for quantity, ours in _quantities(prediction).items():
        name = f"train_w{quantity[0].upper()}"
        if name in arrays:
            loss = loss + (ours * torch.from_numpy(arrays[name])).sum()
    parameters = dict(potential.model.named_parameters())
    weights = [parameters[our_name(str(name))] for name in arrays["param_names"]]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    gradients = [
        torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
    ]
    norms = torch.stack([g.norm() for g in gradients])
    dots = torch.stack([(g * w).sum() for g, w in zip(gradients, weights, strict=True)])
    found_of = {"train_loss": loss, "pgrad_norm": norms, "pgrad_dot_w": dots}
    return [
        Deviation(name, "float64", worst(ours, arrays[name]), TOLERANCE["float64"])
        for name, ours in found_of.items()
    ]
