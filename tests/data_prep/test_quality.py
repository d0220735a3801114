"""The figures of tiles and profiles, the summary of a slide, and what they cost."""

import itertools
import json
import timeit
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from data_prep import quality
from data_prep.slides import Pixels, open_slide
from storm import schema
from storm.prep_config import PrepConfig
from tests.data_prep.pictures import section

INKS = {"blue": (30, 60, 160), "violet blue": (40, 45, 190), "turquoise": (30, 130, 150), "green": (20, 120, 60),
        "black": (25, 25, 28)}  # fmt: skip


def figures(pixels: Pixels) -> dict[str, float]:
    return dict(zip(schema.TILE_QUALITY, quality.tile_quality(pixels, 0.5, 0.75), strict=True))


def he_tile() -> Pixels:
    return section(0, mpp=1.0)[1][600:824, 600:824].copy()


def test_figures_have_the_order_of_the_schema() -> None:
    found = figures(he_tile())
    assert (found["tissue"], found["inside"]) == (0.5, 0.75)
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())


@pytest.mark.parametrize("ink", INKS)
def test_strokes_of_a_pen(ink: str) -> None:
    tile = he_tile()
    before = figures(tile)["pen"]
    tile[60:120] = INKS[ink]
    assert before < 0.01
    assert figures(tile)["pen"] == pytest.approx(60 / 224, abs=0.02)


def test_rendered_tissue_in_any_stain_is_no_pen() -> None:
    for seed in (0, 1, 2):
        assert quality.pen_mask(section(seed)[1]).mean() < 0.001


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("her2st/data/ST-imgs/C/C2/5714_HE_BT_C2.jpg", (3000, 5000)),
        ("her2st/data/ST-imgs/C/C4/5714_HE_BT_D2.jpg", (3000, 4000)),
        ("stutility_mob/inst/extdata/counts/MOB2.jpg", (500, 900)),
        ("wsi/tests/fixtures/svs-images/cmu-1-small-region.svs", (1000, 1800)),
    ],
)
def test_real_tissue_is_no_pen(real_data: Path, path: str, part: tuple[int, int]) -> None:
    tissue = open_slide(real_data / path, 150).read(*part, 800, 800, 800)
    assert quality.pen_mask(tissue).mean() < 0.01


def test_black_white_and_saturation() -> None:
    tile = np.full((224, 224, 3), 240, np.uint8)
    tile[:56] = 5
    tile[56:112] = (200, 100, 150)
    found = figures(tile)
    assert (found["black"], found["white"]) == pytest.approx((0.25, 0.5))
    assert found["saturation"] == pytest.approx(0.25 * 0.5, abs=0.005)
    assert found["pen"] == 0  # a frame is black, and no ink


def test_sharpness_falls_with_focus() -> None:
    tile = he_tile()
    found = [quality.sharpness(cv2.GaussianBlur(tile, (0, 0), s) if s else tile) for s in (0.0, 1.0, 2.0, 4.0)]
    assert all(sharp > 2 * blurred for sharp, blurred in itertools.pairwise(found))
    assert quality.sharpness(np.full((224, 224, 3), 200, np.uint8)) == 0
    green = tile[28:84, :, 1].astype(np.float64)
    one_band = cv2.Laplacian(green, cv2.CV_64F)
    assert found[0] == pytest.approx(one_band.var(), rel=0.4)


@pytest.mark.parametrize("side", [16, 61, 112, 224])
def test_any_size_of_tile(side: int) -> None:
    assert np.isfinite(list(figures(np.ascontiguousarray(he_tile()[:side, :side])).values())).all()


def test_the_figures_of_a_tile_cost_little() -> None:
    """About 0.09 ms on an idle core; the bound leaves room for a busy machine."""
    tile = he_tile()
    best = min(timeit.repeat(lambda: quality.tile_quality(tile, 1.0, 1.0), number=50, repeat=10)) / 50
    assert best < 0.4e-3


def of_profiles(**changes: npt.NDArray) -> dict[str, npt.NDArray]:
    arrays: dict[str, npt.NDArray] = {
        "depth": np.array([100, 3, 100, 100, 100, 100]), "genes": np.array([50, 3, 2, 50, 50, 50]),
        "control": np.array([0, 0, 0, 40, 0, 0]), "in_tissue": np.array([1, 1, 1, 1, 1, 0], np.int8),
        "tissue": np.array([1, 1, 1, 1, 0.01, np.nan], np.float32),
    } | changes  # fmt: skip
    return quality.profile_quality(**arrays, config=PrepConfig())


def test_flags_of_profiles() -> None:
    found = of_profiles()
    names = [[name for bit, name in enumerate(schema.FLAGS) if flags >> bit & 1] for flags in found["flags"].tolist()]
    assert names == [[], ["low_depth", "few_genes"], ["few_genes"], ["many_controls"], ["off_tissue"],
                     ["not_in_tissue"]]  # fmt: skip
    assert list(found) == list(schema.PROFILE_QUALITY)


def test_a_slide_in_figures_is_json_without_nan() -> None:
    found = quality.profile_summary(of_profiles())
    assert found["median_depth"] == 100
    assert found["flagged"] == {"low_depth": 0.1667, "few_genes": 0.3333, "many_controls": 0.1667, "off_tissue": 0.1667,
                                "not_in_tissue": 0.1667}  # fmt: skip
    assert found["flagged_any"] == 0.8333
    assert found["control_share"] == round(40 / 543, 5)
    tiles = np.array([quality.tile_quality(he_tile(), 1.0, 1.0)] * 3, np.float32)
    json.dumps([found, quality.summary(tiles)], allow_nan=False)
    assert set(quality.summary(tiles)) >= {"tissue_mean", "pen_mean", "sharpness_median"}
    assert quality.profile_summary({name: np.zeros(0) for name in schema.PROFILE_QUALITY}) == {}
    assert quality.summary(np.zeros((0, 7), np.float32)) == {}
