"""OME-TIFF with pyramids in SubIFDs, in every order of axes; BigTIFF by content; TIFF in strips; their mpp."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from data_prep import slides
from tests.data_prep.slides.images import picture, write_ome

ORDERS = {"YXS": (0, 1, 2), "CYX": (2, 0, 1), "SYX": (2, 0, 1), "TYXS": None}


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("compression", [None, "zlib", "jpeg"])
def test_every_order_of_axes_and_every_level(tmp_path: Path, axes: str, compression: str | None) -> None:
    pixels = picture(320, 384)
    order = ORDERS[axes]
    array = pixels[None] if order is None else np.ascontiguousarray(pixels.transpose(order))
    options: dict[str, Any] = {"compression": compression}
    if axes == "CYX":
        options["photometric"] = "minisblack"
    if axes == "SYX":
        options["planarconfig"] = "separate"
    if compression == "jpeg":
        options |= {"compressionargs": {"level": 98}, "subsampling": (1, 1)}
    slide = slides.open_slide(write_ome(tmp_path / "a.ome.tif", array, axes, **options), 400)
    assert slide.facts == {"reader": "ome-tiff", "levels": 3.0}
    assert (slide.width_px0, slide.height_px0, slide.embedded_mpp) == (384, 320, 0.5)
    for ratio in (1, 2, 4):
        found = slide.read(32, 64, 64 * ratio, 64 * ratio, 64)
        expected = pixels[64 : 64 + 64 * ratio : ratio, 32 : 32 + 64 * ratio : ratio]
        off = np.abs(found.astype(int) - expected)
        assert off.mean() < 3 if compression == "jpeg" else off.max() == 0
    assert (slide.read(384, 0, 64, 64, 64) == 255).all()


@pytest.mark.parametrize(("unit", "size"), [("nm", 500.0), ("mm", 0.0005), ("\u00b5m", 0.5), (None, 0.5)])
def test_physical_size_in_its_unit(tmp_path: Path, unit: str | None, size: float) -> None:
    metadata: dict[str, Any] = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, picture(128, 128), ome=True, photometric="rgb", tile=(64, 64), metadata=metadata)
    assert slides.open_slide(path, 400).embedded_mpp == pytest.approx(0.5)


def test_the_label_of_an_ome_tiff_is_not_the_slide(tmp_path: Path) -> None:
    pixels = picture(128, 192)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(picture(256, 256, 1), photometric="rgb", tile=(64, 64), metadata={"axes": "YXS", "Name": "Label"})
        metadata = {"axes": "YXS", "Name": "slide", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        writer.write(pixels, photometric="rgb", tile=(64, 64), metadata=metadata)
    slide = slides.open_slide(path, 400)
    assert (slide.width_px0, slide.height_px0, slide.embedded_mpp) == (192, 128, 0.25)
    np.testing.assert_array_equal(slide.read(0, 0, 128, 128, 128), pixels[:, :128])


def test_an_ome_tiff_that_names_another_file_shows_its_own_pixels(tmp_path: Path) -> None:
    """The other's segments lie at places of the other file."""
    own, other = picture(128, 128, 3), tmp_path / "other.ome.tif"
    tifffile.imwrite(other, picture(128, 128, 2), photometric="rgb", tile=(64, 64), metadata={"axes": "YXS"})
    with tifffile.TiffFile(other) as file:
        xml = file.ome_metadata or ""
    (uuid,) = re.findall(r' UUID="([^"]+)"', xml)
    named = f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="other.ome.tif">{uuid}</UUID></TiffData>'
    xml = re.sub("<TiffData[^>]*/>", named, xml).replace(uuid, "urn:uuid:1", 1)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, own, photometric="rgb", tile=(64, 64), description=xml.encode(), metadata=None)
    assert "other.ome.tif" in path.read_bytes().decode("latin1")
    slide = slides.open_slide(path, 400)
    np.testing.assert_array_equal(slide.read(0, 0, 128, 128, 128), own)


def test_other_channels_than_colours_are_refused(tmp_path: Path) -> None:
    stack = np.zeros((5, 128, 128), np.uint16)
    path = write_ome(tmp_path / "if.ome.tif", stack, "CYX", 1, photometric="minisblack")
    with pytest.raises(ValueError, match=r"if\.ome\.tif: .*; convert the image to 8-bit RGB"):
        slides.open_slide(path, 400)


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg"])
def test_a_bigtiff_in_strips_is_read_in_bands(tmp_path: Path, compression: str | None) -> None:
    pixels = picture(203, 130)
    path = tmp_path / "a.btf"
    options: dict[str, Any] = {"compressionargs": {"level": 98}} if compression == "jpeg" else {}
    tifffile.imwrite(path, pixels, bigtiff=True, photometric="rgb", rowsperstrip=16, compression=compression,
                     resolution=(20000, 20000), resolutionunit="CENTIMETER", metadata=None, **options)  # fmt: skip
    slide = slides.open_slide(path, 1)
    assert slide.facts == {"reader": "tiff", "levels": 1.0}
    assert slide.embedded_mpp == pytest.approx(0.5)
    assert (
        np.abs(slide.read(5, 150, 60, 60, 60)[:53].astype(int) - pixels[150:, 5:65]).max()
        <= (compression == "jpeg") * 60
    )
    assert (slide.read(5, 150, 60, 60, 60)[53:] == 255).all()


def test_strips_with_alpha_grey_and_white_as_zero(tmp_path: Path) -> None:
    pixels = picture(96, 80)
    cover = np.full((96, 80, 1), 128, np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.concatenate([pixels, cover], 2), photometric="rgb", extrasamples=["unassalpha"],
                     rowsperstrip=32, metadata=None)  # fmt: skip
    found = slides.open_slide(path, 400).read(0, 0, 80, 80, 80)
    expected = pixels[:80] * (128 / 255) + 127
    assert np.abs(found - expected).max() <= 1
    for photometric, grey in (("minisblack", pixels[..., 0]), ("miniswhite", 255 - pixels[..., 0])):
        tifffile.imwrite(path, pixels[..., 0], photometric=photometric, rowsperstrip=32, metadata=None)
        found = slides.open_slide(path, 400).read(0, 0, 80, 80, 80)
        np.testing.assert_array_equal(found, np.repeat(grey[:80, :, None], 3, 2))
