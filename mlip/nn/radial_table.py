"""Radial networks of distance and two elements as cubic splines, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlip.ops.backend import default_backend, numba_missing

INTERVALS = (256, 512, 1024, 2048, 4096)
TOLERANCE = 1e-7  # of the largest weight: what float32 can hold


class RadialTable:
    """Cubic splines through a network of distance, for each pair of elements.

    Twice continuously differentiable, with the slopes of the network at both ends. The number of
    intervals doubles until the error is below 1e-7 of the largest weight. Derivatives are those of
    the splines, so that forces stay the exact derivative of the energy; there is no second one.

    Args:
        network: maps float64 distances [n] and two rows of element tables to [n, n_out].
        cutoff: end of the range, Å.
        n_elements: rows of the element tables.
    """

    def __init__(
        self, network: Callable[[Tensor, int, int], Tensor], cutoff: float, n_elements: int
    ) -> None:
        self.network, self.cutoff = network, cutoff
        self.error = 0.0  # largest so far, in units of the largest weight
        self._intervals = INTERVALS[0]
        self._pairs: list[tuple[int, int]] = []
        self._row = torch.full((n_elements, n_elements), -1)
        self._table = torch.empty(0)

    def __call__(self, distance: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Evaluate the splines of pairs that were added: [E, n_out].

        Args:
            distance: [E], Å.
            source: [E] element rows.
            target: likewise.
        """
        rows = self._row.to(source.device)[source, target]
        if self._table.dtype != distance.dtype or self._table.device != distance.device:
            self._table = self._table.to(distance)
        return _Lookup.apply(distance, self._table, rows, self._intervals / self.cutoff)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._table.nbytes

    def add(self, pairs: list[tuple[int, int]]) -> None:
        """Tabulate pairs of element rows, and all others again if these need finer splines."""
        for n in (count for count in INTERVALS if count >= self._intervals):
            made = [self._spline(pair, n) for pair in pairs]
            worst = max(error for _, error in made)
            if worst <= TOLERANCE:
                break
        if n > self._intervals:
            made = [self._spline(pair, n) for pair in self._pairs] + made
            self._table, self.error = torch.empty(0), 0.0
        new = torch.stack([coefficients for coefficients, _ in made])
        self._table = torch.cat([self._table.cpu().double(), new]) if len(self._table) else new
        self._pairs += pairs
        self._intervals = n
        self.error = max(self.error, *(error for _, error in made))
        for row, (a, b) in enumerate(self._pairs):
            self._row[a, b] = row

    def _spline(self, pair: tuple[int, int], n: int) -> tuple[Tensor, float]:
        """Compute coefficients [n, 4, n_out] in float64 and the error between the knots."""
        from scipy.interpolate import CubicSpline

        with torch.inference_mode(False), torch.no_grad():
            knots = torch.linspace(0, self.cutoff, n + 1, dtype=torch.float64)
            ends = knots[[0, -1]]
            values = self.network(knots, *pair)
            slopes = torch.func.jvp(
                lambda r: self.network(r, *pair), (ends,), (torch.ones_like(ends),)
            )[1]
            step = self.cutoff / n
            clamped = tuple((1, slope.numpy() * step) for slope in slopes)
            spline = CubicSpline(range(n + 1), values.numpy(), bc_type=clamped)
            found = torch.from_numpy(spline.c[::-1].copy()).permute(1, 0, 2).contiguous()
            middle = found[:, 0] + found[:, 1] / 2 + found[:, 2] / 4 + found[:, 3] / 8
            exact = self.network(knots[:-1] + step / 2, *pair)
            error = float((middle - exact).abs().max() / values.abs().max())
        return found, error


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, distance: Tensor, table: Tensor, rows: Tensor, density: float) -> Tensor:
        place = distance.clamp(min=0.0) * density
        interval = place.long().clamp(0, table.shape[1] - 1)
        t = place - interval
        ctx.save_for_backward(table, rows, interval, t)
        ctx.density = density
        if _compiled(table):
            from mlip.ops.cpu.tables import table_values

            return table_values(table, rows, interval, t)
        a, b, c, d = table[rows, interval].unbind(1)
        x = t[:, None]
        return a + x * (b + x * (c + x * d))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        table, rows, interval, t = ctx.saved_tensors
        if _compiled(table):
            from mlip.ops.cpu.tables import table_slopes

            slope = table_slopes(table, rows, interval, t, gradient)
        else:
            _, b, c, d = table[rows, interval].unbind(1)
            x = t[:, None]
            slope = (gradient * (b + x * (2 * c + 3 * x * d))).sum(1)
        return slope * ctx.density, None, None, None


def _compiled(table: Tensor) -> bool:
    on_cpu = table.device.type == "cpu"
    return on_cpu and default_backend() != "torch" and numba_missing() is None
