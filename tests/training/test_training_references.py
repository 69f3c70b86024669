"""Reference energies: exact recovery, degenerate compositions, the residual check."""

from __future__ import annotations

import numpy as np
import pytest

from mlip.errors import DataError, InputError
from mlip.training.references import fit_references, given_references, summarise


def test_fit_recovers_all_electron_energies_and_the_residual() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, (200, 3))
    truth = np.array([-13.6, -1030.5, -39000.25])
    noise = random.normal(0, 0.02, 200)
    energies = counts @ truth + noise * counts.sum(1)
    energies[7] = np.nan
    fitted = fit_references(counts, energies, (1, 8, 47))
    np.testing.assert_allclose(list(fitted.values()), truth, atol=0.05)
    report = summarise(fitted, counts, energies, fitted=True)
    assert report.rmse == pytest.approx(np.sqrt(np.mean(np.delete(noise, 7) ** 2)), rel=0.05)


def test_fit_agrees_with_least_squares_without_noise() -> None:
    random = np.random.default_rng(1)
    counts = random.integers(0, 9, (50, 2)) + np.array([1, 0])
    energies = counts @ np.array([-3.5, 2.25])
    fitted = fit_references(counts, energies, (29, 79))
    np.testing.assert_allclose(list(fitted.values()), [-3.5, 2.25], atol=1e-7)


def test_elements_in_fixed_ratio_share_the_energy() -> None:
    counts = np.array([[4, 4], [8, 8], [2, 2]])
    fitted = fit_references(counts, counts.sum(1) * -3.0, (11, 17))
    np.testing.assert_allclose(list(fitted.values()), [-3.0, -3.0], atol=1e-9)


def test_given_isolated_atoms_leave_no_residual() -> None:
    energies = given_references({"Cu": -0.25, "Au": -0.5, "H": 1.0}, (29, 79))
    assert energies == {29: -0.25, 79: -0.5}
    report = summarise(energies, np.eye(2, dtype=int), np.array([-0.25, -0.5]), fitted=False)
    assert report.rmse == 0.0
    assert list(report.rmse_of_element.values()) == [0.0, 0.0]
    with pytest.raises(InputError, match="no value for Au"):
        given_references({"Cu": -0.25}, (29, 79))
    with pytest.raises(InputError, match="'Xq' is not an element"):
        given_references({"Xq": -0.25}, (29, 79))


def test_energies_of_another_zero_are_refused() -> None:
    counts = np.ones((4, 1), dtype=int)
    with pytest.raises(DataError, match=r"1000\.0 eV/atom.*level of theory"):
        summarise({29: 0.0}, counts, np.full(4, -1000.0), fitted=False)


def test_no_energies_at_all() -> None:
    counts, energies = np.ones((3, 1), dtype=int), np.full(3, np.nan)
    fitted = fit_references(counts, energies, (29,))
    assert fitted == {29: 0.0}
    assert np.isnan(summarise(fitted, counts, energies, fitted=True).rmse)
