"""Regions cut again and cropped: pixels under each profile stay, grids are whole, nothing is lost without need."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from storm.config import MaskConfig
from storm.data.batch import collate
from storm.data.recut import crop, recut
from storm.data.tile import decode_tile, decode_tiles
from storm.data.view import draw_sample, plain_view
from storm.schema import Group
from tests.data import samples

PX, UM = samples.TILE_PX, samples.TILE_UM


def whole(group: Group, g: int) -> tuple[np.ndarray, np.ndarray]:
    """A region's pixels [H, W, 3] and which of them there are, tile after tile."""
    region = group.meta.regions[g]
    canvas, there = np.zeros((region.rows * PX, region.cols * PX, 3), np.uint8), np.zeros((region.rows * PX,) * 2, bool)
    for (i, row, col), tile in group.tiles.items():
        if i == g:
            place = slice(row * PX, (row + 1) * PX), slice(col * PX, (col + 1) * PX)
            canvas[place], there[place] = decode_tile(tile, PX, "tile"), True
    return canvas, there


@pytest.mark.parametrize("seed", range(8))
def test_a_region_is_stitched_and_cut_elsewhere(seed: int) -> None:
    group = samples.group(seed, side=4, per_region=40)
    again = recut(group, 1.0, np.random.default_rng(seed))
    offsets = set()
    for g, (old, new) in enumerate(zip(group.meta.regions, again.meta.regions, strict=True)):
        assert (new.rows, new.cols) == (3, 3)
        x, y = ((np.array(new.origin_um) - old.origin_um) / (UM / PX)).tolist()
        offsets.add((x, y))
        assert x == int(x) and y == int(y) and 0 < x < PX and 0 < y < PX
        (before, was), (after, there) = whole(group, g), whole(again, g)
        part = slice(int(y), int(y) + 3 * PX), slice(int(x), int(x) + 3 * PX)
        np.testing.assert_array_equal(after[there], before[part][there])
        # a new tile is there where all of it was
        expected = was[part].reshape(3, PX, 3, PX).all((1, 3))
        np.testing.assert_array_equal(there.reshape(3, PX, 3, PX).any((1, 3)), expected)
        held = group.profiles.xy_um[group.region == g] - new.origin_um
        inside = ((held >= 0) & (held < 3 * UM)).all(1)
        np.testing.assert_array_equal(again.profiles.xy_um[again.region == g] - new.origin_um, held[inside])
        assert 0 < inside.sum() < 40
    assert len(offsets) == 1  # the same in every region of a group
    assert 0 < sum(place[0] == 0 for place in again.tiles) < 9  # one tile of region 0 is absent


def test_what_a_profile_shows_stays() -> None:
    """The pixel under each centre, by the batch's own geometry, and its counts."""
    group = samples.group(3, regions=1, side=4, per_region=60)
    pixel = UM / PX
    group.profiles.xy_um[:] = (np.floor(group.profiles.xy_um / pixel) + 0.5) * pixel
    again = recut(group, 1.0, np.random.default_rng(3))
    batches = [collate([g], [plain_view(g, True)], samples.spec()) for g in (group, again)]
    names = [g.profiles.ids for g in (group, again)]
    seen = [dict(zip(n, colours(batch), strict=True)) for n, batch in zip(names, batches, strict=True)]
    both = [name for name in names[1] if seen[0][name] is not None and seen[1][name] is not None]
    assert len(both) > 10 and all(np.array_equal(seen[0][name], seen[1][name]) for name in both)
    depth = [dict(zip(n, b["target_log_depth"][0].tolist(), strict=True)) for n, b in zip(names, batches, strict=True)]
    assert all(depth[0][name] == depth[1][name] for name in names[1])


