"""Sampling: exact places at pyramid ratios that are no whole numbers; large shrinking without large memory."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import slides
from data_prep.slides.reference import ReferenceSlide
from data_prep.slides.sampling import Level, Part, area_mean, resized
from tests.data_prep.slides.images import picture, write_tiles


def ramp(height: int, width: int, per_px0: float, ratio: float = 1.0) -> slides.Pixels:
    """A level whose red grows with x and whose green grows with y, by `per_px0` a level-0 px."""
    x, y = ((np.arange(n) + 0.5) * ratio * per_px0 for n in (width, height))
    red, green = np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))
    return np.rint(np.stack([red, green, 0 * red], -1)).astype(np.uint8)


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
@pytest.mark.parametrize("ratio", [2.5, 4.0])
def test_places_are_right_at_any_ratio(tmp_path: Path, reader: str, ratio: float) -> None:
    per_px0 = 0.5
    levels = [ramp(500, 500, per_px0), ramp(int(500 / ratio), int(500 / ratio), per_px0, ratio)]
    path = write_tiles(tmp_path / "a.tif", levels, "none")
    slide = slides.open_slide(path, 400) if reader == "tiff" else ReferenceSlide(path)
    assert slide.facts["reader"] == reader
    for x, y, side in [(0, 0, 250), (101, 203, 250), (7, 133, 333), (49, 51, 449), (1, 3, 301)]:
        out = 96 if side < 400 else 150
        assert side / out / ratio < 2
        found = slide.read(x, y, side, side, out).astype(float)
        centres = (np.arange(out) + 0.5) * side / out
        for channel, start, axis in ((0, x, 0), (1, y, 1)):
            off_px0 = (found[..., channel].mean(axis) - (start + centres) * per_px0) / per_px0
            rounding = 1.5 / per_px0  # of the level, of OpenSlide's interpolation, of ours
            assert np.abs(off_px0.mean()) < 0.3 * ratio, "shifted"
            assert np.abs(off_px0).max() < 0.3 * ratio + rounding, "a pixel out of place"


def test_area_mean_is_the_mean_over_an_area() -> None:
    pixels = picture(60, 70)
    fine = np.repeat(np.repeat(pixels, 10, 0), 10, 1)  # tenths of a pixel
    found = area_mean(pixels, 3.4, 5.7, 36.0, 24.0, (10, 15))
    expected = cv2.resize(fine[57:297, 34:394].astype(np.float32), (15, 10), interpolation=cv2.INTER_AREA)
    assert np.abs(found - expected).max() <= 0.51
    whole = area_mean(pixels, 3, 5, 36, 24, (12, 12))
    np.testing.assert_array_equal(whole, cv2.resize(pixels[5:29, 3:39], (12, 12), interpolation=cv2.INTER_AREA))
    up = area_mean(pixels, 3, 5, 20, 20, (40, 40))
    np.testing.assert_array_equal(up, cv2.resize(pixels[5:25, 3:23], (40, 40), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("size", [225, 231, 300, 443, 448])
def test_shrinking_is_inter_area(size: int) -> None:
    pixels = picture(size, size)
    expected = cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_AREA)
    assert np.abs(resized(pixels, (224, 224)).astype(int) - expected).max() <= 1


def test_ratios_of_levels() -> None:
    assert Level.of((25000, 250), (100003, 1003)) == Level(25000, 250, 4, 4)  # cut off, as Aperio does
    assert Level.of((400, 200), (1000, 500)) == Level(400, 200, 2.5, 2.5)
    assert Level.of((100, 50), (100, 50)) == Level(100, 50, 1, 1)


@pytest.mark.parametrize(("coding", "most"), [("jpeg 4:2:0", 8), ("jpeg 4:4:4", 8), ("none", 1)])
def test_a_slide_of_one_level_shrinks_well(tmp_path: Path, coding: str, most: int) -> None:
    pixels = cv2.GaussianBlur(picture(1000, 1200), (0, 0), 5)
    slide = slides.open_slide(write_tiles(tmp_path / "a.tif", [pixels], coding), 400)
    found = slide.read(-64, -32, 1088, 1088, 64)
    framed = np.full((1088, 1088, 3), 255, np.uint8)
    framed[32 : 32 + 1000, 64:] = pixels[:, :1024]
    expected = cv2.resize(framed, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - expected)[:61].max() <= most  # the border cuts an eighth of a pixel
    assert (found[62:] == 255).all()
    assert (found[:, :3] == 255).all()


def test_an_overview_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(1024, 1024)
    slide = slides.open_slide(write_tiles(tmp_path / "a.tif", [pixels], "deflate"), 400)
    at_once = slide.read(0, 0, 1024, 1024, 60)
    monkeypatch.setattr("data_prep.slides.sampling._MAX_AT_ONCE_PX", 200 * 200)
    asked = []
    real = slide._part  # type: ignore[attr-defined]

    def counting(level: int, x: int, y: int, w: int, h: int, out: tuple[int, int]) -> Part:
        asked.append(w * h)
        return real(level, x, y, w, h, out)

    monkeypatch.setattr(slide, "_part", counting)
    assert np.abs(slide.read(0, 0, 1024, 1024, 60).astype(int) - at_once).max() <= 1
    assert len(asked) == 32
    assert max(asked) <= 210 * 210
