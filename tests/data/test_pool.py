"""Cells pooled to footprints: against a plain loop, what is conserved, and that nothing overlaps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm.config import MaskConfig
from storm.data.batch import collate
from storm.data.outline import radius_um
from storm.data.pool import SIZES_UM, Lattice, draw_lattice, pool, pooled
from storm.data.view import draw_sample, draw_view, view_rng
from storm.schema import DISC, SQUARE, Group
from tests.data import samples


def dense(group: Group) -> np.ndarray:
    """[N, G] counts."""
    p = group.profiles
    counts = np.zeros((len(p), samples.GENES), dtype=np.int64)
    np.add.at(counts, (np.repeat(np.arange(len(p)), np.diff(p.indptr)), p.gene), p.count)
    return counts


def lattice(group: Group, kind: int, size: float, pitch: float, offset: tuple[float, float] = (0, 0)) -> Lattice:
    """The same footprints in every region, one of them at `offset` from the region's corner."""
    number = len(group.meta.regions)
    corner = np.array([region.origin_um for region in group.meta.regions])
    return Lattice(np.full(number, kind), np.full(number, size), np.full(number, pitch), corner + offset)


def plain(group: Group, grid: Lattice) -> dict[tuple[int, float, float], np.ndarray]:
    """(region, x, y) of each footprint -> summed counts, cell after cell and footprint after footprint."""
    counts, found = dense(group), {}
    for g, region in enumerate(group.meta.regions):
        low = np.array(region.origin_um)
        high = low + np.array([region.cols, region.rows]) * group.meta.tile_um
        steps = np.arange(-26, 27)
        for node in np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2):
            centre = grid.centre_um[g] + node * grid.pitch_um[g]
            if (centre < low).any() or (centre >= high).any():
                continue
            apart = group.profiles.xy_um - centre
            half = grid.size_um[g] / 2
            if grid.kind[g] == DISC:
                held = np.hypot(*apart.T) <= half
            else:
                held = ((apart >= -half) & (apart < half)).all(1)
            held &= group.region == g
            if held.any():
                found[g, round(float(centre[0]), 6), round(float(centre[1]), 6)] = counts[held].sum(0)
    return found


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_equals_the_plain_loop(seed: int) -> None:
    group = samples.cells(seed % 7, per_region=60)
    grid = draw_lattice(group, np.random.default_rng(seed))
    made, expected = pooled(group, grid), plain(group, grid)
    counts, p = dense(made), made.profiles
    assert len(p) == len(expected) > 0
    for i, (x, y) in enumerate(p.xy_um):
        np.testing.assert_array_equal(counts[i], expected[int(made.region[i]), round(x, 6), round(y, 6)])
    assert (p.count > 0).all() and all(
        (np.diff(p.gene[a:b]) > 0).all() for a, b in zip(p.indptr, p.indptr[1:], strict=False)
    )


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_one_resolution_per_region_and_no_overlap(seed: int) -> None:
    group = samples.cells(seed % 5)
    made = pool(group, 1.0, np.random.default_rng(seed))
    p = made.profiles
    for g, region in enumerate(made.meta.regions):
        rows = np.flatnonzero(made.region == g)
        assert len(rows)  # some cell of each region is in a footprint
        (size,), (kind,) = set(p.footprint_um[rows].tolist()), set(p.footprint_kind[rows].tolist())
        assert SIZES_UM[0] <= size <= SIZES_UM[1] * 1.001
        local = p.xy_um[rows] - region.origin_um
        assert ((local >= 0) & (local < np.array([region.cols, region.rows]) * made.meta.tile_um)).all()
        apart = np.abs(local[:, None] - local[None])
        apart = np.hypot(*apart.T) if kind == DISC else apart.max(-1).T
        assert (apart[~np.eye(len(rows), dtype=bool)] >= size - 1e-4).all()
    assert made.meta.kind == "bin" and dense(made).sum() <= dense(group).sum()


