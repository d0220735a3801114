"""Pearson and the block bootstrap: equal to numpy's, zero for constants, wide enough for correlated neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm.evaluate import statistics


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_pearson_is_numpys_whatever_the_scale(seed: int, shift: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 40, 3))
    expected = [np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(3)]
    np.testing.assert_allclose(statistics.pearson(x * scale + shift, y), expected, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_column_counts_as_zero(value: float) -> None:
    y = np.random.default_rng(0).normal(size=(50, 1))
    constant = np.full((50, 1), value)
    assert statistics.pearson(constant, y) == 0 and statistics.pearson(y, constant) == 0
    assert (statistics.bootstrap(constant, y, np.arange(50) % 5, 0, 20) == 0).all()


def test_blocks_are_squares_and_shrink_on_small_sections() -> None:
    xy = np.stack(np.meshgrid(np.arange(0, 4000, 200.0), np.arange(0, 4000, 200.0)), -1).reshape(-1, 2)
    found = statistics.blocks(xy)
    assert found.max() == 15 and set(np.bincount(found)) == {25}
    assert statistics.blocks(xy / 2).max() == 15
    assert statistics.blocks(xy[:1]).tolist() == [0]


def test_a_replicate_resamples_whole_blocks() -> None:
    rng = np.random.default_rng(1)
    block = np.repeat(np.arange(6), 10)
    x, y = rng.normal(size=(2, 60, 2))
    found = statistics.bootstrap(x, y, block, seed=3, replicates=5)
    draws = statistics.block_weights(block, 3, 5).astype(int)
    assert (draws.sum(1) == 6).all() and len(np.unique(draws, axis=0)) > 1
    for replicate, weight in zip(found, draws, strict=True):
        rows = np.concatenate([np.flatnonzero(np.repeat(block == b, 1)) for b in range(6) for _ in range(weight[b])])
        np.testing.assert_allclose(replicate, [np.corrcoef(x[rows, k], y[rows, k])[0, 1] for k in range(2)], atol=1e-9)


def test_sections_of_as_many_blocks_are_drawn_apart_and_methods_of_one_alike() -> None:
    block = np.repeat(np.arange(6), 10)
    other = np.concatenate([block[1:], block[-1:]])
    assert (statistics.block_weights(block, 3) == statistics.block_weights(block.copy(), 3)).all()
    together = np.corrcoef(statistics.block_weights(block, 3)[:, 0], statistics.block_weights(other, 3)[:, 0])[0, 1]
    assert abs(together) < 0.15


def test_intervals_of_smooth_fields_are_wider_than_those_of_noise() -> None:
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(40) * 100.0, np.arange(40) * 100.0), -1).reshape(-1, 2)
    field = np.repeat(np.repeat(rng.normal(size=(2, 8, 8)), 5, 1), 5, 2).reshape(2, -1, 1)
    noise = rng.normal(size=(2, 1600, 1))

    def width(pair: np.ndarray) -> float:
        replicates = statistics.bootstrap(pair[0], pair[1], statistics.blocks(xy), 0)
        found = statistics.interval(0.0, replicates[:, 0])
        return found.high - found.low

    assert width(field) > 2.5 * width(noise)


def test_block_means_are_means_over_drawn_blocks() -> None:
    block, values = np.repeat(np.arange(5), [3, 1, 4, 2, 5]), np.random.default_rng(2).normal(size=15)
    found = statistics.block_means(values, block, seed=1, replicates=4)
    for mean, weight in zip(found, statistics.block_weights(block, 1, 4), strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(block == b), int(w)) for b, w in enumerate(weight)])
        assert mean == pytest.approx(values[rows].mean())


def test_donors_are_drawn_whole_and_one_alone_leaves_its_blocks() -> None:
    rng = np.random.default_rng(0)
    each = np.array([[0.2], [0.2], [0.8]]) + 0.01 * rng.normal(size=(3, 1000))
    found = statistics.over_donors(each, np.array([0, 0, 1]), 0)
    assert set(np.round(found, 1)) == {0.2, 0.4, 0.8}  # two of one donor, both, two of the other
    alone = statistics.over_donors(each[:1], np.zeros(1, np.int64), 0)
    assert sorted(alone) == sorted(each[0])
    alike = statistics.over_donors(np.stack([each[0]] * 2), np.zeros(2, np.int64), 0)
    assert alike.std() == pytest.approx(each[0].std() / 2**0.5, rel=0.1)  # not drawn together


def test_the_donor_bootstrap_finds_a_difference_that_all_donors_share() -> None:
    rng = np.random.default_rng(0)
    donor = rng.normal(0, 1, (1, 6, 1))  # what one donor is worth is the same in both arms
    first = donor + np.array([0.3, 0.0]) + rng.normal(0, 0.02, (3, 6, 2))
    second = donor + rng.normal(0, 0.02, (4, 6, 2))
    better, equal = statistics.donor_bootstrap(first, second, seed=0)
    assert better.value == pytest.approx(first[..., 0].mean() - second[..., 0].mean())
    assert 0.2 < better.low < better.value < better.high < 0.4
    assert equal.low < 0 < equal.high
    uneven = statistics.donor_bootstrap(first + rng.normal(0, 1, (1, 6, 2)), second, seed=0)
    assert uneven[0].high - uneven[0].low > 5 * (better.high - better.low)
    with pytest.raises(ValueError, match="same two or more donors"):
        statistics.donor_bootstrap(first[:, :1], second[:, :1], 0)
