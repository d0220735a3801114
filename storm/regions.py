"""Cut a slide's tiles and profiles into regions and groups; pure arithmetic on the micron grid.

In: profile centres (slide frame, um), their footprints, the tiles that exist. Out: regions (squares of tiles), the
profiles each holds (half-open intervals, each exactly once), the tiles they read, and groups of regions.
"""

import math
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """A square of `extent` x `extent` tiles from tile (row, col) on, and the `profiles` (row numbers) in it."""

    row: int
    col: int
    extent: int
    profiles: Rows

    def origin_um(self, tile_um: float) -> tuple[float, float]:
        """(x, y) of the top-left corner in the slide frame."""
        return self.col * tile_um, self.row * tile_um


def extent_for(platform: str, spots_side: int, tile_um: float) -> int:
    """Tiles along a region's side so that it holds about spots_side**2 spots (cells and bins: as for Visium)."""
    pitch_um = 200.0 if platform == "st" else 100.0
    return max(1, round(spots_side * pitch_um / tile_um))


def cut(xy_um: npt.NDArray[np.float64], tile_um: float, extent: int, cap: int) -> list[Region]:
    """Regions that together hold every profile once; one with more than `cap` profiles comes as several parts.

    A part is spatially contiguous (halved along its longer side), so that pooling inside a part sums every molecule.
    """
    place = np.floor(xy_um / (tile_um * extent)).astype(
        np.int64
    )  # half-open: a centre on a line belongs right or below
    order = np.lexsort((place[:, 0], place[:, 1]))  # stable: members stay in ascending order
    starts = np.flatnonzero(np.diff(place[order], axis=0, prepend=place[order[:1]] - 1).any(axis=1))
    regions = []
    for members in np.split(order, starts[1:]) if len(order) else []:
        x, y = place[members[0]]
        regions += [Region(int(y) * extent, int(x) * extent, extent, part) for part in _parts(xy_um, members, cap)]
    return sorted(regions, key=lambda r: (r.row, r.col, int(r.profiles[0])))


def _parts(xy_um: npt.NDArray[np.float64], members: Rows, cap: int) -> list[Rows]:
    if len(members) <= cap:
        return [members]
    spread = np.ptp(xy_um[members], axis=0)
    order = members[np.argsort(xy_um[members, int(spread[1] > spread[0])], kind="stable")]
    half = len(order) // 2
    return _parts(xy_um, np.sort(order[:half]), cap) + _parts(xy_um, np.sort(order[half:]), cap)


def tiles_read(xy_um: npt.NDArray[np.float64], footprint_um: npt.NDArray[np.float32], tile_um: float) -> Rows:
    """[M, 2] unique (row, col) of the tiles that any profile reads: its footprint and one tile's width around it."""
    return tiles_by(np.zeros(len(xy_um), np.int64), xy_um, footprint_um, tile_um)[:, 1:]


def tiles_by(
    owner: Rows, xy_um: npt.NDArray[np.float64], footprint_um: npt.NDArray[np.float32], tile_um: float
) -> Rows:
    """[M, 3] unique (owner, row, col), in that order, of the tiles that the profiles of each owner (0, 1, ..) read."""
    reach = np.maximum(footprint_um.astype(np.float64), tile_um)[:, None] / 2
    low = np.floor((xy_um - reach) / tile_um).astype(np.int64)
    high = np.ceil((xy_um + reach) / tile_um).astype(np.int64)  # exclusive: a window that ends on a line stops there
    if not len(low):
        return np.zeros((0, 3), np.int64)
    (left, top), (width, height) = low.min(axis=0), (high - low).max(axis=0)
    across, down = high.max(axis=0) - (left, top)
    found = []
    for y in range(height):  # windows are two tiles wide at most, unless footprints are larger than tiles
        for x in range(width):
            corner = low + np.array([x, y])
            inside = (corner < high).all(axis=1)
            col, row = (corner[inside] - (left, top)).T
            found.append(np.unique((owner[inside] * down + row) * across + col))
    rest, col = np.divmod(np.unique(np.concatenate(found)), across)
    of, row = np.divmod(rest, down)
    return np.stack([of, row + top, col + left], axis=1)


def region_tiles(region: Region, read: Rows, present: Container[tuple[int, int]]) -> list[tuple[int, int]]:
    """(row, col) on the slide's grid of the tiles of a region: inside its square, read by a profile, and present."""
    inside = read - (region.row, region.col)
    inside = read[((inside >= 0) & (inside < region.extent)).all(axis=1)]
    return [(row, col) for row, col in inside.tolist() if (row, col) in present]


def group(
    sizes: list[int], bytes_each: list[int], rng: np.random.Generator, min_profiles: int, max_bytes: int
) -> list[list[int]]:
    """Region numbers put together into groups of >= `min_profiles` profiles, in an order drawn from `rng`.

    A group is closed once it holds enough profiles or would pass `max_bytes`; a last group that is too small joins the
    one before it where the bytes allow.
    """
    groups: list[list[int]] = []
    profiles = size = 0
    for i in rng.permutation(len(sizes)).tolist():
        if not groups or profiles >= min_profiles or size + bytes_each[i] > max_bytes:
            groups.append([])
            profiles = size = 0
        groups[-1].append(i)
        profiles += sizes[i]
        size += bytes_each[i]
    if len(groups) > 1 and profiles < min_profiles:
        before = sum(bytes_each[i] for i in groups[-2])
        if before + size <= max_bytes:
            last = groups.pop()
            groups[-1] += last
    return groups


def cover(xy_um: npt.NDArray[np.float64], tile_um: float, extent: int) -> list[Region]:
    """Overlapping regions for inference: each profile is taken from the region in which it is most central.

    Regions start at every half extent (rounded up to tiles), so a profile is never nearer to an edge than about a
    quarter of the extent, and half a tile where that is 3 tiles.
    """
    step = (extent + 1) // 2
    centre_tiles = xy_um / tile_um - extent / 2
    start = np.round(centre_tiles / step).astype(np.int64) * step  # [N, 2] (col, row) of the nearest region start
    found = []
    for col, row in np.unique(start, axis=0):
        members = np.flatnonzero((start[:, 0] == col) & (start[:, 1] == row))
        found.append(Region(int(row), int(col), extent, members))
    return found


def slide_key(slide_id: str) -> int:
    """A stable 32-bit number of a slide id, to key a generator together with a seed."""
    value = 2166136261
    for byte in slide_id.encode():
        value = (value ^ byte) * 16777619 % 2**32  # FNV-1a; Python's hash() differs between processes
    return value


def lattice_points(width_um: float, height_um: float, pitch_um: float) -> npt.NDArray[np.float64]:
    """[M, 2] centres of a square lattice over a slide, for asking a model where nothing was measured."""
    xs = (np.arange(math.floor(width_um / pitch_um)) + 0.5) * pitch_um
    ys = (np.arange(math.floor(height_um / pitch_um)) + 0.5) * pitch_um
    return np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
