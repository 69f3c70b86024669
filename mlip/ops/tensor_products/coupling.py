"""Products with Clebsch–Gordan tensors: a weight for every path, or one for all.

With one harmonic y for all channels the product is a small matrix K(y) on the coefficients of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlip.ops.shared_operator import operator_apply
from mlip.ops.tables import table_like
from mlip.ops.tensor_products.interface import (
    Degrees,
    TensorProduct,
    coupled_paths,
    coupling_tensor,
)
from mlip.so3 import clebsch_gordan


@dataclass(frozen=True)
class ClebschGordanProduct(TensorProduct):
    """Full product: z_l3 = Σ over paths of w[path] · C^{l1 l2 l3}(x_l1, y_l2).

    The tensors C have unit Frobenius norm and nothing else is normalised. Every equivariant
    bilinear map of single features is within reach.
    """

    @property
    def n_weights(self) -> int:
        """One for each path, in the order of `coupled_paths`."""
        return len(coupled_paths(self.degrees))

    def path_weights(self, weights: Tensor) -> Tensor:
        """Return the weights themselves."""
        return weights

    def multiply(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Multiply by K(y) of each l1; or, with channels in y, by tables of each (l1, l2)."""
        shape = x.shape[0], self.degrees.sizes[2], x.shape[2]
        rows = self._shared_rows(x, y[:, :, 0]) if y.shape[2] == 1 else self._outer_rows(x, y)
        index = torch.zeros(0, dtype=torch.int64, device=x.device)
        rows = rows * weights.index_select(1, table_like(index, _row_paths, self.degrees))
        component = table_like(index, _row_components, self.degrees)
        return x.new_zeros(shape).index_add(1, component, rows)

    def _shared_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Components of all paths one below the other, [E, Σ(2 l3+1), C]; y is [E, d2]."""
        rows = []
        for l1 in range(self.degrees.first + 1):
            table = table_like(x, _rows_of_first, self.degrees, l1)  # [d2, rows, m1]
            matrix = (y @ table.flatten(1)).view(-1, *table.shape[1:])
            rows.append(matrix @ x[:, l1**2 : (l1 + 1) ** 2])
        return torch.cat(rows, dim=1)

    def _outer_rows(self, x: Tensor, y: Tensor) -> Tensor:
        rows = []
        for l1 in range(self.degrees.first + 1):
            for l2 in range(self.degrees.second + 1):
                if abs(l1 - l2) > self.degrees.out:
                    continue
                first, second = x[:, l1**2 : (l1 + 1) ** 2], y[:, l2**2 : (l2 + 1) ** 2]
                outer = (first[:, :, None] * second[:, None]).flatten(1, 2)  # [E, m1·m2, C]
                rows.append(table_like(x, _rows_of_pair, self.degrees, l1, l2) @ outer)
        return torch.cat(rows, dim=1)


@dataclass(frozen=True)
class SharedProduct(TensorProduct):
    """All paths with one common weight: z = w · K(y) x.

    K depends on geometry alone: one matrix an edge serves all channels and all layers.
    """

    @property
    def n_weights(self) -> int:
        """One."""
        return 1

    def path_weights(self, weights: Tensor) -> Tensor:
        """Give the one weight to each path."""
        return weights.expand(-1, len(coupled_paths(self.degrees)), -1)

    def operator(self, y: Tensor) -> Tensor:
        """Build K(y): [E, d2] → [E, d3, d1]."""
        return tensor_operator(table_like(y, _operator_table, self.degrees), y)

    def multiply(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Multiply by K(y)."""
        if y.shape[2] == 1:
            return multiply_by(self.operator(y[:, :, 0]), x, weights)
        tensor = table_like(x, coupling_tensor, self.degrees)
        return torch.einsum("ijk,eic,ejc->ekc", tensor, x, y) * weights


def operator_table(tensor: Tensor) -> Tensor:
    """Rearrange a bilinear map [d1, d2, d3] to [d2, d3, d1], from which K(y) is one product."""
    return tensor.permute(1, 2, 0).contiguous()


def tensor_operator(table: Tensor, y: Tensor) -> Tensor:
    """Contract the table [d2, d3, d1] with y [E, d2]: K, [E, d3, d1]."""
    return (y @ table.flatten(1)).view(-1, *table.shape[1:])


def multiply_by(operator: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Evaluate w · K x for K [E, d3, d1], x [E, d1, C], w [E or 1, 1, C]: [E, d3, C]."""
    return operator_apply(x, operator, weights[:, 0].expand(len(x), -1))


def _operator_table(degrees: Degrees) -> Tensor:
    return operator_table(coupling_tensor(degrees))


def _rows_of_first(degrees: Degrees, l1: int) -> Tensor:
    """Tables of all paths that begin with l1, [d2, Σ(2 l3+1), 2 l1+1]."""
    rows = []
    for _, l2, l3 in (path for path in coupled_paths(degrees) if path[0] == l1):
        full = torch.zeros(degrees.sizes[1], 2 * l3 + 1, 2 * l1 + 1, dtype=torch.float64)
        full[l2**2 : (l2 + 1) ** 2] = clebsch_gordan(l1, l2, l3).permute(1, 2, 0)
        rows.append(full)
    return torch.cat(rows, dim=1)


def _rows_of_pair(degrees: Degrees, l1: int, l2: int) -> Tensor:
    """Tables of all paths of one (l1, l2), [Σ(2 l3+1), m1·m2]."""
    paths = [path for path in coupled_paths(degrees) if path[:2] == (l1, l2)]
    return torch.cat([clebsch_gordan(*path).permute(2, 0, 1).flatten(1) for path in paths])


def _row_paths(degrees: Degrees) -> Tensor:
    paths = coupled_paths(degrees)
    return torch.cat([torch.full((2 * l3 + 1,), i) for i, (_, _, l3) in enumerate(paths)])


def _row_components(degrees: Degrees) -> Tensor:
    paths = coupled_paths(degrees)
    return torch.cat([torch.arange(l3**2, (l3 + 1) ** 2) for _, _, l3 in paths])
