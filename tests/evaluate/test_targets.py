"""Targets and gene rules against their definitions, written out plainly."""

import numpy as np
import pytest
from scipy import sparse

from storm.evaluate import targets


@pytest.fixture
def counts() -> sparse.csr_array:
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 4.0, 400) * rng.gamma(2.0, 0.5, (60, 1))
    return sparse.csr_array(rng.poisson(rate).astype(float))


def test_targets_are_what_they_are_called(counts: sparse.csr_array) -> None:
    depth = np.asarray(counts.sum(1)).astype(int) + 50
    dense = counts.toarray()
    np.testing.assert_allclose(targets.target("lognorm", counts, depth), np.log1p(dense / depth[:, None] * 1e4))
    np.testing.assert_allclose(targets.target("raw", counts, depth), np.log1p(dense))


def test_residuals_hold_nothing_of_depth(counts: sparse.csr_array) -> None:
    depth = np.asarray(counts.sum(1)).astype(int)
    left = targets.target("residual", counts, depth)
    line = np.polyfit(np.log(depth), targets.lognorm(counts, depth), 1)
    expected = targets.lognorm(counts, depth) - (np.log(depth)[:, None] * line[0] + line[1])
    np.testing.assert_allclose(left, expected, atol=1e-9)
    assert np.abs(np.log(depth) @ left).max() < 1e-8
    constant = targets.residualised(np.arange(6.0).reshape(3, 2), np.ones(3))
    np.testing.assert_allclose(constant, [[-2, -2], [0, 0], [2, 2]])


def test_moments_of_several_sections_are_those_of_all_profiles(counts: sparse.csr_array) -> None:
    depth = np.asarray(counts.sum(1)).astype(int)
    values = targets.lognorm(counts, depth)
    found = targets.moments([counts[:25], counts[25:]], [depth[:25], depth[25:]])
    np.testing.assert_allclose(found.mean, values.mean(0))
    np.testing.assert_allclose(found.variance, values.var(0), atol=1e-9)


def test_rule_var_takes_the_variable_among_the_expressed() -> None:
    of = targets.Moments(np.array([5.0, 4, 3, 0.1]), np.array([0.1, 2, 1, 9]))
    assert targets.top_variance(of, genes=2, among=3).tolist() == [1, 2]


def test_rule_binned_compares_genes_of_like_mean() -> None:
    mean = np.repeat([1.0, 10.0], 10) + np.arange(20) * 1e-3
    variance = mean.copy()
    variance[[3, 14]] *= 5  # the odd one of each bin
    assert targets.top_binned(targets.Moments(mean, variance), genes=2, bins=2).tolist() == [3, 14]
    mean[3] = 0.0  # never seen: no dispersion, and no part in a bin
    assert 3 not in targets.top_binned(targets.Moments(mean, variance), genes=20, bins=2)
