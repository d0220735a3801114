"""Regions and groups: each profile exactly once, half-open places, bounded sizes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm import regions

TILE_UM = 112.0
points = st.lists(st.tuples(*[st.floats(0, 2000, allow_nan=False)] * 2), min_size=1, max_size=60)


@given(points, st.integers(1, 6), st.integers(1, 9))
def test_cut_holds_each_profile_once_inside_its_square(xy: list[tuple[float, float]], extent: int, cap: int) -> None:
    xy_um = np.array(xy)
    found = regions.cut(xy_um, TILE_UM, extent, cap)
    assert sorted(np.concatenate([r.profiles for r in found]).tolist()) == list(range(len(xy)))
    for region in found:
        assert 1 <= len(region.profiles) <= cap
        inside = xy_um[region.profiles] - region.origin_um(TILE_UM)
        assert (inside >= 0).all()
        assert (inside < extent * TILE_UM).all()
        assert region.row % extent == region.col % extent == 0


@given(points, st.integers(1, 6))
def test_cover_takes_each_profile_from_where_it_is_central(xy: list[tuple[float, float]], extent: int) -> None:
    xy_um = np.array(xy)
    found = regions.cover(xy_um, TILE_UM, extent)
    assert sorted(np.concatenate([r.profiles for r in found]).tolist()) == list(range(len(xy)))
    step = (extent + 1) // 2
    for region in found:
        centre = np.array(region.origin_um(TILE_UM)) + extent * TILE_UM / 2
        assert (np.abs(xy_um[region.profiles] - centre) <= step * TILE_UM / 2 + 1e-6).all()


def test_a_centre_on_a_line_belongs_to_the_right_and_lower_region() -> None:
    xy_um = np.array([[TILE_UM * 2, 0.0], [TILE_UM * 2 - 1e-6, 0.0]])
    assert [(r.row, r.col, r.profiles.tolist()) for r in regions.cut(xy_um, TILE_UM, 2, 9)] == [
        (0, 0, [1]),
        (0, 2, [0]),
    ]


def test_tiles_read_by_hand() -> None:
    centre = np.array([[56.0, 56.0]])  # a window of one tile's width, exactly on the grid
    assert regions.tiles_read(centre, np.array([55], np.float32), TILE_UM).tolist() == [[0, 0]]
    assert regions.tiles_read(centre + 1, np.array([55], np.float32), TILE_UM).tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    ]
    assert len(regions.tiles_read(centre, np.array([300], np.float32), TILE_UM)) == 9


@given(points, st.lists(st.floats(0, 400), min_size=60, max_size=60))
def test_tiles_read_are_those_of_a_plain_loop(xy: list[tuple[float, float]], sizes: list[float]) -> None:
    xy_um, footprint = np.array(xy) - 300, np.array(sizes[: len(xy)], np.float32)
    places = set()
    for (x, y), size in zip(xy_um, footprint.astype(float), strict=True):
        reach = max(size, TILE_UM) / 2
        rows, cols = (range(math.floor((c - reach) / TILE_UM), math.ceil((c + reach) / TILE_UM)) for c in (y, x))
        places |= set(itertools.product(rows, cols))
    assert [tuple(p) for p in regions.tiles_read(xy_um, footprint, TILE_UM).tolist()] == sorted(places)


@given(points, st.integers(1, 4))
def test_tiles_of_many_owners_are_those_of_each(xy: list[tuple[float, float]], owners: int) -> None:
    xy_um, footprint = np.array(xy), np.full(len(xy), 55, np.float32)
    owner = np.arange(len(xy)) % owners
    expected = [
        [n, *place]
        for n in range(owners)
        for place in regions.tiles_read(xy_um[owner == n], footprint[owner == n], TILE_UM).tolist()
    ]
    assert regions.tiles_by(owner, xy_um, footprint, TILE_UM).tolist() == expected


def test_no_profile_reads_no_tile() -> None:
    assert regions.tiles_read(np.zeros((0, 2)), np.zeros(0, np.float32), TILE_UM).shape == (0, 2)
    assert regions.cut(np.zeros((0, 2)), TILE_UM, 5, 9) == []


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 100)), min_size=1, max_size=30),
    st.integers(1, 64),
    st.integers(1, 300),
    st.integers(0, 5),
)
def test_groups_hold_each_region_once(sizes: list[tuple[int, int]], least: int, most: int, seed: int) -> None:
    profiles, weights = [n for n, _ in sizes], [b for _, b in sizes]
    found = regions.group(profiles, weights, np.random.default_rng(seed), least, most)
    assert sorted(i for members in found for i in members) == list(range(len(sizes)))
    for members in found:
        assert len(members) == 1 or sum(weights[i] for i in members) <= most
    for members, after in itertools.pairwise(found):  # only bytes close a group early
        full = sum(profiles[i] for i in members) >= least
        assert full or sum(weights[i] for i in members) + weights[after[0]] > most
    if len(found) > 1 and sum(profiles[i] for i in found[-1]) < least:  # a small last one stays where bytes forbid more
        assert sum(weights[i] for members in found[-2:] for i in members) > most
    assert found == regions.group(profiles, weights, np.random.default_rng(seed), least, most)


@pytest.mark.parametrize(
    ("platform", "side", "extent"), [("visium", 6, 5), ("st", 6, 11), ("xenium", 6, 5), ("st", 3, 5)]
)
def test_extents_of_the_design(platform: str, side: int, extent: int) -> None:
    assert regions.extent_for(platform, side, TILE_UM) == extent


def test_region_tiles_are_inside_read_and_present() -> None:
    region = regions.Region(2, 2, 2, np.array([0]))
    read = np.array([[1, 2], [2, 2], [3, 3], [3, 2]])
    assert regions.region_tiles(region, read, {(2, 2), (3, 3), (1, 2)}) == [(2, 2), (3, 3)]


def test_slide_key_is_stable() -> None:
    assert regions.slide_key("a") == 0xE40C292C  # the published FNV-1a value
    assert regions.slide_key("her2st_C2") != regions.slide_key("her2st_C3")


def test_lattice_points() -> None:
    assert regions.lattice_points(250, 150, 100).tolist() == [[50, 50], [150, 50]]
