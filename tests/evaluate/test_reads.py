"""Other ways of reading: equal to the grid's where both see the same, and taken back afterwards."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from storm import export, inference, store
from storm.evaluate.reads import GRID, OWN_TILE, READS, TILE_MEAN, reading, told_size
from tests import untrained

TILE_UM, PATCH_UM = 112.0, 56.0
INSIDE = np.stack(np.meshgrid(*[np.arange(4, 8)] * 2), -1).reshape(-1, 2) + 0.5  # centres of tiles, in tiles
SHIFTED = INSIDE * TILE_UM + np.array([23.0, -31.5])


def load(folder: Path, **changes: object) -> export.Pretrained:
    config = dataclasses.replace(untrained.MODEL, **changes)  # type: ignore[arg-type]
    checkpoint = untrained.write_checkpoint(folder / "run", config=config)
    return export.load(export.export(checkpoint, folder / "model"))


def flat_store(folder: Path) -> store.SlideStore:
    """A slide of one colour."""
    own = store.SlideStore(untrained.write_store(folder / "noise"))
    jpeg = simplejpeg.encode_jpeg(np.full((32, 32, 3), (190, 120, 170), np.uint8))
    tiles = [store.Tile(row, col, jpeg, [1.0] * 7) for row, col in own.tile_index]
    return store.SlideStore(store.write(folder / "flat", own.info, tiles, own.profiles(), own.genes()))


def features(pretrained: export.Pretrained, opened: store.SlideStore, xy_um: np.ndarray, name: str) -> np.ndarray:
    side = np.full(len(xy_um), 40.0, np.float32)
    slide = inference.with_squares(inference.prepare(pretrained, opened), xy_um, side)
    with reading(pretrained.model, name):
        return inference.vectors(pretrained, slide, ("feature",))["feature"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> store.SlideStore:
    return store.SlideStore(untrained.write_store(tmp_path_factory.mktemp("noise")))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> export.Pretrained:
    return load(tmp_path_factory.mktemp("vit"))


def test_a_tile_of_its_own_is_the_grids_where_a_profile_lies_in_its_middle(
    vit: export.Pretrained, noise: store.SlideStore
) -> None:
    grid, own = (features(vit, noise, INSIDE * TILE_UM, name) for name in (GRID, OWN_TILE))
    assert own == pytest.approx(grid, abs=1e-5) and np.abs(grid).max() > 0.5
    assert np.ptp(grid, axis=0).max() > 0.01  # the tiles differ
    grid, own = (features(vit, noise, SHIFTED, name) for name in (GRID, OWN_TILE))
    assert np.abs(own - grid).max() > 0.01


def test_an_encoder_that_sees_patches_alone_reads_the_same_across_tiles(
    noise: store.SlideStore, tmp_path: Path
) -> None:
    """Stitched over four tiles: a place that lies on the grid of patches has its patches in both."""
    patchwise = load(tmp_path, image_depth=1)
    for name, weight in patchwise.model.morphology.named_parameters():
        if name.startswith("blocks.") and "norm" not in name:
            weight.data.zero_()  # a block adds nothing: no patch sees another
    at = INSIDE * TILE_UM + PATCH_UM * np.array([1.0, -1.0])
    grid, own, mean = (features(patchwise, noise, at, name) for name in (GRID, OWN_TILE, TILE_MEAN))
    assert own == pytest.approx(grid, abs=1e-5) and np.abs(mean - grid).max() > 1e-3
    turned = dataclasses.replace(patchwise, symmetries=8)
    grid, own = (features(turned, noise, at, name) for name in (GRID, OWN_TILE))
    assert own == pytest.approx(grid, abs=1e-5)  # cut from the region as it is turned


@pytest.mark.parametrize("encoder", ["colour", "vit"])
def test_all_ways_agree_on_a_slide_of_one_colour(encoder: str, tmp_path: Path) -> None:
    pretrained, opened = load(tmp_path, encoder=encoder), flat_store(tmp_path)
    found = {name: features(pretrained, opened, SHIFTED, name) for name in READS}
    assert np.abs(found[GRID]).max() > 0.1
    for name in READS:
        assert found[name] == pytest.approx(found[GRID], abs=1e-5), name


def test_the_mean_of_a_tile_is_one_for_all_of_its_profiles(vit: export.Pretrained, noise: store.SlideStore) -> None:
    at = np.array([[4.1, 4.1], [4.9, 4.5], [5.1, 4.1]]) * TILE_UM
    mean, own, grid = (features(vit, noise, at, name) for name in (TILE_MEAN, OWN_TILE, GRID))
    assert (mean[0] == mean[1]).all() and (mean[:, 0] == mean[:, 1]).all() and not np.allclose(mean[0], mean[2])
    assert not np.allclose(own[0], own[1]) and not np.allclose(grid[0], grid[1])


def test_predictions_change_within_and_are_as_before_afterwards(
    vit: export.Pretrained, noise: store.SlideStore
) -> None:
    slide = inference.with_squares(inference.prepare(vit, noise), SHIFTED, np.full(len(SHIFTED), 8, np.float32))
    before = inference.predict(vit, slide).composition
    with reading(vit.model, OWN_TILE):
        own = inference.predict(vit, slide).composition
    with told_size(vit.model, float(np.log(56.0))):
        larger = inference.predict(vit, slide)
    assert not np.allclose(own, before, rtol=1e-4) and not np.allclose(larger.composition, before, rtol=1e-4)
    assert (inference.predict(vit, slide).composition == before).all()
    with told_size(vit.model, float(np.log(8.0))):
        assert inference.predict(vit, slide).composition == pytest.approx(before, rel=1e-5)
    assert not vit.model.footprint._forward_hooks and not vit.model._forward_pre_hooks


def test_a_cell_is_told_its_size_in_powers_of_two_and_a_square_as_it_is(vit: export.Pretrained, tmp_path: Path) -> None:
    noise = store.SlideStore(untrained.write_store(tmp_path))
    noise.info = dataclasses.replace(noise.info, kind="cell")
    squares = inference.with_squares(inference.prepare(vit, noise), SHIFTED, np.full(len(SHIFTED), 50, np.float32))
    as_cells = dataclasses.replace(squares, kind="cell")
    with told_size(vit.model, float(np.log(64.0))):
        rounded = inference.predict(vit, squares).composition
    assert inference.predict(vit, as_cells).composition == pytest.approx(rounded, rel=1e-5)
    assert not np.allclose(inference.predict(vit, squares).composition, rounded, rtol=1e-4)
