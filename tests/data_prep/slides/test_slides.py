"""Slides: one interface over all readers, chosen by content; white outside; the grid of tiles."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep import slides
from tests.data_prep.vendors import tissue, write_tiff


def write_plain(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    return tissue(300, 400)


def test_pyramid_and_plain_image_read_alike(tmp_path: Path, pixels: np.ndarray) -> None:
    pyramid = slides.open_slide(write_tiff(tmp_path / "a.tif", pixels), 400)
    plain = slides.open_slide(write_plain(tmp_path / "a.png", pixels), 400)
    assert (pyramid.facts["reader"], plain.facts["reader"]) == ("tiff", "plain")
    for slide in (pyramid, plain):
        assert (slide.width_px0, slide.height_px0) == (400, 300)
        np.testing.assert_array_equal(slide.read(40, 30, 64, 64, 64), pixels[30:94, 40:104])
        # The pyramid answers from its second level, the plain image shrinks: equal but for rounding.
        small = cv2.resize(pixels[:128, :128], (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(slide.read(0, 0, 128, 128, 64).astype(int) - small).max() <= 1
        assert slide.read(0, 0, 20, 20, 40).shape == (40, 40, 3)


@pytest.mark.parametrize("options", [{"rowsperstrip": 1000}, {"tile": (64, 64)}], ids=["one strip", "tiled"])
def test_a_tiff_that_begins_with_its_label_is_refused(tmp_path: Path, pixels: np.ndarray, options: Any) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in (pixels[:50, :90], pixels):
            writer.write(page, photometric="rgb", metadata=None, **options)
    told = r"a\.tif: would be read as its picture of 90 x 50 px, but it holds one of 400 x 300; write the slide alone"
    for read in (slides.open_slide, slides.header):
        with pytest.raises(ValueError, match=told):
            read(path, 400)


@pytest.mark.parametrize("options", [{}, {"tile": (64, 64)}], ids=["one strip", "tiled"])
def test_a_stack_is_refused(tmp_path: Path, pixels: np.ndarray, options: Any) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([pixels, 255 - pixels]), photometric="rgb", **options)
    with pytest.raises(ValueError, match=r"a\.tif: holds 2 pictures of 400 x 300 px .*; write the slide alone"):
        slides.open_slide(path, 400)
    # A reduced picture or a mask of the same size is none of several slides.
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, photometric="rgb", metadata=None, **options)
        writer.write(pixels, photometric="rgb", metadata=None, subfiletype=1, **options)
    assert slides.open_slide(path, 400).width_px0 == 400


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_outside_is_white(tmp_path: Path, pixels: np.ndarray, name: str) -> None:
    write = write_tiff if name.endswith("tif") else write_plain
    slide = slides.open_slide(write(tmp_path / name, pixels), 400)
    corner = slide.read(380, 280, 40, 40, 40)
    np.testing.assert_array_equal(corner[:20, :20], pixels[280:, 380:])
    assert (corner[20:] == 255).all()
    assert (corner[:, 20:] == 255).all()
    before = slide.read(-10, -10, 20, 20, 20)
    assert (before[:10] == 255).all()
    np.testing.assert_array_equal(before[10:, 10:], pixels[:10, :10])
    assert (slide.read(1000, 1000, 20, 20, 20) == 255).all()


def test_neighbouring_tiles_abut(tmp_path: Path, pixels: np.ndarray) -> None:
    slide = slides.open_slide(write_plain(tmp_path / "a.png", pixels), 400)
    grid = slides.Grid.over(slide, 61.7)
    assert (grid.rows, grid.cols) == (5, 7)
    for i in range(6):
        x, _, w, _ = grid.box(0, i)
        assert x + w == grid.box(0, i + 1)[0]
    assert grid.box(1, 1, 3)[2] == grid.box(0, 4)[0] - grid.box(0, 1)[0]


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n cut"]
)
def test_no_slide(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.svs").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.svs: is no slide"):
        slides.open_slide(tmp_path / "x.svs", 400)
    with pytest.raises(ValueError, match="no such image"):
        slides.open_slide(tmp_path / "absent.svs", 400)


def test_a_grid_beyond_its_limits_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_tiff(tmp_path / "a.tif", pixels)
    slide = slides.open_slide(path, 400)
    grid, size = slides.Grid.over(slide, 10), path.stat().st_size
    grid.check(slide, path, 1200, 1 + 120_000 // size)
    with pytest.raises(ValueError, match=r"a\.tif: its header tells 400 x 300 px, 1200 tiles \(max_tiles 1199\)"):
        grid.check(slide, path, 1199, 100_000)
    path.write_bytes(b"x" * 1199)
    with pytest.raises(ValueError, match=r"400 x 300 px in 1199 bytes \(max_px_per_byte 100\)"):
        grid.check(slide, path, 1200, 100)


def test_real_slides(real_data: Path) -> None:
    folder = real_data / "wsi" / "tests" / "fixtures"
    slide = slides.open_slide(folder / "svs-images" / "cmu-1-small-region.svs", 400)
    assert (slide.width_px0, slide.height_px0, slide.embedded_mpp) == (2220, 2967, 0.499)
    assert slide.facts == {"reader": "tiff", "objective_power": 20.0, "levels": 1.0}
    assert slide.read(0, 0, 448, 448, 224).std() > 1
    with pytest.raises(ValueError, match="is no slide"):
        slides.open_slide(folder / "svs-images" / "broken.svs", 400)
