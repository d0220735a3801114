"""Stain statistics: they order what an eye orders; jitter of nothing is nothing."""

import numpy as np

from storm.data import stain
from storm.schema import TILE_STATS


def mixed(hematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """Pixels of given stain amounts, by the law of Beer and Lambert with the published vectors."""
    vectors = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    density = hematoxylin[..., None] * vectors[0] + eosin[..., None] * vectors[1]
    return np.clip(np.round(256 * 10**-density - 1), 0, 255).astype(np.uint8)


def statistics(hematoxylin: np.ndarray, eosin: np.ndarray) -> dict[str, float]:
    """By name, in the stains' own units."""
    values = stain.tile_statistics(mixed(hematoxylin, eosin)) * stain._SD + stain._MEAN
    return dict(zip(TILE_STATS, values.tolist(), strict=True))


def test_known_amounts_are_found_again() -> None:
    rng = np.random.default_rng(0)
    hematoxylin, eosin = rng.uniform(0.05, 0.8, (2, 64, 64))
    found = statistics(hematoxylin, eosin)
    used = (hematoxylin[::2, ::2], eosin[::2, ::2])
    expected = [used[0].mean(), used[0].std(), used[1].mean(), used[1].std(), (used[0] > 0.45).mean()]
    np.testing.assert_allclose(list(found.values())[:5], expected, atol=0.01)
    assert found["tissue_share"] > 0.9


def test_glass_is_no_tissue() -> None:
    found = statistics(np.zeros((32, 32)), np.zeros((32, 32)))
    assert abs(found["tissue_share"]) < 1e-6 and abs(found["nuclear_share"]) < 1e-6


def test_jitter() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (stain.restain(pixels, stain.jitter_table(np.ones(3))) == pixels).all()
    darker = stain.restain(pixels, stain.jitter_table(np.array([1.5, 1.0, 1.0])))
    assert (darker[..., 0] <= pixels[..., 0]).all() and (darker[..., 1:] == pixels[..., 1:]).all()
