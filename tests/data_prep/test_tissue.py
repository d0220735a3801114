"""The tissue mask against known truth, what is no tissue, the overview, and real slides."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from data_prep import tissue
from data_prep.slides import Grid, Pixels, open_slide
from tests.data_prep.pictures import Held, overview_of, section, truth_of

PX_UM = 7.0


def glass(height: int = 300, width: int = 300, colour: tuple[int, int, int] = (240, 238, 241)) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 1.5, (height, width, 3))
    return (np.array(colour) + noise).clip(0, 255).round().astype(np.uint8)


def stained(height: int = 300, width: int = 300, colour: tuple[int, int, int] = (190, 110, 165)) -> Pixels:
    noise = np.random.default_rng(1).normal(0, 1, (height, width, 1))
    return (np.array(colour) + 30 * cv2.GaussianBlur(noise, (0, 0), 0.8)[..., None]).clip(0, 255).astype(np.uint8)


def on_glass(piece: Pixels, at: tuple[int, int] = (80, 60), under: Pixels | None = None) -> Pixels:
    picture = glass() if under is None else under.copy()
    picture[at[0] : at[0] + piece.shape[0], at[1] : at[1] + piece.shape[1]] = piece
    return picture


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mask_is_the_truth_of_rendered_tissue(seed: int) -> None:
    grown, pixels = section(seed)
    seen = overview_of(pixels, 2.0)
    assert (seen.per_tile, seen.px_px0) == (16, 3.5)
    mask, truth = tissue.tissue_mask(seen.rgb, PX_UM), truth_of(grown, seen.rgb.shape[:2], PX_UM)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93


@pytest.mark.parametrize(
    "colour", [(240, 238, 241), (255, 255, 255), (174, 178, 176), (236, 219, 235), (129, 132, 127)]
)
def test_bare_glass_is_not_split(colour: tuple[int, int, int]) -> None:
    assert not tissue.tissue_mask(glass(colour=colour), PX_UM).any()


def test_a_slide_full_of_tissue_is_not_split() -> None:
    _, pixels = section(0)
    assert tissue.tissue_mask(overview_of(pixels[200:600, 200:600], 2.0).rgb[:112, :112], PX_UM).mean() > 0.98
    assert tissue.tissue_mask(stained(), PX_UM).all()


@pytest.mark.parametrize("colour", [(174, 178, 176), (236, 219, 235), (255, 255, 255)])
def test_tissue_is_found_on_grey_and_pink_glass(colour: tuple[int, int, int]) -> None:
    empty = glass(colour=colour)
    piece = (stained(100, 120) * (np.array(colour) / 255)).astype(np.uint8)
    mask = tissue.tissue_mask(on_glass(piece, under=empty), PX_UM)
    assert mask[82:178, 62:178].all()
    assert mask.sum() == pytest.approx(100 * 120, rel=0.06)


def test_unstained_grey_tissue_counts() -> None:
    mask = tissue.tissue_mask(on_glass(stained(100, 120, (150, 150, 150))), PX_UM)
    assert mask.sum() == pytest.approx(100 * 120, rel=0.06)


def test_a_glow_of_eosin_is_no_tissue() -> None:
    rows, cols = np.mgrid[:300, :300]
    glow = np.exp(-((rows - 130) ** 2 + (cols - 200) ** 2) / 2 / 60**2)[..., None]
    under = (glass() * (1 - glow * np.array([0.02, 0.22, 0.06]))).astype(np.uint8)
    mask = tissue.tissue_mask(on_glass(stained(100, 120), under=under), PX_UM)
    assert mask.sum() == pytest.approx(100 * 120, rel=0.1)  # the glow has 20,000 px


def test_black_frames_are_no_tissue() -> None:
    picture = on_glass(stained(100, 120))
    picture[:50] = picture[:, :40] = picture[250:] = 0
    mask = tissue.tissue_mask(picture, PX_UM)
    assert mask.sum() == pytest.approx(100 * 120, rel=0.06)
    assert not tissue.tissue_mask(np.zeros((50, 50, 3), np.uint8), PX_UM).any()


@pytest.mark.parametrize("ink", [(30, 60, 160), (20, 120, 60), (25, 25, 28), (40, 45, 190)])
def test_pen_is_no_tissue(ink: tuple[int, int, int]) -> None:
    picture = on_glass(stained(100, 120))
    cv2.polylines(picture, [np.array([[20, 40], [230, 30], [270, 240], [30, 270]])], True, ink, 9, cv2.LINE_AA)
    assert tissue.tissue_mask(picture, PX_UM).sum() == pytest.approx(100 * 120, rel=0.06)


@pytest.mark.parametrize("px_um", [7.0, 14.0])
def test_specks_and_holes_are_judged_in_um2(px_um: float) -> None:
    picture, scale = on_glass(stained(150, 150)), 7.0 / px_um
    small, large = round(12 * scale), round(24 * scale)  # 84 um: 7,056 um2; 168 um: 28,224 um2
    for side, row in ((small, 20), (large, 40)):
        picture[row : row + side, 250 : 250 + side] = stained(side, side)
        picture[row + 80 : row + 80 + side, 100 : 100 + side] = glass(side, side)
    mask = tissue.tissue_mask(picture, px_um)
    assert (mask[20 + small // 2, 250 + small // 2], mask[40 + large // 2, 250 + large // 2]) == (False, True)
    assert (mask[100 + small // 2, 100 + small // 2], mask[120 + large // 2, 100 + large // 2]) == (True, False)


def test_shares_of_tiles_and_what_does_not_decode() -> None:
    slide = Held(np.full((640, 640, 3), 240, np.uint8), damaged_px0=400)
    slide.pixels[:, 320:] = cv2.resize(stained(160, 80), (320, 640), interpolation=cv2.INTER_LINEAR)
    seen = tissue.read_overview(slide, Grid.over(slide, 32.0))
    shares = seen.shares(tissue.tissue_mask(seen.rgb, 1.0))
    np.testing.assert_array_equal(np.isnan(shares).all(axis=0), np.arange(20) < 13)
    assert (shares[:, 14:] > 0.99).all()
    assert tissue.tile_share(stained()) > 0.99
    assert tissue.tile_share(glass()) < 0.01


def test_an_overview_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue, "_MAX_PX", 40_000)
    seen = overview_of(section(0)[1], 2.0)  # 15 x 15 tiles
    assert (seen.per_tile, seen.rgb.shape, seen.px_px0) == (8, (120, 120, 3), 7.0)
    assert seen.shares(np.ones((120, 120), bool)).shape == (15, 15)


def test_the_picture_of_a_slide_is_the_slide_alone() -> None:
    seen = overview_of(np.full((300, 4000, 3), 200, np.uint8), 7.0)
    height, width = simplejpeg.decode_jpeg_header(seen.jpeg())[:2]
    assert (height, width) == (77, 1024)
    assert simplejpeg.decode_jpeg(seen.jpeg()).min() > 190  # the grid's white border is cut off
    assert seen.jpeg() == seen.jpeg()


def real(path: Path, mpp: float) -> tuple[tissue.Overview, tissue.Mask]:
    slide = open_slide(path, 150)
    seen = tissue.read_overview(slide, Grid.over(slide, 112 / mpp))
    return seen, tissue.tissue_mask(seen.rgb, seen.px_px0 * mpp, seen.glass)


@pytest.mark.parametrize(
    ("path", "mpp", "share"),
    [
        ("her2st/data/ST-imgs/C/C3/5714_HE_BT_D1.jpg", 0.69, 0.17),  # pink glass, a glow of eosin
        ("her2st/app/www/imgs/A1_HE_image_dark.png", 3.2, 0.34),  # a black background
        ("stutility_mob/inst/extdata/counts/MOB1.jpg", 4.5, 0.115),  # ink out of focus at the border
        ("dlpfc_151673/10X/151673/tissue_lowres_image.png", 11.0, 0.38),  # grey glass
        ("wsi/tests/fixtures/svs-images/cmu-1-small-region.svs", 0.499, 0.37),
    ],
)
def test_real_slides_have_the_tissue_that_is_seen_on_them(real_data: Path, path: str, mpp: float, share: float) -> None:
    """The shares were read off overlays by eye."""
    seen, mask = real(real_data / path, mpp)
    assert seen.decoded.all()
    assert mask.mean() == pytest.approx(share, abs=0.025)


def test_the_mask_agrees_with_a_vendors_spots_in_tissue(real_data: Path) -> None:
    folder = real_data / "dlpfc_151673/10X/151673"
    _, mask = real(folder / "tissue_lowres_image.png", 11.0)
    scale = json.loads((folder / "scalefactors_json.json").read_text())["tissue_lowres_scalef"]
    rows = [line.split(",") for line in (folder / "tissue_positions_list.txt").read_text().split()]
    inside = np.array([row[1] == "1" for row in rows])
    y, x = (np.array([[float(row[4]), float(row[5])] for row in rows]) * scale * 11 / 7).astype(int).T
    found = mask[y, x]
    assert (len(rows), inside.sum()) == (4992, 3639)
    assert (found[inside].mean() > 0.98, found[~inside].mean() < 0.15) == (True, True)
