"""Compare the published setting of TDN with numbers of the official code: whole models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlip.graph import AtomicGraph, batch_graphs
from mlip.models.tdn import TDN
from mlip.models.tdn_official import (
    AVERAGE_ATOMS,
    AVERAGE_DEGREE,
    OFFICIAL_OPTIONS,
    config_from_official,
    model_from_official,
    official_sizes,
)
from mlip.nn.tensor_attention import OperatorEdges, TensorAttention
from mlip.ops import operator_apply, operator_gather
from mlip.ops.pairs import of_all_edges
from mlip.potential import Potential
from mlip.validation.parity import TOLERANCE, Arrays, Deviation, Omission, Reading, Row, worst

Recorded = dict[str, tuple[tuple[Any, ...], Tensor]]  # inputs and output of a module


class Structures:
    """The structures of a file as our batch, and where its atoms and edges stand there.

    Attributes:
        graph: of the stored edges, whose indices count atoms with neighbours only.
        atoms: [n] rows of the atoms that the official code keeps.
        edges: [E] rows of the file in the order of the batch.
    """

    def __init__(self, arrays: Arrays, cutoff: float, rotation: np.ndarray | None = None) -> None:
        numbers = arrays["z"].reshape(-1).astype(np.int64)
        mask = arrays.get("mask", np.ones(len(numbers), dtype=bool))
        batch = arrays.get("batch", np.zeros(len(numbers), dtype=np.int64))
        self.atoms = np.flatnonzero(mask)
        source, target = self.atoms[arrays["edge_src"]], self.atoms[arrays["edge_dst"]]
        shifts = arrays.get("shifts", np.zeros((len(source), 3)))
        lattice = arrays.get("cell", np.zeros((3, 3))).astype(np.float64)
        turn = np.eye(3) if rotation is None else rotation
        graphs, order = [], []
        for i in range(int(batch.max()) + 1):
            own = np.flatnonzero(batch == i)
            local = np.full(len(numbers), -1)
            local[own] = np.arange(len(own))
            keep = np.flatnonzero(local[target] >= 0)
            keep = keep[np.argsort(local[target[keep]], kind="stable")]
            ends = np.stack([local[source[keep]], local[target[keep]]])
            graphs.append(
                AtomicGraph(
                    positions=torch.from_numpy(arrays["pos"][own] @ turn.T).double(),
                    atomic_numbers=torch.from_numpy(numbers[own]),
                    cell=torch.from_numpy(lattice @ turn.T)[None],
                    pbc=torch.full((1, 3), "cell" in arrays),
                    edge_index=torch.from_numpy(ends.astype(np.int64)),
                    edge_shift=torch.from_numpy(shifts[keep].astype(np.int64)),
                    cutoff=torch.tensor([cutoff], dtype=torch.float64),
                )
            )
            order.append(keep)
        self.graph = batch_graphs(graphs)
        self.edges = np.concatenate(order)


def compare_model(arrays: Reading) -> list[Row]:
    """Compare energies, forces of both kinds and intermediates of a whole model.

    Raises:
        KeyError: no energies or forces in it, or no structure.
    """
    rows: list[Row] = _unknown_options(arrays)
    kinds = [kind for kind in ("direct", "gradient") if f"forces_{kind}" in arrays]
    if not kinds:
        if "energy" not in arrays:
            raise KeyError("energy")
        kinds = ["gradient"]
    for dtype in ("float64", "float32"):
        for prediction in kinds:
            potential = Potential(_model(arrays, prediction)).to_dtype(getattr(torch, dtype)).eval()
            structures = Structures(arrays, potential.cutoff)
            recorded: Recorded = {}
            handles = list(_record(potential.model, recorded))
            found = potential(structures.graph, stress=False)
            for handle in handles:
                handle.remove()
            rows += _compare_outputs(arrays, found, structures, dtype, prediction)
            if dtype == "float64":
                rows += _compare_turned(arrays, potential, prediction)
                if prediction == kinds[0]:
                    rows += _compare_edges(arrays)
                    rows += _compare_intermediates(arrays, potential.model, recorded, structures)
    return rows


def _unknown_options(arrays: Arrays) -> list[Row]:
    """List options of the official constructor that its weights do not show and we do not know."""
    options = _meta(arrays).get("config", {})
    known = {*OFFICIAL_OPTIONS, "compile_blocks", "gradient_force"}
    return [
        Omission(f"option {name} = {options[name]!r}", "unknown to the importer")
        for name in sorted(set(options) - known)
    ]


def _compare_outputs(
    arrays: Arrays, found: Any, structures: Structures, dtype: str, prediction: str
) -> list[Row]:
    forces = found.forces[torch.from_numpy(structures.atoms)]
    name = f"forces_{prediction}"
    rows: list[Row] = []
    for quantity, ours, relative in (("energy", found.energy, 2e-6), (name, forces, 1e-4)):
        for ending in ("", "_f32") if dtype == "float32" else ("",):
            if quantity + ending not in arrays:
                continue
            truth = arrays[quantity + ending]
            largest = float(np.abs(truth).max(initial=0.0))
            tolerance = TOLERANCE["float64"] if dtype == "float64" else relative * max(largest, 0.1)
            label = f"{quantity}{ending}" + f" ({prediction})" * (quantity == "energy")
            rows.append(Deviation(label, dtype, worst(ours, truth), tolerance))
    if len(structures.atoms) < len(found.forces):
        outside = np.setdiff1d(np.arange(len(found.forces)), structures.atoms)
        largest = float(found.forces[torch.from_numpy(outside)].abs().max())
        rows.append(Deviation(f"forces of lone atoms ({prediction})", dtype, largest, 0.0))
    return rows


def _compare_turned(arrays: Arrays, potential: Potential, prediction: str) -> list[Row]:
    """Compare what the rotated structures give: low rank does not turn with them exactly."""
    names = [f"{n}_rot" for n in ("energy", f"forces_{prediction}") if f"{n}_rot" in arrays]
    if "rot" not in arrays or not names:
        return []
    structures = Structures(arrays, potential.cutoff, arrays["rot"])
    found = potential(structures.graph, stress=False)
    forces = found.forces[torch.from_numpy(structures.atoms)]
    rows: list[Row] = []
    for name in names:
        ours = found.energy if name == "energy_rot" else forces
        label = f"{name} ({prediction})" if name == "energy_rot" else name
        deviation = worst(ours, arrays[name])
        rows.append(Deviation(label, "float64", deviation, TOLERANCE["float64"]))
    return rows


def _compare_edges(arrays: Arrays) -> list[Row]:
    """Compare the stored vectors of edges with positions, images and cell."""
    if "edge_vec" not in arrays:
        return []
    atoms = np.flatnonzero(arrays.get("mask", np.ones(len(arrays["z"]), dtype=bool)))
    positions = arrays["pos"].astype(np.float64)[atoms]
    vectors = positions[arrays["edge_src"]] - positions[arrays["edge_dst"]]
    if "cell" in arrays:
        vectors = vectors + arrays["shifts"] @ arrays["cell"]
    deviation = worst(torch.from_numpy(vectors), arrays["edge_vec"])
    return [Deviation("edge_vec", "float64", deviation, TOLERANCE["float64"])]


def _compare_intermediates(
    arrays: Arrays, model: nn.Module, recorded: Recorded, structures: Structures
) -> list[Row]:
    assert isinstance(model, TDN)
    found = {name: output for name, (_, output) in recorded.items()}
    for i in range(len(model.blocks)):
        (x, edges), _ = recorded[f"b{i}.attn"]
        attention: Any = model.blocks[i].attention
        found |= _inside_attention(attention, x, edges, f"b{i}.")
        if edges.pairs is not None:
            found["rbf"] = of_all_edges(edges.basis, edges.pairs)
    found |= _ends_of_the_network(model, found["norm"], structures.graph)
    rows: list[Row] = []
    for name, ours in found.items():
        if f"mid/{name}" not in arrays:
            continue
        truth = arrays[f"mid/{name}"]
        n_atoms, n_edges = len(structures.graph.atomic_numbers), len(structures.edges)
        if len(truth) == n_edges == len(ours):
            truth = truth[structures.edges]
        elif len(ours) == n_atoms and len(truth) == len(structures.atoms):
            ours = ours[torch.from_numpy(structures.atoms)]
        if name == "head":  # what the energy reads
            truth = truth[:, 0]
        rows.append(Deviation(name, "float64", worst(ours, truth), TOLERANCE["float64"]))
    return rows


def _inside_attention(
    layer: TensorAttention, x: Tensor, edges: OperatorEdges, prefix: str
) -> dict[str, Tensor]:
    """Evaluate radial weights and both products at all edges, which the layer does not keep."""
    weights = layer.radial.of_edges(edges) * edges.envelope[:, None]
    operators = layer.operators(edges)
    both = torch.cat([layer.merge_source(x), layer.merge_target(x)])
    ends = torch.stack([edges.source, edges.target + len(x)])
    message = operator_gather(both, operators[0], weights, ends)
    value = operator_apply(layer.value(message), operators[-1], weights)
    return {f"{prefix}rad": weights[:, None], f"{prefix}tp1": message, f"{prefix}tp2": value}


def _ends_of_the_network(model: TDN, last: Tensor, graph: AtomicGraph) -> dict[str, Tensor]:
    """Evaluate embeddings of elements [N, K, C] and the head of the energy [N, 1]."""
    embedding = torch.zeros_like(last)
    embedding[:, 0] = model.embedding[model.species_of[graph.atomic_numbers]]
    hidden = nn.functional.silu(model.head_hidden.scalars(last[:, 0]))
    return {"atom_embed": embedding, "head": model.head.scalars(hidden)}


def _model(arrays: Arrays, prediction: str) -> TDN:
    meta = _meta(arrays)
    weights = {name[3:]: torch.from_numpy(arrays[name]) for name in arrays if name[:3] == "sd/"}
    options = official_sizes(weights)
    if "cutoff" in meta.get("config", {}):
        options["cutoff"] = meta["config"]["cutoff"]
    config = config_from_official(
        options,
        sorted({int(z) for z in arrays["z"].reshape(-1)}),
        average_atoms=meta.get("avg_num_nodes", AVERAGE_ATOMS),
        average_degree=meta.get("avg_degree", AVERAGE_DEGREE),
        prediction=prediction,
    )
    return model_from_official(weights, config)


def _meta(arrays: Arrays) -> dict[str, Any]:
    return json.loads(str(arrays["meta"])) if "meta" in arrays else {}


def _record(model: nn.Module, recorded: Recorded) -> Iterator[Any]:
    """Hook the modules whose outputs the golden files name; yields handles."""

    def hook(name: str) -> Callable[..., None]:
        def store(_module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            recorded[name] = inputs, output

        return store

    assert isinstance(model, TDN)
    named: dict[str, nn.Module] = {
        "rbf": model.radial_basis,
        "edge_embed": model.edge_degree,
        "norm": model.norm,
    }
    for i, block in enumerate(model.blocks):
        named |= {
            f"block{i}": block,
            f"b{i}.norm1": block.norm_1,  # type: ignore[dict-item]
            f"b{i}.attn": block.attention,  # type: ignore[dict-item]
            f"b{i}.ffn": block.contract,  # type: ignore[dict-item]
        }
    if hasattr(model, "force_head"):
        named["force_head"] = model.force_head
    for name, module in named.items():
        yield module.register_forward_hook(hook(name))