def colours(batch: dict[str, torch.Tensor]) -> list[Any]:
    """The pixel under each profile of the only region; None on an absent tile."""
    found: list[Any] = []
    for x, y in batch["xy_um"][0].double().tolist():
        tile = int(batch["tile_at"][0, int(y // UM), int(x // UM)])
        row, col = (int(v % UM / UM * PX) for v in (y, x))
        found.append(batch["tiles"][tile, row, col].numpy() if tile >= 0 else None)
    return found


def test_a_region_that_would_keep_nothing_stays() -> None:
    group = samples.group(4, regions=2, side=2, per_region=1)
    group.profiles.xy_um[0] = np.array(group.meta.regions[0].origin_um) + 0.1  # outside any new grid
    group.profiles.xy_um[1] = np.array(group.meta.regions[1].origin_um) + UM
    again = recut(group, 1.0, np.random.default_rng(0))
    assert again.meta.regions[0] == group.meta.regions[0] and again.meta.regions[1].rows == 1
    assert len(again.profiles) == 2 and isinstance(again.tiles[1, 0, 0], np.ndarray)
    one = samples.group(5, regions=1, side=1, per_region=3)
    assert recut(one, 1.0, np.random.default_rng(0)) is one
    assert recut(group, 0.0, np.random.default_rng(0)) is group


def test_a_damaged_tile_is_named() -> None:
    group = samples.group(6)
    group.tiles = {**group.tiles, (1, 1, 1): b"no jpeg"}
    with pytest.raises(ValueError, match=r"slide s1: tile \(1, 1, 1\) is damaged"):
        recut(group, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(8))
def test_a_crop_holds_a_profile_and_its_tile(seed: int) -> None:
    group = samples.group(seed, side=5, per_region=30)
    small = crop(group, 1.0, np.random.default_rng(seed))
    for g, (old, new) in enumerate(zip(group.meta.regions, small.meta.regions, strict=True)):
        col, row = ((np.array(new.origin_um) - old.origin_um) / UM).astype(int).tolist()
        assert (new.rows, new.cols) in ((1, 1), (2, 2)) and 0 <= row <= 5 - new.rows and 0 <= col <= 5 - new.cols
        for place, tile in small.tiles.items():
            if place[0] == g:
                assert tile is group.tiles[g, place[1] + row, place[2] + col]
        local = small.profiles.xy_um[small.region == g] - new.origin_um
        assert len(local) and ((local >= 0) & (local < new.rows * UM)).all()
    batch = collate([small], [plain_view(small, True)], samples.spec())
    assert int((batch["tile_at"] >= 0).sum()) == len(small.tiles) > 0


def test_crops_of_both_sizes_in_their_share_of_the_regions() -> None:
    group, mask = samples.group(7, regions=3, side=4), MaskConfig(recut=0)
    rows = [r.rows for i in range(300) for r in draw_sample(group, mask, (1, 0, i), samples.PANEL)[0].meta.regions]
    assert np.mean([r != 4 for r in rows]) == pytest.approx(0.1, abs=0.04)
    assert {1, 2, 4} == set(rows)


def test_crop_and_recut_are_drawn_by_key_and_go_together() -> None:
    group, mask = samples.cells(8, per_region=60), MaskConfig(recut=0.6, crop=0.6, pool_cells=0.6)
    made = [[draw_sample(group, mask, (0, 2, i), samples.PANEL) for i in range(12)] for _ in range(2)]
    for (a, view_a), (b, view_b) in zip(*made, strict=True):
        first, second = (collate([g], [v], samples.spec()) for g, v in ((a, view_a), (b, view_b)))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert len(a.profiles) and len(a.tiles)
    assert len({dataclasses.astuple(a.meta.regions[0]) for a, _ in made[0]}) > 4


def test_decoded_tiles_pass_through() -> None:
    group = samples.group(9)
    again = recut(group, 1.0, np.random.default_rng(1))
    pixels = decode_tiles(again, PX)
    assert isinstance(again.tiles[0, 1, 1], np.ndarray)
    np.testing.assert_array_equal(pixels[sorted(again.tiles).index((0, 1, 1))], again.tiles[0, 1, 1])
