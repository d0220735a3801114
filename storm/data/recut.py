"""A region cut again at another place of the tile grid, or cropped to a few tiles.

In: a group, a probability, a generator. Out: a group. A grid line crosses most footprints, so the model could learn the
grid's phase; a stitched region that is cut at a random offset has another one, and one row and one column of tiles
less. A region of one tile is what benchmarks of single patches ask for. Profiles outside are left out of the sample;
a region that would keep none of its profiles, or no tile, stays as it is.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from storm.data.tile import decode_tile
from storm.schema import Group, RegionMeta, TileData

Place = tuple[int, int, int]  # region, row, column
Tiles = dict[Place, TileData]
Cut = tuple[RegionMeta, Tiles]

_CROPS = (1, 2)  # tiles along a side


def crop(group: Group, probability: float, rng: np.random.Generator) -> Group:
    """Each region, with `probability`, as the 1 x 1 or 2 x 2 tiles around one of its profiles."""
    cuts: dict[int, Cut] = {}
    for g in range(len(group.meta.regions)):
        taken, side, at = rng.random() < probability, int(rng.choice(_CROPS)), rng.random(3)
        cut = _cropped(group, g, side, at) if taken else None
        if cut:
            cuts[g] = cut
    return _with(group, cuts)


def recut(group: Group, probability: float, rng: np.random.Generator) -> Group:
    """With `probability` every region cut again at one drawn offset; its tiles are then arrays, each decoded once.

    Raises:
        ValueError: a tile is damaged, as `decode_tile`.
    """
    taken, (x_px, y_px) = rng.random() < probability, rng.integers(1, group.meta.tile_px, 2).tolist()
    if not taken:
        return group
    cuts = {g: _shifted(group, g, x_px, y_px) for g in range(len(group.meta.regions))}
    return _with(group, {g: cut for g, cut in cuts.items() if cut})


def _cropped(group: Group, g: int, side: int, at: npt.NDArray[np.float64]) -> Cut | None:
    region, members = group.meta.regions[g], np.flatnonzero(group.region == g)
    if not len(members):
        return None
    local = group.profiles.xy_um[members[int(at[0] * len(members))]] - region.origin_um
    col, row = np.floor(local / group.meta.tile_um).astype(int).tolist()
    if (g, row, col) not in group.tiles:
        return None
    high, wide = min(side, region.rows), min(side, region.cols)
    top = min(max(0, row - int(at[1] * high)), region.rows - high)
    left = min(max(0, col - int(at[2] * wide)), region.cols - wide)
    tiles = {
        (g, r - top, c - left): tile
        for (i, r, c), tile in group.tiles.items()
        if i == g and top <= r < top + high and left <= c < left + wide
    }
    return _moved(region, left * group.meta.tile_um, top * group.meta.tile_um, high, wide), tiles


def _shifted(group: Group, g: int, x_px: int, y_px: int) -> Cut | None:
    """Region g from (x_px, y_px) on: the new tiles whose four old ones are present."""
    meta, region = group.meta, group.meta.regions[g]
    new = _moved(region, x_px * meta.tile_mpp, y_px * meta.tile_mpp, region.rows - 1, region.cols - 1)
    corners = {
        (row, col): [(g, row + i, col + j) for i in (0, 1) for j in (0, 1)]
        for row in range(new.rows)
        for col in range(new.cols)
    }
    whole = {place: parts for place, parts in corners.items() if all(part in group.tiles for part in parts)}
    if not whole or not _held(group, g, new).any():
        return None
    px = meta.tile_px
    canvas = np.zeros((region.rows * px, region.cols * px, 3), np.uint8)
    for part in sorted({part for parts in whole.values() for part in parts}):
        y, x = part[1] * px, part[2] * px
        canvas[y : y + px, x : x + px] = decode_tile(group.tiles[part], px, f"slide {meta.slide}: tile {part}")
    return new, {
        (g, row, col): canvas[row * px + y_px : (row + 1) * px + y_px, col * px + x_px : (col + 1) * px + x_px]
        for row, col in whole
    }


def _moved(region: RegionMeta, x_um: float, y_um: float, rows: int, cols: int) -> RegionMeta:
    return RegionMeta((region.origin_um[0] + x_um, region.origin_um[1] + y_um), rows, cols)


def _held(group: Group, g: int, region: RegionMeta) -> npt.NDArray[np.bool_]:
    """[N] the profiles of region g whose centre lies in `region` (half-open)."""
    local = group.profiles.xy_um - region.origin_um
    sides = np.array([region.cols, region.rows]) * group.meta.tile_um
    held: npt.NDArray[np.bool_] = (group.region == g) & (local >= 0).all(axis=1) & (local < sides).all(axis=1)
    return held


def _with(group: Group, cuts: dict[int, Cut]) -> Group:
    """The group with some of its regions replaced, and without the profiles that lie outside them."""
    if not cuts:
        return group
    regions = tuple(cuts[g][0] if g in cuts else region for g, region in enumerate(group.meta.regions))
    tiles = {place: tile for place, tile in group.tiles.items() if place[0] not in cuts}
    kept = ~np.isin(group.region, list(cuts))
    for g, (region, own) in cuts.items():
        tiles |= own
        kept |= _held(group, g, region)
    rows = np.flatnonzero(kept)
    meta = dataclasses.replace(group.meta, regions=regions)
    return Group(meta, group.profiles.take(rows), group.region[rows], tiles)
