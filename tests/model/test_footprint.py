"""Reading a feature map under footprints, against a plain loop in float64, and its symmetries."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storm.data.outline import sample_points
from storm.model.footprint import FootprintReader
from storm.presets import ModelConfig
from storm.schema import DISC, FOOTPRINT_SIDE, POLYGON, SQUARE, Profiles
from tests.data import samples

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


def read(t: Tissue, shown: Profiles, config: ModelConfig = CONFIG) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 2, D] and valid fractions [N, 2]."""
    feature_map, at = t.packed()
    points, side = sample_points(shown)
    batch = {"tile_at": at, "xy_um": shown.xy_um, "footprint_um": side, "footprint_points": points}
    tensors = {name: x if isinstance(x, Tensor) else torch.from_numpy(x)[None] for name, x in batch.items()}
    feature, valid = FootprintReader(config).double()(feature_map, tensors)
    return feature[0].numpy(), valid[0].numpy()


def inside(shown: Profiles, i: int, x: float, y: float) -> bool:
    """Whether a place relative to a profile's centre is in its footprint, one edge after another."""
    if shown.footprint_kind[i] == SQUARE:
        return True
    if shown.footprint_kind[i] == DISC:
        return bool(math.hypot(x, y) <= shown.footprint_um[i] / 2)
    ring = shown.polygon_um[shown.polygon_indptr[i] : shown.polygon_indptr[i + 1]].astype(float)
    odd = False
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            odd = not odd
    return odd


def plain_points(shown: Profiles, i: int) -> list[tuple[float, float]]:
    """The points of a footprint relative to its centre."""
    size = float(shown.footprint_um[i])
    if shown.footprint_kind[i] == POLYGON:
        ring = shown.polygon_um[shown.polygon_indptr[i] : shown.polygon_indptr[i + 1]]
        size = 2 * float(np.abs(ring).max()) * (1 - 2.0**-10)
    steps = [((i + 0.5) / FOOTPRINT_SIDE - 0.5) * size for i in range(FOOTPRINT_SIDE)]
    return [(dx, dy) for dy in steps for dx in steps if inside(shown, i, dx, dy)]


def plain_mean(t: Tissue, xy: np.ndarray, points: list[tuple[float, float]]) -> tuple[np.ndarray, float]:
    """Point after point, patch after patch."""
    total, weight = np.zeros(t.grid.shape[-1]), 0.0
    for dx, dy in points:
        u, v = (xy[0] + dx) / PATCH_UM - 0.5, (xy[1] + dy) / PATCH_UM - 0.5
        for col in (math.floor(u), math.floor(u) + 1):
            for row in (math.floor(v), math.floor(v) + 1):
                w = (1 - abs(u - col)) * (1 - abs(v - row))
                held = 0 <= row < t.grid.shape[0] and 0 <= col < t.grid.shape[1]
                if held and t.encoded[row // SIDE, col // SIDE]:
                    total += w * t.grid[row, col]
                    weight += w
    return (total / weight if weight else total), weight / len(points)


def footprints(xy: np.ndarray, size: list[float] | np.ndarray, kind: list[int] | np.ndarray) -> Profiles:
    """Discs and squares without counts."""
    shown = samples.profiles(np.asarray(xy, dtype=np.float64), np.zeros((len(xy), 1), np.int64))
    shown.footprint_um, shown.footprint_kind = np.asarray(size, np.float32), np.asarray(kind, np.uint8)
    return shown


def sample(rng: np.random.Generator, t: Tissue, n: int) -> Profiles:
    """Discs, squares and polygons (some cross themselves) of 2-200 um, on tile borders and on the region's own too."""
    rows, cols = t.encoded.shape
    extent = np.array([cols, rows]) * TILE_UM
    xy = rng.uniform(0, 1, (n, 2)) * extent
    xy[::4] = np.round(xy[::4] / TILE_UM) * TILE_UM
    shown = footprints(xy, np.exp(rng.uniform(np.log(2), np.log(200), n)), np.arange(n) % 3)
    edges = np.where(np.arange(n) % 3 == POLYGON, rng.integers(3, 14, n), 0)
    shown.polygon_indptr = np.concatenate([[0], np.cumsum(edges)])
    size, angle = np.repeat(shown.footprint_um, edges), rng.uniform(0, 2 * np.pi, edges.sum())
    radius = size / 2 * rng.uniform(0.6, 1.3, edges.sum())
    shown.polygon_um = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).astype(np.float32)
    return shown


def turned(shown: Profiles, width: float, height: float, flip: bool, turns: int) -> Profiles:
    """Centres and outlines in a rectangle that is mirrored and turned; np.rot90 turns counter-clockwise, what was right
    is then at the top."""
    xy, ring = shown.xy_um, shown.polygon_um
    if flip:
        xy, ring = np.stack([width - xy[:, 0], xy[:, 1]], -1), ring * np.array([-1, 1], np.float32)
    for _ in range(turns):
        xy, ring = np.stack([xy[:, 1], width - xy[:, 0]], -1), np.stack([ring[:, 1], -ring[:, 0]], -1)
        width, height = height, width
    return dataclasses.replace(shown, xy_um=xy, polygon_um=ring)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**31))
