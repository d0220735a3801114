"""Baselines: colour features and the ridge on them."""

import numpy as np
import pytest

from storm.evaluate.baselines import colour_features, ridge_predict


def test_colour_features_are_mean_sd_and_percentiles() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (3, 11, 11, 3)).astype(np.uint8)
    found = colour_features(patches)
    pixels = patches.reshape(3, -1, 3).astype(float)
    np.testing.assert_allclose(found[:, :3], pixels.mean(1))
    np.testing.assert_allclose(found[:, 3:6], pixels.std(1))
    for i, percent in enumerate((10, 50, 90)):
        expected = np.percentile(pixels, percent, axis=1, method="inverted_cdf")
        np.testing.assert_array_equal(found[:, 6 + 3 * i : 9 + 3 * i], expected)


def test_colour_features_ignore_the_arrangement() -> None:
    rng = np.random.default_rng(0)
    patch = rng.integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    shuffled = rng.permutation(patch.reshape(-1, 3)).reshape(patch.shape)
    np.testing.assert_array_equal(colour_features(patch), colour_features(shuffled))


def test_colour_features_refuse_floats() -> None:
    with pytest.raises(ValueError, match="uint8"):
        colour_features(np.zeros((1, 4, 4, 3)))  # type: ignore[arg-type]


def test_ridge_finds_a_linear_law_per_target() -> None:
    rng = np.random.default_rng(0)
    x, law = rng.normal(3, [1, 10, 0.1], (300, 3)), rng.normal(0, 1, (3, 2))
    y = np.column_stack([x @ law + 5, rng.normal(0, 1, 300)])
    predicted = ridge_predict(x[:200], y[:200], x[200:], groups=np.arange(200) % 4)
    np.testing.assert_allclose(predicted[:, :2], y[200:, :2], atol=0.05)
    assert predicted[:, 2].std() < 0.3  # noise is shrunk although the other targets are not


def test_ridge_is_not_misled_by_a_group_level() -> None:
    """A feature that tells groups apart, with another level each, must not spoil the law within groups."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(6), 50)
    x = np.column_stack([rng.normal(0, 1, 300), group + rng.normal(0, 0.01, 300)])
    y = (x[:, 0] + rng.normal(0, 5, 6)[group])[:, None]
    predicted = ridge_predict(x[:250], y[:250], x[250:], groups=group[:250])
    assert np.corrcoef(predicted[:, 0], y[250:, 0])[0, 1] > 0.9
