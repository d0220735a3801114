"""Which points lie in a footprint: against a plain loop, symmetries, thin and moved outlines, how exact it is."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm.data.outline import LATTICE, radius_um, sample_points
from storm.schema import DISC, FOOTPRINT_SIDE, POLYGON, SQUARE, Profiles
from tests.data import samples


def polygon(*rings: np.ndarray) -> Profiles:
    """Profiles at the origin with these outlines."""
    bare = samples.profiles(np.zeros((len(rings), 2)), np.zeros((len(rings), 1), np.int64), 10.0)
    return dataclasses.replace(
        bare, footprint_kind=np.full(len(rings), POLYGON, np.uint8),
        polygon_indptr=np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]),
        polygon_um=np.concatenate(rings).astype(np.float32),
    )  # fmt: skip


def winds(ring: np.ndarray, x: float, y: float) -> bool:
    """Even-odd, one edge after another."""
    odd = False
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            odd = not odd
    return odd


def to_edge(ring: np.ndarray, x: float, y: float) -> float:
    """Distance of a point to the nearest edge."""
    nearest = math.inf
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        t = min(1.0, max(0.0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length)) if length else 0.0
        nearest = min(nearest, math.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)))
    return nearest


def plain_points(ring: np.ndarray, side: float) -> np.ndarray:
    """[S, S] point after point; the nearest to the outline where none is inside."""
    places = [[(x * side, y * side) for x in LATTICE] for y in LATTICE]
    held = np.array([[winds(ring, *place) for place in row] for row in places])
    if held.any():
        return held
    apart = np.array([[to_edge(ring, *place) for place in row] for row in places])
    return apart <= apart.min() + 1e-5 * side


def random_ring(seed: int, thin: float = 1.0) -> np.ndarray:
    """A polygon of 3-20 vertices in any order, 2-200 um; with a small `thin` a sliver."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(1), np.log(100)))
    flat = rng.normal(size=(rng.integers(3, 21), 2)) * size * np.array([1, thin]) + rng.normal(size=2) * size * 0.1
    angle = rng.uniform(0, 2 * np.pi)
    turned = flat @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return turned.astype(np.float32).astype(np.float64)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 0.3, 1e-3]))
def test_polygons_equal_the_plain_loop_and_are_never_empty(seed: int, thin: float) -> None:
    rings = [random_ring(seed + i, thin) for i in range(4)]
    points, side = sample_points(polygon(*rings))
    for i, ring in enumerate(rings):
        assert side[i] == pytest.approx(2 * np.abs(ring).max(), rel=2e-3)
        np.testing.assert_array_equal(points[i], plain_points(ring, side[i]))
        assert points[i].any()


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e-3]), st.booleans(), st.integers(0, 3), st.booleans())
def test_a_flipped_or_turned_outline_has_the_flipped_or_turned_points(
    seed: int, thin: float, flip: bool, turns: int, raster: bool
) -> None:
    ring = random_ring(seed, thin)
    if raster:  # steps between whole um, as outlines of label images are
        corners = np.round(ring)
        ring = np.stack([corners, np.stack([np.roll(corners, -1, 0)[:, 0], corners[:, 1]], -1)], 1).reshape(-1, 2)
    before, side = sample_points(polygon(ring))
    moved, expected = (ring * [-1, 1], before[0, :, ::-1]) if flip else (ring, before[0])
    for _ in range(turns):  # counter-clockwise on the screen, where y points down
        moved = np.stack([moved[:, 1], -moved[:, 0]], -1)
    after, side_after = sample_points(polygon(moved))
    np.testing.assert_array_equal(after[0], np.rot90(expected, turns))
    assert side_after == side


