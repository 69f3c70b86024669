"""Plots of simulations, crystals and training: functions that return a matplotlib `Figure`.

Figures are made through matplotlib's object interface: no pyplot, no global style, no display.
Parity plots are drawn where the errors are counted, in `mlip.simulation.parity`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase import units

from mlip.errors import require
from mlip.files import atomic_write
from mlip.validation.properties import EquationOfState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DftCrystal",
    "MdSegment",
    "energy_and_temperature",
    "energy_volume",
    "learning_curve",
    "radial_distribution",
    "save",
]

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "0.45"
_GPA = 1 / units.GPa  # in one eV/Å³


class MdSegment(NamedTuple):
    """One stretch of a simulation."""

    label: str  # for instance "NVT 600 K"
    time_ps: np.ndarray  # [K]
    potential: np.ndarray  # [K] eV/atom
    total: np.ndarray  # [K] eV/atom
    temperature_K: np.ndarray  # [K]


class DftCrystal(NamedTuple):
    """What density functional theory gives for a crystal."""

    volume: float  # Å³/atom
    bulk_modulus_GPa: float


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG; the file appears whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def energy_and_temperature(segments: Sequence[MdSegment], title: str = "") -> Figure:
    """Plot energies and temperature of a simulation over time.

    Args:
        segments: stretches that follow one another; times are of the whole simulation.
        title: of the figure.
    """
    figure = _figure((7.2, 5.6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    start = segments[0].potential[0]
    for k, segment in enumerate(segments):
        first = k == 0
        upper.plot(
            segment.time_ps,
            1000 * (segment.potential - start),
            color=COLORS[0],
            linewidth=1,
            label="potential energy" if first else None,
        )
        upper.plot(
            segment.time_ps,
            1000 * (segment.total - start),
            color=COLORS[1],
            linewidth=1.6,
            label="total energy" if first else None,
        )
        lower.plot(segment.time_ps, segment.temperature_K, color=COLORS[2], linewidth=1)
        for axes in (upper, lower):
            if not first:
                axes.axvline(segment.time_ps[0], color=GREY, linewidth=0.8, linestyle="--")
        middle = (segment.time_ps[0] + segment.time_ps[-1]) / 2
        upper.text(
            middle,
            1.02,
            segment.label,
            ha="center",
            va="bottom",
            color=GREY,
            transform=upper.get_xaxis_transform(),
        )
    upper.set_ylabel("energy − initial potential (meV/atom)")
    upper.legend(loc="lower right", frameon=False)
    lower.set_ylabel("temperature (K)")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("time (ps)")
    lower.set_xlim(segments[0].time_ps[0], segments[-1].time_ps[-1])
    return _finish(figure, title)


def radial_distribution(r: np.ndarray, curves: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Plot radial distribution functions.

    Args:
        r: [K] centres of the shells, Å.
        curves: g(r), [K], by label.
        title: of the figure.
    """
    figure = _figure((6.4, 4.2))
    axes = figure.subplots()
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    for (label, g), color in zip(curves.items(), COLORS, strict=False):
        axes.plot(r, g, color=color, linewidth=1.5, label=label)
    axes.set(xlabel="distance r (Å)", ylabel="g(r)", xlim=(0, r[-1]), ylim=(0, None))
    axes.legend(frameon=False)
    return _finish(figure, title)


def energy_volume(
    curves: Mapping[str, EquationOfState],
    dft: Mapping[str, DftCrystal] | None = None,
    title: str = "",
) -> Figure:
    """Plot the energy of crystals over their volume, one panel each.

    DFT is drawn as a mark at its equilibrium volume, and as the parabola of its bulk modulus
    within 3 % of that volume.

    Args:
        curves: equation of state by name of the crystal.
        dft: reference by the same names; may lack some.
        title: of the figure.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = _figure((3.4 * columns, 2.9 * rows))
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, (name, eos) in zip(panels, curves.items(), strict=False):
        _energy_volume_panel(axes, name, eos, (dft or {}).get(name))
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(curves) - columns) : len(curves)]:
        axes.set_xlabel("volume (Å³/atom)")
    for axes in panels[: len(curves) : columns]:
        axes.set_ylabel("E − E₀ (meV/atom)")
    panels[0].legend(frameon=False, fontsize="small", loc="upper center")
    return _finish(figure, title)


def _energy_volume_panel(
    axes: Any, name: str, eos: EquationOfState, dft: DftCrystal | None
) -> None:
    smooth = np.linspace(eos.volumes[0], eos.volumes[-1], 200)
    axes.plot(smooth, 1000 * birch_murnaghan(smooth, eos), color=COLORS[0], label="fit")
    axes.plot(
        eos.volumes,
        1000 * (eos.energies - eos.energy),
        "o",
        color=COLORS[0],
        markersize=4,
        label="potential",
    )
    text = f"{name}\n$B$ = {eos.bulk_modulus_GPa:.3g} GPa"
    if dft is not None:
        near = dft.volume * np.linspace(0.97, 1.03, 51)
        parabola = dft.bulk_modulus_GPa / _GPA * (near - dft.volume) ** 2 / (2 * dft.volume)
        axes.plot(
            near,
            1000 * parabola,
            "D--",
            color=COLORS[1],
            markersize=6,
            markevery=[25],
            zorder=5,
            label="DFT $V_0$, $B$",
        )
        text += f"\nDFT {dft.bulk_modulus_GPa:.3g} GPa"
    axes.text(0.5, 0.52, text, transform=axes.transAxes, ha="center", va="center", fontsize="small")
    axes.margins(y=0.12)


def birch_murnaghan(volumes: np.ndarray, eos: EquationOfState) -> np.ndarray:
    """Evaluate the fitted third-order Birch–Murnaghan energy above its minimum, eV/atom.

    Birch, Phys. Rev. 71, 809 (1947): with x = (V₀/V)^(2/3),
    E = 9 V₀ B/16 · [(x − 1)³ B' + (x − 1)² (6 − 4x)].
    """
    x = (eos.volume / volumes) ** (2 / 3)
    shape = (x - 1) ** 3 * eos.bulk_modulus_derivative + (x - 1) ** 2 * (6 - 4 * x)
    return 9 * eos.volume * eos.bulk_modulus_GPa / _GPA / 16 * shape


def learning_curve(
    epochs: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], title: str = ""
) -> Figure:
    """Plot errors over the epochs of a training run, on a logarithmic scale.

    Args:
        epochs: [K] numbers of the epochs.
        panels: by axis label with unit, curves [K] by name.
        title: of the figure.
    """
    ticker = require("matplotlib.ticker", extra="train")
    figure = _figure((4.2 * len(panels), 3.8))
    grid = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, (label, curves) in zip(grid, panels.items(), strict=True):
        for (name, values), color in zip(curves.items(), COLORS, strict=False):
            axes.plot(epochs, values, "o-", color=color, markersize=3, linewidth=1.4, label=name)
        axes.set(xlabel="epoch", ylabel=label, yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(True, which="both", color="0.9", linewidth=0.6)
        axes.legend(frameon=False)
    return _finish(figure, title)


def _figure(size: tuple[float, float]) -> Figure:
    figure = require("matplotlib.figure", extra="train").Figure(figsize=size, layout="constrained")
    require("matplotlib.backends.backend_agg", extra="train").FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, title: str) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize="large")
    return figure
