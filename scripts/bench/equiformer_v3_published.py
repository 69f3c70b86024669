"""EquiformerV3 evaluated with the operations of the published code, as the thing to be faster than.

Same weights and same numbers as `mlip.models.equiformer_v3`, arranged as its specification says the
official code works: one dense Wigner matrix [E, n, (L+1)²] an edge from Euler angles, radial MLPs
on concatenated embeddings, radial weights spread over orders before the rotation, published grids
with the feed-forward layers on their points, and everything stored for the backward pass. No
softmax trick or layer is left out. Gradient mode only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlip.graph import AtomicGraph, batch_index, number_of_graphs
from mlip.models.equiformer_v3 import EquiformerBlock, EquiformerV3
from mlip.nn.edge_radial import EdgeRadialMLP
from mlip.nn.graph_attention import EquivariantGraphAttention, smooth_leaky_relu
from mlip.nn.radial import polynomial_envelope, uniform_gaussians
from mlip.nn.so2_linear import SO2Linear
from mlip.nn.so3_layers import SO3Linear
from mlip.nn.sphere_product import SphereBasis, grid_matrices
from mlip.so3 import degree_major, order_major, wigner_matrices

GRIDS = {4: ((14, 8), (14, 14)), 6: ((20, 8), (20, 20))}  # published, by lmax


class PublishedForm:
    """Evaluate a model in gradient mode as the official code does.

    Args:
        model: its weights are used.
    """

    def __init__(self, model: EquiformerV3) -> None:
        config = model.config
        self.model, self.config = model, config
        lmax, mmax = config.lmax, config.mmax
        like = model.embedding.weight
        on_edges, on_atoms = GRIDS[lmax]
        self.edge_grid = [
            g.to(like) for g in grid_matrices(SphereBasis(lmax, mmax, True, on_edges))
        ]
        self.node_grid = [
            g.to(like) for g in grid_matrices(SphereBasis(lmax, lmax, False, on_atoms))
        ]
        sorted_, orders = degree_major(lmax, lmax), order_major(lmax, mmax)
        columns = torch.tensor([sorted_.index(pair) for pair in orders])
        self.to_orders = nn.functional.one_hot(columns, len(sorted_)).to(like)  # [n, K]
        degrees = torch.tensor([degree for degree, _ in sorted_])
        self.degrees = degrees
        self.rescale = torch.where(
            degrees > mmax, torch.sqrt((2 * degrees + 1) / (2 * mmax + 1)), 1.0
        ).to(like)[:, None]
        self.j = [matrix.to(like) for matrix in _quarter_turns(lmax)]

    def __call__(self, graph: AtomicGraph) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies [B], forces [N, 3] and stresses [B, 3, 3] in units of the model."""
        batch, n_graphs = batch_index(graph), number_of_graphs(graph)
        like = self.model.embedding.weight
        strain = like.new_zeros(n_graphs, 3, 3, requires_grad=True)
        symmetric = (strain + strain.mT) / 2
        positions = graph.positions.to(like).requires_grad_(True)
        moved = positions + (positions[:, None] @ symmetric[batch])[:, 0]
        cell = graph.cell.to(like) + graph.cell.to(like) @ symmetric
        source, target = graph.edge_index
        offset = (graph.edge_shift.to(like)[:, None] @ cell[batch[source]])[:, 0]
        vectors = moved[source] + offset - moved[target]
        energies = self._node_energies(vectors, source, target, graph.atomic_numbers)
        energy = energies.new_zeros(n_graphs).index_add(0, batch, energies)
        dx, de = torch.autograd.grad(energy.sum(), [positions, strain])
        volume = torch.linalg.det(cell.detach()).abs()[:, None, None]
        return energy.detach(), -dx, de / volume

    def _node_energies(self, vectors: Tensor, source: Tensor, target: Tensor, z: Tensor) -> Tensor:
        model, config = self.model, self.config
        species = model.species_of[z]
        distance = torch.linalg.vector_norm(vectors, dim=1)
        wigner, inverse = self._wigner(vectors / distance[:, None])
        edges = {
            "source": source,
            "target": target,
            "basis": uniform_gaussians(distance, config.n_radial, config.cutoff),
            "species": (species[source], species[target]),
            "envelope": polynomial_envelope(distance / config.cutoff, 5),
            "wigner": wigner,
            "inverse": inverse,
        }
        x = _embedded(model, species, config.lmax)
        x = x + self._edge_degree(edges, len(species))
        for block in model.blocks:
            x = x + self._attention(block.attention, block.norm_1(x), edges)
            x = x + self._feed_forward(block, block.norm_2(x))
        return model.energy_head(model.norm(x)[:, 0]) / config.average_atoms

    def _wigner(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Build dense matrices into and out of the frames from Euler angles."""
        lmax = self.config.lmax
        beta = torch.acos(unit[:, 1].clamp(-1, 1))
        alpha = torch.atan2(unit[:, 0], unit[:, 2])
        dense = unit.new_zeros(len(unit), (lmax + 1) ** 2, (lmax + 1) ** 2)
        for degree in range(lmax + 1):
            j = self.j[degree]
            block = _about_y(degree, alpha) @ j @ _about_y(degree, beta) @ j
            part = slice(degree**2, (degree + 1) ** 2)
            dense[:, part, part] = block.mT
        wigner = torch.einsum("nk,ekj->enj", self.to_orders, dense)
        return wigner, wigner.mT * self.rescale

    def _radial(self, radial: EdgeRadialMLP, edges: dict[str, Any]) -> Tensor:
        source, target = edges["species"]
        inputs = [edges["basis"], radial.source_embedding(source), radial.target_embedding(target)]
        return radial.rest(radial.first(torch.cat(inputs, dim=1)))

    def _edge_degree(self, edges: dict[str, Any], n_atoms: int) -> Tensor:
        layer, lmax = self.model.edge_degree, self.config.lmax
        weights = self._radial(layer.radial, edges) * edges["envelope"][:, None]
        message = edges["inverse"][:, :, : lmax + 1] @ weights.view(-1, lmax + 1, layer.channels)
        return _summed(message, edges["target"], n_atoms) / layer.average_degree

    def _attention(
        self, layer: EquivariantGraphAttention, x: Tensor, edges: dict[str, Any]
    ) -> Tensor:
        shape, target, n_atoms = layer.shape, edges["target"], len(x)
        weights = self._radial(layer.radial, edges)
        weights = weights.view(-1, self.config.lmax + 1, 2 * shape.channels)
        pair = torch.cat([x[edges["source"]], x[target]], dim=2)
        message = edges["wigner"] @ (pair * weights.index_select(1, self.degrees))
        message, extra = _so2(layer.linear_1, message)
        alpha, (s1, s2, gate) = extra[:, : layer.n_alpha], extra[:, layer.n_alpha :].chunk(3, dim=1)
        message = self._swiglu(message, s1, s2, gate)
        values, _ = _so2(layer.linear_2, message)
        heads = layer.alpha_norm(alpha.reshape(-1, shape.heads, shape.alpha_channels))
        logits = (smooth_leaky_relu(heads) * layer.alpha_dot).sum(2)
        attention = _softmax(logits, edges["envelope"], target, n_atoms, shape.epsilon)
        attention = attention * edges["envelope"][:, None]
        values = values.unflatten(2, (shape.heads, -1)) * attention[:, None, :, None]
        message = edges["inverse"] @ values.flatten(2)
        return _so3(layer.projection, _summed(message, target, n_atoms), self.degrees)

    def _swiglu(self, x: Tensor, s1: Tensor, s2: Tensor, gate: Tensor) -> Tensor:
        to_grid, from_grid = self.edge_grid
        first, second = torch.einsum("gn,enc->egc", to_grid, x).chunk(2, dim=2)
        out = torch.einsum("ng,egc->enc", from_grid, first * second * torch.sigmoid(gate)[:, None])
        return torch.cat([out[:, :1] + (nn.functional.silu(s1) * s2)[:, None], out[:, 1:]], dim=1)

    def _feed_forward(self, block: EquiformerBlock, x: Tensor) -> Tensor:
        layer = block.feed_forward
        to_grid, from_grid = self.node_grid
        s1, s2 = layer.scalars(x[:, 0]).chunk(2, dim=1)
        gate = torch.sigmoid(layer.gate(x[:, 0]))[:, None]
        grid = torch.einsum("gk,nkc->ngc", to_grid, _so3(layer.linear_1, x, self.degrees))
        first, second = layer.expand(grid).chunk(2, dim=2)
        grid = layer.contract(first * gate * second)
        out = torch.einsum("kg,ngc->nkc", from_grid, grid)
        out = torch.cat([out[:, :1] + (nn.functional.silu(s1) * s2)[:, None], out[:, 1:]], dim=1)
        return _so3(layer.linear_2, out, self.degrees)


def _embedded(model: EquiformerV3, species: Tensor, lmax: int) -> Tensor:
    """Put element embeddings into l = 0 of otherwise empty features."""
    scalars = model.embedding(species)
    x = scalars.new_zeros(len(species), (lmax + 1) ** 2, scalars.shape[1])
    x[:, 0] = scalars
    return x


def _so2(layer: SO2Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    n_axial = layer.lmax + 1
    axial = layer.axial(x[:, :n_axial].reshape(len(x), -1))
    extra, axial = axial[:, : layer.extra], axial[:, layer.extra :]
    parts, start = [axial.view(len(x), n_axial, -1)], n_axial
    for order, weight in enumerate(layer.orders, 1):
        count = n_axial - order
        pair = x[:, start : start + 2 * count].reshape(len(x), 2, -1)
        real, imaginary = (pair @ weight.T).chunk(2, dim=2)
        plus, minus = real[:, 0] - imaginary[:, 1], real[:, 1] + imaginary[:, 0]
        parts.append(torch.stack([plus, minus], dim=1).view(len(x), 2 * count, -1))
        start += 2 * count
    return torch.cat(parts, dim=1), extra


def _so3(layer: SO3Linear, x: Tensor, degrees: Tensor) -> Tensor:
    weight = layer.weight.index_select(0, degrees)  # [K, C_out, C_in]
    out = torch.einsum("nki,koi->nko", x, weight)
    return torch.cat([out[:, :1] + layer.bias, out[:, 1:]], dim=1)


def _softmax(
    logits: Tensor, envelope: Tensor, target: Tensor, n_atoms: int, epsilon: float
) -> Tensor:
    rows = target[:, None].expand_as(logits)
    largest = logits.new_zeros(n_atoms, logits.shape[1])
    largest = largest.scatter_reduce(0, rows, logits.detach(), "amax", include_self=False)
    weights = (logits - largest[target]).exp() * envelope[:, None]
    total = weights.new_zeros(n_atoms, logits.shape[1]).index_add(0, target, weights)
    return weights / (total[target] + epsilon)


def _summed(message: Tensor, target: Tensor, n_atoms: int) -> Tensor:
    return message.new_zeros(n_atoms, *message.shape[1:]).index_add(0, target, message)


def _quarter_turns(lmax: int) -> list[Tensor]:
    """Make the constant matrices J that turn rotations about y into rotations about x."""
    turn = torch.tensor([[0.0, -1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    return wigner_matrices(lmax, turn)


def _about_y(degree: int, angle: Tensor) -> Tensor:
    """Build [E, 2l+1, 2l+1] rotations about the polar axis."""
    size = 2 * degree + 1
    matrix = angle.new_zeros(len(angle), size, size)
    orders = torch.arange(-degree, degree + 1, device=angle.device)
    rows = torch.arange(size, device=angle.device)
    matrix[:, rows, rows.flip(0)] = torch.sin(-orders * angle[:, None])
    matrix[:, rows, rows] = torch.cos(orders * angle[:, None])
    return matrix