def test_discs_and_squares() -> None:
    shown = samples.profiles(np.zeros((2, 2)), np.zeros((2, 1), np.int64), 55.0)
    shown.footprint_kind[1] = SQUARE
    points, side = sample_points(shown)
    assert side.tolist() == [55, 55] and points[1].all()
    x, y = np.meshgrid(LATTICE, LATTICE)
    np.testing.assert_array_equal(points[0], np.hypot(x, y) <= 0.5)
    assert points[0].mean() == pytest.approx(np.pi / 4, rel=0.04)
    np.testing.assert_allclose(radius_um(shown), [27.5, 55 * math.sqrt(0.5)])


def test_a_mixture_keeps_its_order_and_an_outline_without_area_is_a_disc() -> None:
    ring = np.array([[4, 1], [-3, 2], [-1, -5]])
    shown = polygon(ring, ring[:2], 3 * ring)
    points, side = sample_points(shown)
    alone, _ = sample_points(polygon(ring))
    np.testing.assert_array_equal(points[0], alone[0])
    np.testing.assert_array_equal(points[2], alone[0])
    assert side[1] == 10 and points[1].sum() == 52 and side[2] == pytest.approx(3 * side[0])
    assert radius_um(shown)[2] == pytest.approx(3 * math.hypot(1, 5))
    one_place = polygon(np.zeros((3, 2)))
    assert sample_points(one_place)[0].any() and sample_points(one_place)[1][0] < 1e-5


def test_outlines_are_moved_along_their_radius_or_replaced() -> None:
    angle = np.arange(40) / 40 * 2 * np.pi
    circle = 10 * np.stack([np.cos(angle), np.sin(angle)], -1)
    shown = polygon(circle, circle, circle, circle, 0.3 * circle)
    points, side = sample_points(shown, np.array([0.0, 2.0, -1.0, np.nan, -40.0]))
    assert side == pytest.approx([20, 24, 18, 10, 1], rel=1e-3)  # the fourth is the disc of its footprint_um
    assert points[:4].sum((1, 2)) == pytest.approx([52] * 4, abs=4)
    assert points[4].any()
    spot = samples.profiles(np.zeros((1, 2)), np.zeros((1, 1), np.int64), 55.0)
    assert sample_points(spot, np.array([2.0]))[1].tolist() == [55]  # nothing else is moved


def test_the_points_hold_the_share_of_the_area() -> None:
    shown = samples.outlined(samples.profiles(np.zeros((300, 2)), np.zeros((300, 1), np.int64), 12.0),
                             np.random.default_rng(0))  # fmt: skip
    points, side = sample_points(shown)
    found, area = points.mean((1, 2)) * side**2, shown.area_um2
    assert np.median(np.abs(found / area - 1)) < 0.05 and (found / area).mean() == pytest.approx(1, abs=0.02)


def test_the_lattice_errs_as_the_docstring_says() -> None:
    """Under a 55 um disc on a patch-wise random map: below a tenth of the spread of such means."""
    rng = np.random.default_rng(0)
    grid, centre = rng.normal(size=(64, 64)), rng.uniform(60, 450, (600, 2))

    def mean(side: int) -> np.ndarray:
        at = (np.arange(side) + 0.5) / side - 0.5
        x, y = (p[np.hypot(*np.meshgrid(at, at)) <= 0.5] for p in np.meshgrid(at, at))
        u, v = (centre[:, :1] + 55 * x) / 8 - 0.5, (centre[:, 1:] + 55 * y) / 8 - 0.5
        i, j = np.floor(u).astype(int), np.floor(v).astype(int)
        a, b = u - i, v - j
        top = (1 - a) * grid[j, i] + a * grid[j, i + 1]
        return ((1 - b) * top + b * ((1 - a) * grid[j + 1, i] + a * grid[j + 1, i + 1])).mean(1)

    truth = mean(48)
    assert np.sqrt(((mean(FOOTPRINT_SIDE) - truth) ** 2).mean()) < 0.12 * truth.std()
    assert DISC == 0 and np.sqrt(((mean(4) - truth) ** 2).mean()) > 0.5 * truth.std()
