"""Weights of messages from the length of an edge and the elements at its ends."""

from __future__ import annotations

from torch import Tensor, nn

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
        """Map basis [E, R] and element rows [E] of source and target atoms to [E, n_out]."""
        width = self.source_embedding.embedding_dim
        radial, of_source, of_target = self.first.weight.split([self.n_radial, width, width], dim=1)
        source_table = self.source_embedding.weight @ of_source.T  # [Z, width]
        target_table = self.target_embedding.weight @ of_target.T + self.first.bias
        hidden = basis @ radial.T + source_table[source] + target_table[target]
        return self.rest(hidden)
