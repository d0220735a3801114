"""Interpolation: weights against a library's Gaussian process, and a smooth field with a known answer."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from storm.evaluate import interpolation
from storm.evaluate.statistics import pearson


def places(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 3000, (n, 2))


def test_kriging_is_a_gaussian_process_whose_mean_is_unknown() -> None:
    known, asked = places(30), places(20, 1)
    y = np.random.default_rng(2).normal(3, 1, (30, 2))
    kernel = ConstantKernel(1e5) + 0.7 * Matern(300.0, nu=0.5) + WhiteKernel(0.3)
    library = GaussianProcessRegressor(kernel, optimizer=None).fit(known, y).predict(asked)
    weights = interpolation.kriging(300.0, 0.3)(known, asked)
    np.testing.assert_allclose(weights @ y, library, atol=1e-3)
    np.testing.assert_allclose(weights.sum(1), 1)


def test_a_moving_neighbourhood_is_as_good_as_all_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = places(150), places(30, 1)
    y = np.sin(known / 400).sum(1, keepdims=True)
    near = interpolation.kriging(400.0, 0.2)(known, asked)
    monkeypatch.setattr(interpolation, "NEAREST", 150)
    monkeypatch.setattr(interpolation, "_CHUNK", 7)
    every = interpolation.kriging(400.0, 0.2)(known, asked)
    assert np.diff(near.indptr).max() == 32 and np.diff(every.indptr).max() == 150
    assert np.abs((near - every) @ y).max() < 0.05


def test_inverse_distance_is_what_it_says() -> None:
    known, asked = np.array([[0.0, 0], [30, 0]]), np.array([[10.0, 0], [0, 0]])
    found = interpolation.inverse_distance(2.0)(known, asked).toarray()
    np.testing.assert_allclose(found[0], [0.8, 0.2])
    assert found[1, 0] > 0.998  # at a known place it is that one's value


def test_each_gene_takes_what_served_it_in_training() -> None:
    """A gene that is a smooth field under noise wants a wide kernel, one without noise a narrow one."""
    rng = np.random.default_rng(5)
    cases = []
    for _ in range(2):
        known, asked = rng.uniform(0, 3000, (2, 200, 2))
        field = [np.stack([np.sin(xy / 150).sum(1), np.sin(xy / 700).sum(1)], 1) for xy in (known, asked)]
        noisy = field[0] + rng.normal(0, [0.0, 2.0], (200, 2))
        cases.append(interpolation.Case(known, asked, noisy, field[1]))
    chosen = interpolation.choose(interpolation.KRIGING, cases[:1])
    nugget = np.array(interpolation.NUGGETS)[chosen % len(interpolation.NUGGETS)]
    assert nugget[0] < nugget[1]
    found = pearson(interpolation.interpolate(interpolation.KRIGING, chosen, cases[1]), cases[1].truth)
    assert found.min() > 0.8
    flat = interpolation.interpolate(interpolation.INVERSE_DISTANCE, np.zeros(2, np.int64), cases[1])
    assert (found > pearson(flat, cases[1].truth)).all()
