"""Plots: what is drawn is what was given, files are whole, and nothing global is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT

from mlip.errors import MlipError
from mlip.validation import plots, properties


@pytest.fixture(scope="module")
def copper() -> properties.EquationOfState:
    return properties.equation_of_state(bulk("Cu", a=3.59), EMT(), volume_range=0.1, points=11)


def segments() -> list[plots.MdSegment]:
    time = np.linspace(0, 1, 11)
    first = plots.MdSegment("NVT", time, time - 3.5, time - 3.4, 300 + time)
    second = plots.MdSegment("NVE", 1 + time, -2.5 + 0 * time, -2.4 + 0 * time, 301 + time)
    return [first, second]


def test_birch_murnaghan_passes_through_the_points(copper: properties.EquationOfState) -> None:
    fitted = plots.birch_murnaghan(copper.volumes, copper)
    np.testing.assert_allclose(fitted, copper.energies - copper.energy, atol=2e-4)
    h = 1e-3 * copper.volume
    around = copper.volume + np.array([-h, 0, h])
    curvature = np.diff(plots.birch_murnaghan(around, copper), 2)[0] / h**2
    assert curvature * copper.volume / units.GPa == pytest.approx(copper.bulk_modulus_GPa, rel=1e-4)


def test_energy_volume_draws_each_crystal_and_its_dft_mark(
    copper: properties.EquationOfState,
) -> None:
    dft = plots.DftCrystal(11.9, 140.0)
    figure = plots.energy_volume({"Cu": copper, "X": copper}, {"Cu": dft})
    with_mark, without = figure.axes
    assert len(with_mark.lines) == 3
    assert len(without.lines) == 2
    points = with_mark.lines[1]
    np.testing.assert_allclose(points.get_xdata(), copper.volumes)
    np.testing.assert_allclose(points.get_ydata(), 1000 * (copper.energies - copper.energy))
    volumes, energies = with_mark.lines[2].get_data()
    assert volumes[np.argmin(energies)] == pytest.approx(11.9)
    curvature = np.polyfit(volumes - 11.9, energies / 1000, 2)[0] * 2
    assert curvature * 11.9 / units.GPa == pytest.approx(140.0)


def test_four_crystals_fill_two_rows(copper: properties.EquationOfState) -> None:
    figure = plots.energy_volume(dict.fromkeys("abcd", copper))
    assert sum(axes.axison for axes in figure.axes) == 4
    assert [bool(axes.get_xlabel()) for axes in figure.axes[:4]] == [False, True, True, True]


def test_energy_and_temperature_share_one_zero() -> None:
    upper, lower = plots.energy_and_temperature(segments(), "run").axes
    potential, total = upper.lines[0], upper.lines[1]
    assert potential.get_ydata()[0] == 0
    assert total.get_ydata()[0] == pytest.approx(100)
    assert upper.lines[2].get_ydata()[0] == pytest.approx(1000)
    assert lower.lines[0].get_ydata()[0] == 300
    assert lower.get_xlim() == (0, 2)
    assert "meV/atom" in upper.get_ylabel()
    assert "K" in lower.get_ylabel()


def test_curves_have_labels_and_units(tmp_path: Path) -> None:
    r = np.linspace(0.1, 6, 30)
    (axes,) = plots.radial_distribution(r, {"a": np.sin(r) ** 2, "b": r}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert "Å" in axes.get_xlabel()
    panels = {"force MAE (meV/Å)": {"train": [30, 20, 10]}, "other": {"train": [3, 2, 1]}}
    figure = plots.learning_curve([1, 2, 3], panels)
    assert [axes.get_ylabel() for axes in figure.axes] == list(panels)
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    plots.save(figure, tmp_path / "plots" / "x.png")
    content = (tmp_path / "plots" / "x.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    figure = plots.energy_and_temperature(segments())
    with pytest.raises(MlipError):
        plots.save(figure, tmp_path / "file" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_drawing_touches_nothing_global() -> None:
    code = (
        "import numpy as np, sys\n"
        "from mlip.validation import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "plots.radial_distribution(np.arange(1., 9), {'g': np.arange(8.)}).canvas.draw()\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
