"""Reference energies: exact recovery from a stream, degenerate compositions, given, isolated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlip.errors import InputError
from mlip.training import references as module
from mlip.training.references import (
    EnergyCollector,
    EnergyStatistics,
    fit_references,
    given_references,
    isolated_references,
    merge,
    residual_rmse,
    summarise,
)
from mlip.training.zero import Zero

# like OMol25: total energies of all electrons, eV
ALL_ELECTRON = {1: -13.6, 6: -1030.5, 8: -2043.25, 17: -12518.0, 47: -144_000.0}


def collect(counts: np.ndarray, energies: np.ndarray, elements: tuple[int, ...]):
    """Statistics of energies that are not NaN."""
    collector = EnergyCollector()
    for row, energy in zip(counts, energies, strict=True):
        if np.isfinite(energy):
            collector.add(np.repeat(elements, row), energy)
    return collector.result()


def molecules(n: int, seed: int, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Compositions [n, 5] and energies [n] of molecules; silver is rare."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, 12, (n, 5)) * (random.random((n, 5)) < 0.5)
    counts[:, 4] *= np.arange(n) % 50 == 3
    counts[:, 0] += 1
    energies = counts @ np.array(list(ALL_ELECTRON.values()))
    return counts, energies + random.normal(0, noise, n) * counts.sum(1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
def test_stream_equals_direct_formulas_for_all_electron_energies() -> None:
    counts, energies = molecules(2000, 0)
    elements = tuple(ALL_ELECTRON)
    found = collect(counts, energies, elements)
    fitted = fit_references(found, elements)
    n_atoms = counts.sum(1)
    x, y = counts / n_atoms[:, None], energies / n_atoms
    truth = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(list(fitted.values()), truth, rtol=1e-9)
    report = summarise(fitted, found, "fitted")
    off = y - x @ np.array(list(fitted.values()))
    assert report.rmse == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-9)
    assert 0.019 < report.rmse < 0.021
    for column, (z, rmse) in enumerate(report.rmse_of_element.items()):
        holds = counts[:, column] > 0
        assert found.counts[z] == holds.sum()
        assert rmse == pytest.approx(np.sqrt(np.mean(off[holds] ** 2)), rel=1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_rare_element_is_not_pulled_to_the_mean() -> None:
    counts, energies = molecules(5000, 1, noise=0.0)
    counts[:, 4] = 0
    counts[4000, 4] = 1
    energies = counts @ np.array(list(ALL_ELECTRON.values()))
    fitted = fit_references(collect(counts, energies, tuple(ALL_ELECTRON)), tuple(ALL_ELECTRON))
    np.testing.assert_allclose(list(fitted.values()), list(ALL_ELECTRON.values()), rtol=1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_merged_and_shifted_statistics_are_those_of_all_energies() -> None:
    counts, energies = molecules(500, 2)
    elements = tuple(ALL_ELECTRON)
    whole = collect(counts, energies, elements)
    parts = [collect(counts[k::3], energies[k::3], elements) for k in range(3)]
    references = {z: 1.001 * e for z, e in ALL_ELECTRON.items()}
    shift = {z: 10.0 * z for z in elements}
    moved = {z: references[z] + shift[z] for z in elements}
    for of in (0, *elements):
        expected = residual_rmse(whole, references, of)
        assert residual_rmse(merge(parts), references, of) == pytest.approx(expected, rel=1e-10)
        assert residual_rmse(whole.shifted(shift), moved, of) == pytest.approx(expected, rel=1e-9)


def test_missing_energies_and_elements_without_one() -> None:
    counts, energies = np.eye(3, dtype=int), np.array([-1.0, -3.0, np.nan])
    found = collect(counts, energies, (11, 17, 29))
    assert found.count == 2
    fitted = fit_references(found, (11, 17, 29))
    assert fitted == pytest.approx({11: -1.0, 17: -3.0, 29: -2.0})
    report = summarise(fitted, found, "fitted")
    assert report.rmse == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(report.rmse_of_element[29])


def test_elements_in_fixed_ratio_share_the_energy() -> None:
    counts = np.array([[4, 4], [8, 8], [2, 2]])
    found = collect(counts, counts.sum(1) * -3.0, (11, 17))
    np.testing.assert_allclose(list(fit_references(found, (11, 17)).values()), [-3, -3], atol=1e-9)


def test_given_energies_leave_no_residual() -> None:
    energies = given_references({"Cu": -0.25, "Au": -0.5, "H": 1.0}, (29, 79))
    assert energies == {29: -0.25, 79: -0.5}
    found = collect(np.eye(2, dtype=int), np.array([-0.25, -0.5]), (29, 79))
    report = summarise(energies, found, "given")
    assert report.rmse == 0.0
    assert list(report.rmse_of_element.values()) == [0.0, 0.0]
    with pytest.raises(InputError, match="no value for Au"):
        given_references({"Cu": -0.25}, (29, 79))
    with pytest.raises(InputError, match="'Xq' is not an element"):
        given_references({"Xq": -0.25}, (29, 79))


def test_isolated_atoms_must_be_there() -> None:
    assert isolated_references({1: -13.6, 8: -5.0, 6: 0.0}, (1, 8)) == {1: -13.6, 8: -5.0}
    with pytest.raises(InputError, match=r"no neutral isolated atom.* of C, O"):
        isolated_references({1: -13.6}, (1, 6, 8))


def test_no_energies_at_all() -> None:
    nothing = EnergyCollector().result()
    assert nothing == EnergyStatistics((), {}, {})
    fitted = fit_references(nothing, (29,))
    assert fitted == {29: 0.0}
    assert np.isnan(summarise(fitted, merge([nothing, nothing]), "fitted").rmse)


def test_a_set_without_energies_is_told_so() -> None:
    common = summarise({29: -3.7}, EnergyCollector().result(), "given")
    told = Zero(common, "total", {}, {"crystals": 0.25, "forces only": math.nan}).lines()
    assert told[-2:] == [
        "  set crystals: residual RMSE 0.2500 eV/atom",
        "  set forces only: no energies",
    ]
