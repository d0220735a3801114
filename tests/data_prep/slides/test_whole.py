"""Images read as a whole: sizes refused from the header, alpha on white, scratch files announced and removed."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image

from data_prep import slides
from data_prep.slides.whole import ScratchSlide
from tests.data_prep.slides.images import picture


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgba = np.zeros((50, 60, 4), np.uint8)
    rgba[:25] = [10, 20, 30, 255]
    for scratch, limit in ((None, 400), (tmp_path / "scratch", 0)):
        slide = slides.open_slide(write(tmp_path / "a.png", rgba), limit, scratch)
        found = slide.read(0, 0, 50, 50, 50)
        assert (found[:25] == [10, 20, 30]).all()
        assert (found[25:] == 255).all()


def test_embedded_mpp(tmp_path: Path) -> None:
    pixels, dpi = picture(60, 80), 25400 / 0.5
    junk = slides.open_slide(write(tmp_path / "a.png", pixels, dpi=(72, 72)), 400).embedded_mpp
    assert junk == pytest.approx(352.8, rel=0.01)
    assert slides.open_slide(write(tmp_path / "a.tif", pixels, dpi=(dpi, dpi)), 400).embedded_mpp == 0.5
    assert slides.open_slide(write(tmp_path / "b.tif", pixels, dpi=(dpi, 2 * dpi)), 400).embedded_mpp is None
    assert slides.open_slide(write(tmp_path / "a.jpg", pixels), 400).embedded_mpp is None


@pytest.mark.parametrize("name", ["bomb.png", "bomb.tif", "bomb.jpg"])
def test_a_bomb_is_refused_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write(tmp_path / name, np.zeros((2000, 2000), np.uint8))
    if name == "bomb.tif":  # one strip
        tifffile.imwrite(path, np.zeros((2000, 2000), np.uint8), rowsperstrip=2000, compression="zlib", metadata=None)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the pixels were decoded"))
    cure = r"raise it, name a scratch folder \(--scratch\), or convert it: vips tiffsave bomb\.\w+ tiled\.tif --tile"
    with pytest.raises(ValueError, match=rf"bomb\.\w+: 4 megapixels .* max_image_mpx is 3; {cure}"):
        slides.open_slide(path, 3)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_truncated_and_odd_images_are_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jpg", picture(300, 400)).read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    for limit, scratch in ((400, None), (0, tmp_path / "scratch")):
        with pytest.raises(ValueError, match=r"a\.jpg: opens, but does not decode"):
            slides.open_slide(tmp_path / "a.jpg", limit, scratch)
    assert list((tmp_path / "scratch").iterdir()) == []
    write(tmp_path / "b.png", np.zeros((9, 9), np.uint16))
    with pytest.raises(ValueError, match="convert the image to 8-bit RGB"):
        slides.open_slide(tmp_path / "b.png", 400)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "grey.png"])
def test_a_scratch_file_has_the_pixels_and_goes_with_the_slide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pixels = picture(700, 900)
    path, dpi = write(tmp_path / name, pixels[..., 0] if "grey" in name else pixels), 25400 / 0.5
    if name == "a.tif":
        tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=700, metadata=None, resolution=(dpi, dpi),
                         resolutionunit="INCH")  # fmt: skip
    whole = slides.open_slide(path, 400)
    scratch = tmp_path / "scratch"
    slide = slides.open_slide(path, 0, scratch)
    assert (whole.facts["reader"], slide.facts["reader"]) == ("plain", "scratch")
    assert slide.embedded_mpp == whole.embedded_mpp == (0.5 if name == "a.tif" else None)
    for box in ((0, 0, 700, 700, 350), (-10, 650, 100, 100, 100), (500, 500, 33, 33, 66)):
        np.testing.assert_array_equal(slide.read(*box), whole.read(*box))
    (file,) = scratch.iterdir()
    assert file.name.endswith(".tmp") and not file.name.startswith((".a.", "a."))
    assert f"{name}: decoding into a scratch file of 0.0 GB" in capsys.readouterr().out
    slide.close()
    assert list(scratch.iterdir()) == []


def test_a_scratch_file_goes_with_the_last_reference_and_with_the_process(tmp_path: Path) -> None:
    path, scratch = write(tmp_path / "a.png", picture(64, 64)), tmp_path / "scratch"
    slide: slides.Slide | None = slides.open_slide(path, 0, scratch)
    assert isinstance(slide, ScratchSlide)
    assert len(list(scratch.iterdir())) == 1
    pid = os.fork()
    if pid == 0:
        slide.close()  # not its own
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(scratch.iterdir())) == 1
    slide = None
    gc.collect()
    assert list(scratch.iterdir()) == []
    code = f"import pathlib; from data_prep import slides; s = slides.open_slide(pathlib.Path({str(path)!r}), 0, "
    code += f"pathlib.Path({str(scratch)!r})); assert len(list(pathlib.Path({str(scratch)!r}).iterdir())) == 1"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(scratch.iterdir()) == []


def test_a_scratch_file_of_a_dead_process_is_swept(tmp_path: Path) -> None:
    path, scratch = write(tmp_path / "a.png", picture(64, 64)), tmp_path / "scratch"
    code = f"import os, pathlib; from data_prep import slides; s = slides.open_slide(pathlib.Path({str(path)!r}), 0, "
    code += f"pathlib.Path({str(scratch)!r})); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = scratch.iterdir()
    slide = slides.open_slide(path, 0, scratch)
    assert not left.exists()
    slide.close()


def test_no_room_for_a_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.png", picture(64, 64))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore
    with pytest.raises(ValueError, match=r"a\.png: its scratch file would take 0\.0 GB, 0\.0 GB are free in --scratch"):
        slides.open_slide(path, 0, tmp_path / "scratch")


def test_images_of_which_no_band_decodes_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", picture(64, 64), progressive=True)
    with pytest.raises(ValueError, match=r"a\.jpg: .* progressive or interlaced.*; convert it: vips tiffsave"):
        slides.open_slide(path, 0, tmp_path / "scratch")
    pyvips.Image.new_from_array(picture(64, 64)).pngsave(str(tmp_path / "a.png"), interlace=True)
    with pytest.raises(ValueError, match=r"a\.png: .* progressive or interlaced"):
        slides.open_slide(tmp_path / "a.png", 0, tmp_path / "scratch")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_an_orientation_tag_is_refused(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    assert slides.open_slide(write(tmp_path / name, picture(60, 80), exif=exif), 400).width_px0 == 80
    exif[0x0112] = 6
    write(tmp_path / name, picture(60, 80), exif=exif)
    for limit, scratch in ((400, None), (0, tmp_path / "scratch")):
        with pytest.raises(ValueError, match=r"a\.\w+: its orientation tag turns it.*; turn its pixels and remove"):
            slides.header(tmp_path / name, limit, scratch)
        with pytest.raises(ValueError, match="orientation tag"):
            slides.open_slide(tmp_path / name, limit, scratch)


def test_damage_inside_a_jpeg_is_not_painted_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", picture(600, 600), quality=90)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for damaged in (data[:middle] + b"\xff\xd9", data[:middle] + bytes(200) + data[middle + 200 :]):
        path.write_bytes(damaged)
        for limit, scratch in ((400, None), (0, tmp_path / "scratch")):
            with pytest.raises(ValueError, match=r"a\.jpg: opens, but does not decode .*; restore the file"):
                slides.open_slide(path, limit, scratch)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_colours_of_print_are_refused(tmp_path: Path) -> None:
    Image.fromarray(picture(60, 80)).convert("CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: pixels of mode CMYK; convert the image to 8-bit RGB"):
        slides.open_slide(tmp_path / "a.jpg", 400)