def test_equals_the_plain_loop(rows: int, cols: int, missing: int, seed: int) -> None:
    t = tissue(rows, cols, min(missing, rows * cols), seed)
    shown = sample(np.random.default_rng(seed), t, 9)
    feature, valid = read(t, shown)
    steps = [((i + 0.5) / (SIDE // 2) - 0.5) * TILE_UM for i in range(SIDE // 2)]
    window = [(dx, dy) for dy in steps for dx in steps]
    for i in range(9):
        points = plain_points(shown, i)
        if not points:  # too thin for the lattice; a test of its own
            continue
        for part, asked in enumerate((points, window)):
            mean, share = plain_mean(t, shown.xy_um[i], asked)
            np.testing.assert_allclose(valid[i, part], share, atol=1e-12)
            if share > 1e-9:
                np.testing.assert_allclose(feature[i, part], mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_flips_and_quarter_turns_change_nothing(flip: bool, turns: int) -> None:
    t = tissue(3, 2, missing=2)
    shown = sample(np.random.default_rng(1), t, 120)
    before, valid_before = read(t, shown)
    grid, encoded = (a[:, ::-1] if flip else a for a in (t.grid, t.encoded))
    moved = Tissue(np.ascontiguousarray(np.rot90(grid, turns)), np.ascontiguousarray(np.rot90(encoded, turns)))
    after, valid_after = read(moved, turned(shown, 2 * TILE_UM, 3 * TILE_UM, flip, turns))
    np.testing.assert_allclose(valid_after, valid_before, atol=1e-12)
    np.testing.assert_allclose(after, before, rtol=1e-8, atol=1e-8)


def test_the_place_in_the_region_and_the_order_of_the_tiles_change_nothing() -> None:
    t = tissue(2, 2)
    shown = footprints(np.array([[20.0, 33.0], [40.0, 12.5]]), [30.0, 8.0], [DISC, SQUARE])
    before, _ = read(t, shown)
    larger = Tissue(np.pad(t.grid, ((SIDE, 0), (2 * SIDE, 0), (0, 0))), np.pad(t.encoded, ((1, 0), (2, 0))))
    after, _ = read(larger, dataclasses.replace(shown, xy_um=shown.xy_um + np.array([2 * TILE_UM, TILE_UM])))
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_a_linear_field_is_read_at_the_centre() -> None:
    """Bilinear reading of a + b x + c y, averaged over a centred footprint, is its value at the centre."""
    at = (np.arange(4 * SIDE) + 0.5) * PATCH_UM
    x, y = np.meshgrid(at, at)
    t = Tissue(np.stack([x, y, 3 + 2 * x - y], -1), np.ones((4, 4), dtype=bool))
    xy = np.array([[64.0, 64.0], [50.3, 71.9], [66.6, 40.0]])
    feature, valid = read(t, footprints(xy, [2.0, 55.0, 20.0], [SQUARE, DISC, DISC]))
    expected = np.stack([xy[:, 0], xy[:, 1], 3 + 2 * xy[:, 0] - xy[:, 1]], -1)
    np.testing.assert_allclose(valid, 1, atol=1e-12)
    np.testing.assert_allclose(feature, np.stack([expected, expected], 1), rtol=1e-12)


def test_the_window_reads_each_patch_under_it() -> None:
    """A tile-wide window centred on a tile weighs all its patches, and no other, alike to a quarter."""
    t = Tissue(np.eye(9 * SIDE**2).reshape(3 * SIDE, 3 * SIDE, -1), np.ones((3, 3), dtype=bool))
    feature, _ = read(t, footprints(np.array([[48.0, 48.0]]), [10.0], [DISC]))
    weight = feature[0, 1].reshape(3 * SIDE, 3 * SIDE)
    inner = weight[SIDE : 2 * SIDE, SIDE : 2 * SIDE]
    assert (inner > 0).all() and inner.sum() == pytest.approx(1)


def test_nothing_to_read_is_zero() -> None:
    feature, valid = read(tissue(1, 2, missing=2), footprints(np.array([[5.0, 5.0]]), [55.0], [DISC]))
    assert not feature.any() and not valid.any()
    feature, valid = read(tissue(2, 2), footprints(np.array([[-100.0, 5.0]]), [8.0], [DISC]))
    assert not feature.any() and not valid.any()


def test_the_ablation_reads_the_whole_tile() -> None:
    t = tissue(2, 3, missing=1)
    shown = sample(np.random.default_rng(2), t, 40)
    shown.xy_um[0] = -1.0, 5.0  # outside the region
    feature, valid = read(t, shown, dataclasses.replace(CONFIG, reads="tile"))
    for i, (x, y) in enumerate(shown.xy_um):
        row, col = math.floor(y / TILE_UM), math.floor(x / TILE_UM)
        if 0 <= row < 2 and 0 <= col < 3 and t.encoded[row, col]:
            mean = t.grid[row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE].mean((0, 1))
            np.testing.assert_allclose(feature[i], [mean, mean])
            assert (valid[i] == 1).all()
        else:
            assert not feature[i].any() and not valid[i].any()
    assert 0 < valid[:, 0].mean() < 1
