"""Weights of messages from the length of an edge and the elements at its ends."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlip.nn.radial_table import RadialTable
from mlip.nn.so3_layers import dense


class EdgeRadialMLP(nn.Module):
    """MLP on radial basis functions and embeddings of both elements.

    Linear, layer norm, silu; the same again; linear. The first layer acts on the concatenation
    (basis, source, target): its part for the elements is a row of two small tables [Z, width].

    Args:
        n_elements: rows of the embeddings.
        n_radial: radial basis functions.
        width: of embeddings and hidden layers.
        n_out: weights of one edge.
    """

    def __init__(self, n_elements: int, n_radial: int, width: int, n_out: int) -> None:
        super().__init__()
        self.n_radial = n_radial
        self.table: RadialTable | None = None
        self.source_embedding = nn.Embedding(n_elements, width)
        self.target_embedding = nn.Embedding(n_elements, width)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.uniform_(embedding.weight, -0.001, 0.001)
        self.first = dense(n_radial + 2 * width, width)
        self.rest = nn.Sequential(
            nn.LayerNorm(width),
            nn.SiLU(),
            dense(width, width),
            nn.LayerNorm(width),
            nn.SiLU(),
            dense(width, n_out),
        )

    def forward(self, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map basis [E, R] and element rows [E] of source and target atoms to [E, n_out].

        With a table ``basis`` is the distance, [E, 1].
        """
        if self.table is not None:
            return self.table(basis[:, 0], source, target)
        return self._network(basis, source, target)

    def tabulate(self, basis: Callable[[Tensor], Tensor], cutoff: float) -> None:
        """Use splines from now on, of the pairs of elements that are added to ``table``.

        Args:
            basis: radial functions [E, R] of distances [E].
            cutoff: Å.
        """
        exact = copy.deepcopy(self).double().requires_grad_(False)

        def network(distance: Tensor, source: int, target: int) -> Tensor:
            rows = [torch.full(distance.shape, row) for row in (source, target)]
            return exact._network(basis(distance), *rows)

        self.table = RadialTable(network, cutoff, self.source_embedding.num_embeddings)

    def _network(self, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
        width = self.source_embedding.embedding_dim
        radial, of_source, of_target = self.first.weight.split([self.n_radial, width, width], dim=1)
        source_table = self.source_embedding.weight @ of_source.T  # [Z, width]
        target_table = self.target_embedding.weight @ of_target.T + self.first.bias
        hidden = basis @ radial.T + source_table[source] + target_table[target]
        return self.rest(hidden)
