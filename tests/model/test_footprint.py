"""Reading a feature map under footprints, against a plain loop in float64, and its symmetries."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storm.model.footprint import FOOTPRINT_SIDE, FootprintReader
from storm.presets import ModelConfig
from storm.schema import DISC, SQUARE

CONFIG = ModelConfig(tile_px=32, tile_mpp=1.0, patch_px=8)  # 4 x 4 patches of 8 um
SIDE, PATCH_UM, TILE_UM = 4, 8.0, 32.0


@dataclass
class Tissue:
    """One region as a dense grid of patch vectors [rows * SIDE, cols * SIDE, D], and which tiles are encoded."""

    grid: np.ndarray
    encoded: np.ndarray  # [rows, cols]

    def packed(self) -> tuple[Tensor, Tensor]:
        """Feature map [T, P, D] and tile_at [1, rows, cols]; one dummy tile where none is encoded."""
        places = np.argwhere(self.encoded)
        blocks = [self.grid[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE] for r, c in places]
        at = np.full(self.encoded.shape, -1)
        at[self.encoded] = np.arange(len(places))
        packed = np.stack(blocks or [np.zeros((SIDE, SIDE, self.grid.shape[-1]))])
        return torch.from_numpy(packed).flatten(1, 2), torch.from_numpy(at)[None]


def tissue(rows: int, cols: int, missing: int = 0, seed: int = 0) -> Tissue:
    rng = np.random.default_rng(seed)
    encoded = np.ones(rows * cols, dtype=bool)
    encoded[rng.permutation(rows * cols)[:missing]] = False
    return Tissue(rng.normal(size=(rows * SIDE, cols * SIDE, 3)), encoded.reshape(rows, cols))


def read(t: Tissue, xy: np.ndarray, size: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 2, D] and valid fractions [N, 2]."""
    feature_map, at = t.packed()
    batch = {
        "tile_at": at,
        "xy_um": torch.from_numpy(np.asarray(xy, dtype=np.float64))[None],
        "footprint_um": torch.from_numpy(np.asarray(size, dtype=np.float64))[None],
        "footprint_kind": torch.from_numpy(np.asarray(kind))[None],
    }
    feature, valid = FootprintReader(CONFIG).double()(feature_map, batch)
    return feature[0].numpy(), valid[0].numpy()


def plain_mean(t: Tissue, xy: np.ndarray, extent_um: float, points: int, disc: bool) -> tuple[np.ndarray, float]:
    """Point after point, patch after patch."""
    total, weight, used = np.zeros(t.grid.shape[-1]), 0.0, 0
    steps = [(i + 0.5) / points - 0.5 for i in range(points)]
    for dy in steps:
        for dx in steps:
            if disc and math.hypot(dx, dy) > 0.5:
                continue
            used += 1
            u, v = (xy[0] + dx * extent_um) / PATCH_UM - 0.5, (xy[1] + dy * extent_um) / PATCH_UM - 0.5
            for col in (math.floor(u), math.floor(u) + 1):
                for row in (math.floor(v), math.floor(v) + 1):
                    w = (1 - abs(u - col)) * (1 - abs(v - row))
                    inside = 0 <= row < t.grid.shape[0] and 0 <= col < t.grid.shape[1]
                    if inside and t.encoded[row // SIDE, col // SIDE]:
                        total += w * t.grid[row, col]
                        weight += w
    return (total / weight if weight else total), weight / used


def sample(rng: np.random.Generator, t: Tissue, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Footprints of 2-200 um, some centres on tile borders and on the region's own border."""
    rows, cols = t.encoded.shape
    extent = np.array([cols, rows]) * TILE_UM
    xy = rng.uniform(0, 1, (n, 2)) * extent
    xy[::4] = np.round(xy[::4] / TILE_UM) * TILE_UM
    return xy, np.exp(rng.uniform(np.log(2), np.log(200), n)), rng.integers(0, 2, n)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**31))
