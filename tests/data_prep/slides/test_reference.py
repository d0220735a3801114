"""OpenSlide's own reader: the order of keys for the pixel size, unscanned areas white, a whitelist of facts."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from data_prep import slides
from data_prep.slides.reference import ReferenceSlide, embedded_mpp, on_white
from tests.data_prep.slides.images import damage, picture, write_tiles
from tests.data_prep.vendors import tissue, write_tiff


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, None),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", "aperio.MPP": "0.5"}, 0.25),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5", "aperio.MPP": "0.5"}, 0.5),
        ({"openslide.mirax.MPP": "0.23", "aperio.MPP": "0.5"}, 0.23),
        ({"aperio.MPP": "0.5", "hamamatsu.XResolution": "40000", "hamamatsu.YResolution": "40000"}, 0.5),
        ({"hamamatsu.XResolution": "40000", "hamamatsu.YResolution": "40000", "openslide.comment": "MPP = 0.5"}, 0.25),
        ({"openslide.comment": "Aperio|AppMag = 20|MPP = 0.4990|Left = 1", "tiff.XResolution": "1"}, 0.499),
        ({"openslide.comment": "<PixelSizeMicrons>0.1725</PixelSizeMicrons>"}, 0.1725),
        ({"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "20000", "tiff.YResolution": "20000"}, 0.5),
        ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}, 0.5),
        ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "25400"}, None),
        ({"tiff.XResolution": "20000", "tiff.YResolution": "20000"}, None),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "nan", "aperio.MPP": "0,5"}, None),
    ],
)
def test_order_of_the_keys_of_the_pixel_size(properties: dict[str, str], expected: float | None) -> None:
    assert embedded_mpp(properties) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("tag", "expected"), [(0.5, 0.5), (352.8, 352.8), (None, None)])
def test_embedded_mpp_of_a_tiff(tmp_path: Path, tag: float | None, expected: float | None) -> None:
    found = slides.open_slide(write_tiff(tmp_path / "a.tif", tissue(100, 90), mpp=tag), 400).embedded_mpp
    assert found == (pytest.approx(expected, rel=1e-3) if expected else None)


def test_unscanned_areas_are_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = [10, 20, 30, 255]
    found = np.asarray(on_white(Image.fromarray(rgba)))
    assert (found[:2] == [10, 20, 30]).all()
    assert (found[2:] == 255).all()


def test_a_handle_that_failed_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(128, 128)], "jpeg rgb")
    damage(path, 0)
    slide = ReferenceSlide(path)
    opened = []
    real = openslide.OpenSlide

    def counting(path: Path) -> openslide.OpenSlide:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(openslide, "OpenSlide", counting)
    with pytest.raises(slides.DecodeError, match=r"a\.tif: does not decode at level-0 px \(0, 0\)"):
        slide.read(0, 0, 16, 16, 16)
    assert slide.read(64, 64, 64, 64, 64).std() > 1
    assert len(opened) == 1


def test_labels_are_never_opened(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        pytest.fail("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    path = real_data / "wsi" / "tests" / "fixtures" / "svs-images" / "cmu-1-small-region.svs"
    for slide in (slides.open_slide(path, 400), ReferenceSlide(path)):
        assert slide.read(0, 0, 448, 448, 224).std() > 1
        assert set(slide.facts) == {"reader", "levels", "objective_power"}