def test_abutting_squares_keep_every_molecule_and_add_up_to_larger_ones() -> None:
    group = samples.cells(1)
    fine, coarse = (pooled(group, lattice(group, SQUARE, s, s, (s / 2, s / 2))) for s in (16.0, 32.0))
    for made in (fine, coarse):  # 192 um are 6 x 32: the squares cover the region
        np.testing.assert_array_equal(dense(made).sum(0), dense(group).sum(0))
        assert made.profiles.pooled_um2 is not None
        assert made.profiles.pooled_um2.sum() == pytest.approx(group.profiles.area_um2.sum())
    counts, union = dense(fine), dense(coarse)
    for i, centre in enumerate(coarse.profiles.xy_um):
        inside = (np.abs(fine.profiles.xy_um - centre) < 16).all(1) & (fine.region == coarse.region[i])
        np.testing.assert_array_equal(counts[inside].sum(0), union[i])


def test_depth_is_relative_to_what_was_counted_and_size_is_the_footprints() -> None:
    group = samples.cells(2, regions=1)
    made = pooled(group, lattice(group, DISC, 60.0, 60.0, (30.0, 30.0)))
    view = draw_view(made, MaskConfig(image_only=1, in_context=0, gene_level=0, gene_only=0), view_rng(0, 0, 0),
                     samples.PANEL)  # fmt: skip
    batch = collate([made], [view], samples.spec())
    assert batch["log_area"][0].numpy() == pytest.approx(np.log(np.pi * 30**2))
    for i, centre in enumerate(made.profiles.xy_um):
        held = np.hypot(*(group.profiles.xy_um - centre).T) <= 30
        density = dense(group)[held][:, samples.PANEL].sum() / group.profiles.area_um2[held].sum()
        assert float(batch["depth_target"][0, i]) == pytest.approx(np.log(density) + 1.5, abs=1e-5)
    # of which the slide's mean over its cells is the same thing, whatever share of the tissue the cells cover
    log_cells = np.log(dense(group)[:, samples.PANEL].sum(1) / group.profiles.area_um2)
    assert float(batch["depth_target"].mean()) == pytest.approx(log_cells.mean() + 1.5, abs=0.6)


def test_places_do_not_depend_on_counts() -> None:
    group = samples.cells(3)
    other = dataclasses.replace(group, profiles=dataclasses.replace(group.profiles, count=group.profiles.count * 3 + 1))
    a, b = (pool(g, 1.0, np.random.default_rng(4)) for g in (group, other))
    np.testing.assert_array_equal(a.profiles.xy_um, b.profiles.xy_um)
    np.testing.assert_array_equal(a.profiles.pooled_um2, b.profiles.pooled_um2)


def test_spots_are_not_pooled_and_shares_hold() -> None:
    spots = samples.group(0)
    assert pool(spots, 1.0, np.random.default_rng(0)) is spots
    group, mask = samples.cells(4, per_region=20), MaskConfig(recut=0, crop=0)
    shown = [draw_sample(group, mask, (0, 0, i), samples.PANEL)[0] for i in range(200)]
    assert np.mean([s is not group for s in shown]) == pytest.approx(0.5, abs=0.1)
    sizes = [float(size) for s in shown if s is not group for size in set(s.profiles.footprint_um)]
    assert min(sizes) < 20 and max(sizes) > 90
    assert {k for s in shown for k in s.profiles.footprint_kind.tolist()} >= {DISC, SQUARE}


def test_a_guard_lies_between_pooled_footprints() -> None:
    group = samples.cells(5, side=9, per_region=900)
    mask = MaskConfig(image_only=0, in_context=1, gene_level=0, gene_only=0, pool_cells=1, recut=0, crop=0)
    compared = 0
    for index in range(12):
        made, view = draw_sample(group, mask, (0, 0, index), samples.PANEL)
        radius = radius_um(made.profiles)
        for g in range(2):
            shown, asked = (np.flatnonzero(m & (made.region == g)) for m in (view.visible, view.query))
            apart = np.linalg.norm(made.profiles.xy_um[shown, None] - made.profiles.xy_um[None, asked], axis=-1)
            assert (apart >= radius[shown, None] + radius[None, asked] + 30 - 1e-6).all()
            compared += apart.size
    assert compared > 1000


def test_a_lone_cell_and_a_region_without_any() -> None:
    group = samples.cells(6, regions=2, per_region=1)
    lone = dataclasses.replace(group, profiles=group.profiles.take(np.array([0])), region=group.region[:1])
    for seed in range(30):
        made = pool(lone, 1.0, np.random.default_rng(seed))
        assert len(made.profiles) == 1 and made.region.tolist() == [0]
        np.testing.assert_array_equal(dense(made), dense(lone))