def test_equals_the_plain_loop(rows: int, cols: int, missing: int, seed: int) -> None:
    t = tissue(rows, cols, min(missing, rows * cols), seed)
    xy, size, kind = sample(np.random.default_rng(seed), t, 8)
    feature, valid = read(t, xy, size, kind)
    for i in range(8):
        under = plain_mean(t, xy[i], size[i], FOOTPRINT_SIDE, kind[i] == DISC)
        around = plain_mean(t, xy[i], TILE_UM, SIDE // 2, False)
        for part, (mean, share) in enumerate((under, around)):
            np.testing.assert_allclose(valid[i, part], share, atol=1e-12)
            if share > 1e-9:
                np.testing.assert_allclose(feature[i, part], mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_flips_and_quarter_turns_change_nothing(flip: bool, turns: int) -> None:
    t = tissue(3, 2, missing=2)
    xy, size, kind = sample(np.random.default_rng(1), t, 60)
    before, valid_before = read(t, xy, size, kind)
    width, height = 2 * TILE_UM, 3 * TILE_UM
    grid, encoded = t.grid, t.encoded
    if flip:
        grid, encoded, xy = grid[:, ::-1], encoded[:, ::-1], np.stack([width - xy[:, 0], xy[:, 1]], -1)
    for _ in range(turns):  # np.rot90 turns counter-clockwise: what was right is now at the top
        xy = np.stack([xy[:, 1], width - xy[:, 0]], -1)
        width, height = height, width
    moved = Tissue(np.ascontiguousarray(np.rot90(grid, turns)), np.ascontiguousarray(np.rot90(encoded, turns)))
    after, valid_after = read(moved, xy, size, kind)
    np.testing.assert_allclose(valid_after, valid_before, atol=1e-12)
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9)


def test_the_place_in_the_region_and_the_order_of_the_tiles_change_nothing() -> None:
    t = tissue(2, 2)
    xy, size, kind = np.array([[20.0, 33.0], [40.0, 12.5]]), np.array([30.0, 8.0]), np.array([DISC, SQUARE])
    before, _ = read(t, xy, size, kind)
    larger = Tissue(np.pad(t.grid, ((SIDE, 0), (2 * SIDE, 0), (0, 0))), np.pad(t.encoded, ((1, 0), (2, 0))))
    after, _ = read(larger, xy + np.array([2 * TILE_UM, TILE_UM]), size, kind)
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_a_linear_field_is_read_at_the_centre() -> None:
    """Bilinear reading of a + b x + c y, averaged over a centred footprint, is its value at the centre."""
    at = (np.arange(4 * SIDE) + 0.5) * PATCH_UM
    x, y = np.meshgrid(at, at)
    t = Tissue(np.stack([x, y, 3 + 2 * x - y], -1), np.ones((4, 4), dtype=bool))
    xy = np.array([[64.0, 64.0], [50.3, 71.9], [66.6, 40.0]])
    feature, valid = read(t, xy, np.array([2.0, 55.0, 20.0]), np.array([SQUARE, DISC, DISC]))
    expected = np.stack([xy[:, 0], xy[:, 1], 3 + 2 * xy[:, 0] - xy[:, 1]], -1)
    np.testing.assert_allclose(valid, 1, atol=1e-12)
    np.testing.assert_allclose(feature, np.stack([expected, expected], 1), rtol=1e-12)


def test_the_window_reads_each_patch_under_it() -> None:
    """A tile-wide window centred on a tile weighs all its patches, and no other, alike to a quarter."""
    t = Tissue(np.eye(9 * SIDE**2).reshape(3 * SIDE, 3 * SIDE, -1), np.ones((3, 3), dtype=bool))
    feature, _ = read(t, np.array([[48.0, 48.0]]), np.array([10.0]), np.array([DISC]))
    weight = feature[0, 1].reshape(3 * SIDE, 3 * SIDE)
    inner = weight[SIDE : 2 * SIDE, SIDE : 2 * SIDE]
    assert (inner > 0).all() and inner.sum() == pytest.approx(1)


def test_nothing_to_read_is_zero() -> None:
    feature, valid = read(tissue(1, 2, missing=2), np.array([[5.0, 5.0]]), np.array([55.0]), np.array([DISC]))
    assert not feature.any() and not valid.any()
    feature, valid = read(tissue(2, 2), np.array([[-100.0, 5.0]]), np.array([8.0]), np.array([DISC]))
    assert not feature.any() and not valid.any()
