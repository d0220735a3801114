"""How a sample is shown: outlines, sizes that are fed, the preset stpath, guards, and what moves together."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from storm.config import MASK_MODES, MaskConfig
from storm.data.batch import collate
from storm.data.outline import radius_um, sample_points
from storm.data.view import IN_CONTEXT, draw_sample, draw_view, plain_view, view_rng
from storm.schema import SQUARE, Group
from tests.data import samples

CONTEXT: dict[str, Any] = {"image_only": 0.0, "in_context": 1.0, "gene_level": 0.0, "gene_only": 0.0}
AS_IT_IS: dict[str, Any] = {"pool_cells": 0.0, "recut": 0.0, "crop": 0.0}


def test_outlines_vary_in_their_shares_and_spots_draw_nothing() -> None:
    group = samples.cells(0, per_region=400)
    view = draw_view(group, MaskConfig(), view_rng(0, 0, 0), samples.PANEL)
    assert view.grow_um is not None
    discs, moved = np.isnan(view.grow_um), view.grow_um[~np.isnan(view.grow_um)]
    assert discs.mean() == pytest.approx(0.2, abs=0.05)
    assert (moved != 0).mean() == pytest.approx(0.2, abs=0.05)
    changed = moved[moved != 0]
    assert (np.abs(changed) >= 1).all() and (np.abs(changed) <= 2).all() and (changed < 0).any() and (changed > 0).any()
    plain = collate([group], [plain_view(group, False)], samples.spec())
    batch = collate([group], [view], samples.spec())
    side, drawn = batch["footprint_um"].flatten().numpy(), plain["footprint_um"].flatten().numpy()
    np.testing.assert_allclose(side[discs], group.profiles.footprint_um[discs])
    apart = (side - drawn)[~discs]
    assert ((apart != 0) == (moved != 0)).all() and (np.abs(apart) < 4.01).all()
    assert torch.equal(batch["log_area"], plain["log_area"])  # what was measured stays what it is
    spots = samples.group(0)
    same = [draw_view(spots, MaskConfig(polygon_jitter=p), view_rng(0, 0, 3), samples.PANEL) for p in (0.0, 1.0)]
    assert same[0].grow_um is same[1].grow_um is None and (same[0].count == same[1].count).all()


def test_the_size_of_a_cell_is_fed_in_powers_of_two() -> None:
    """At inference too; a spot's and a bin's is fed as it is, jittered in training."""
    cells, spots = samples.cells(1), samples.group(1)
    for view in (plain_view(cells, False), draw_view(cells, MaskConfig(), view_rng(0, 0, 0), samples.PANEL)):
        fed = collate([cells], [view], samples.spec())["footprint_input"] / np.log(2)
        assert torch.allclose(fed, fed.round(), atol=1e-5) and 2 <= len(fed.round().unique()) <= 4
    plain, drawn = (
        collate([spots], [view], samples.spec())["footprint_input"]
        for view in (plain_view(spots, False), draw_view(spots, MaskConfig(), view_rng(0, 0, 0), samples.PANEL))
    )
    assert torch.allclose(plain, torch.full_like(plain, float(np.log(40)))) and 0.08 < float(drawn.std()) < 0.25


def test_log_area_is_the_polygons_own() -> None:
    group = samples.cells(2)
    batch = collate([group], [plain_view(group, False)], samples.spec())
    p = group.profiles
    for i in range(0, len(p), 37):
        x, y = p.polygon_um[p.polygon_indptr[i] : p.polygon_indptr[i + 1]].astype(float).T
        area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2  # shoelace
        assert float(batch["log_area"].flatten()[i]) == pytest.approx(np.log(area), abs=1e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_points_turn_with_the_pixels(flip: bool, turns: int) -> None:
    """The batch of a turned view is that of outlines that were turned themselves."""
    group = samples.cells(3, per_region=50)
    view = dataclasses.replace(plain_view(group, False), flip=flip, turns=turns)
    batch = collate([group], [view], samples.spec())
    ring = group.profiles.polygon_um * np.array([-1 if flip else 1, 1], np.float32)
    for _ in range(turns):
        ring = np.stack([ring[:, 1], -ring[:, 0]], -1)
    points, side = sample_points(dataclasses.replace(group.profiles, polygon_um=ring))
    np.testing.assert_array_equal(batch["footprint_points"].flatten(0, 1).numpy(), points)
    np.testing.assert_allclose(batch["footprint_um"].flatten().numpy(), side, rtol=1e-6)


def mixed(seed: int) -> Group:
    """Cells with outlines, of which every third is a square."""
    group = samples.cells(seed, side=9, per_region=300)
    group.profiles.footprint_kind[::3] = SQUARE
    group.profiles.polygon_um *= 2  # far beyond the disc of their area
    return group


def test_no_visible_footprint_comes_near_a_target() -> None:
    """By the circle around each footprint, and with 30 um between for cells."""
    compared = 0
    for index in range(8):
        group = mixed(index)
        _, view = draw_sample(group, MaskConfig(**CONTEXT, **AS_IT_IS), (0, 0, index), samples.PANEL)
        p, radius = group.profiles, radius_um(group.profiles)
        far = np.linalg.norm(p.polygon_um, axis=1)
        assert (far <= np.repeat(radius, np.diff(p.polygon_indptr)) + 1e-5).all()
        for g in range(2):
            shown, asked = (np.flatnonzero(m & (group.region == g)) for m in (view.visible, view.query))
            apart = np.linalg.norm(p.xy_um[shown, None] - p.xy_um[None, asked], axis=-1)
            assert (apart >= radius[shown, None] + radius[None, asked] + 30).all()
            compared += apart.size
    assert compared > 1000


def test_stpath_hides_most_single_profiles_in_context() -> None:
    mask = MaskConfig(preset="stpath", **AS_IT_IS)
    group = samples.group(4, regions=1, side=20, per_region=60)
    views = [draw_sample(group, mask, (0, 0, i), samples.PANEL)[1] for i in range(150)]
    assert {view.mode for view in views} == {IN_CONTEXT} and not any(view.hidden_tiles for view in views)
    hidden = np.array([view.query.mean() for view in views])
    assert hidden.mean() == pytest.approx(10 / 11, abs=0.03) and hidden.min() < 0.8
    # single ones: the shown profiles are not what is left around a blob
    order = np.linalg.norm(group.profiles.xy_um - group.profiles.xy_um.mean(0), axis=1).argsort()
    shown = np.mean([view.visible[order[:20]].sum() / max(1, view.visible.sum()) for view in views])
    assert 0.15 < shown < 0.55
    assert MaskConfig(preset="stpath", image_only=0.5).image_only == 0.5
    assert MaskConfig().image_only == 0.4 and MaskConfig(preset="stpath").hide_tiles == 0
    assert MaskConfig.model_validate(mask.model_dump()) == mask


def test_in_context_shows_no_tile_as_often_as_asked_and_other_modes_keep_theirs() -> None:
    group = samples.group(4)
    for mode, expected in (("in_context", 0.4), ("gene_level", 0.0), ("image_only", 0.0)):
        shares = dict.fromkeys(MASK_MODES, 0.0) | {"in_context": 1e-9, mode: 1.0}  # a mode of no share is refused
        mask = MaskConfig.model_validate(shares | AS_IT_IS | {"hide_tiles": 0.0, "hide_all_tiles": 0.4})
        views = [draw_sample(group, mask, (0, 0, i), samples.PANEL)[1] for i in range(200)]
        assert {len(view.hidden_tiles) for view in views} <= {0, len(group.tiles)}
        assert np.mean([bool(view.hidden_tiles) for view in views]) == pytest.approx(expected, abs=0.08)


def test_hidden_counts_move_no_input_of_a_pooled_and_recut_sample() -> None:
    """Regrouping reads places alone; the counts of cells that come to lie in hidden footprints reach no input."""
    mask = MaskConfig(**CONTEXT, pool_cells=1.0, recut=1.0, crop=0.0, thinning=0.7)
    differed = 0
    for index in range(6):
        group = samples.cells(index, side=6, per_region=300)
        made, view = draw_sample(group, mask, (0, 0, index), samples.PANEL)
        near = np.abs(group.profiles.xy_um[:, None] - made.profiles.xy_um[None, view.visible]).max(-1)
        reach = made.profiles.footprint_um[view.visible] / 2 + 1e-6
        apart = group.region[:, None] != made.region[None, view.visible]
        unseen = ((near > reach) | apart).all(1)  # cells that lie in no visible footprint
        entries = np.repeat(unseen, np.diff(group.profiles.indptr))
        count = np.where(entries, group.profiles.count * 5 + 1, group.profiles.count).astype(np.int32)
        other = dataclasses.replace(group, profiles=dataclasses.replace(group.profiles, count=count))
        again, second = draw_sample(other, mask, (0, 0, index), samples.PANEL)
        before, after = (collate([g], [v], samples.spec()) for g, v in ((made, view), (again, second)))
        for name in before.keys() - {"target_count", "target_log_depth", "depth_target", "target_mask", "depth_mask"}:
            assert torch.equal(before[name], after[name]), name
        differed += not torch.equal(before["target_count"], after["target_count"])
    assert differed > 3
