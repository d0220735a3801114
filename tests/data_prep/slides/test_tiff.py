"""TIFF: the pixels of OpenSlide at every level, white beyond the border, damage that hurts only what touches it."""

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from data_prep import slides
from data_prep.slides import segments, tiff
from data_prep.slides.reference import ReferenceSlide
from tests.data_prep.slides.images import (
    CODINGS,
    damage,
    picture,
    write_jpeg2000,
    write_tiles,
    write_with_tables,
)  # fmt: skip


def assert_like_openslide(path: Path, slide: slides.Slide) -> None:
    """Level 0 as a whole with a margin, and all of each deeper level, are OpenSlide's pixels; white beyond."""
    assert slide.facts["reader"] == "tiff"
    reference = openslide.OpenSlide(path)
    for level, (width, height) in enumerate(reference.level_dimensions):
        ratio = round(reference.level_downsamples[level])
        side = max(width, height) + 8
        image = reference.read_region((0, 0), level, (side, side))
        expected = np.asarray(slides.reference.on_white(image))
        np.testing.assert_array_equal(slide.read(0, 0, side * ratio, side * ratio, side), expected)
        assert (expected[height:] == 255).all()
        at, small = 16 * ratio, 41
        image = reference.read_region((at, at), level, (small, small)).convert("RGB")
        np.testing.assert_array_equal(slide.read(at, at, small * ratio, small * ratio, small), np.asarray(image))


@pytest.mark.parametrize("coding", CODINGS)
def test_the_pixels_of_openslide(tmp_path: Path, coding: str) -> None:
    pixels = picture(280, 360)  # neither side is a whole number of tiles
    path = write_tiles(tmp_path / "a.tif", [pixels, np.ascontiguousarray(pixels[::2, ::2])], coding)
    slide = slides.open_slide(path, 400)
    assert_like_openslide(path, slide)
    assert np.abs(slide.read(0, 0, 256, 256, 256).astype(int) - pixels[:256, :256]).mean() < 6


@pytest.mark.parametrize("quality", [80, 95])  # chroma at half and at full resolution
def test_jpeg_tables_of_the_page(tmp_path: Path, quality: int) -> None:
    path = write_with_tables(tmp_path / "a.tif", picture(384, 512), quality)
    assert_like_openslide(path, slides.open_slide(path, 400))


@pytest.mark.parametrize("codec", [33003, 33005])
def test_jpeg2000_of_aperio(tmp_path: Path, codec: int) -> None:
    path = write_jpeg2000(tmp_path / "a.svs", picture(150, 200), codec)
    slide = slides.open_slide(path, 400)
    assert_like_openslide(path, slide)
    assert slide.embedded_mpp == 0.5


def test_a_real_slide(real_data: Path) -> None:
    path = real_data / "wsi" / "tests" / "fixtures" / "svs-images" / "cmu-1-small-region.svs"
    assert_like_openslide(path, slides.open_slide(path, 400))


@pytest.mark.parametrize("coding", ["jpeg 4:2:0", "none"])
@pytest.mark.parametrize("ratio", [2, 4])
def test_shrunk_before_or_after_joining_is_the_same(tmp_path: Path, coding: str, ratio: int) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(256, 328)], coding)
    slide, reference = slides.open_slide(path, 400), ReferenceSlide(path)
    for x, y in [(0, 0), (8, 60), (9, 60), (300, 200), (-16, -8), (400, 0)]:
        box = (x, y, 48 * ratio, 48 * ratio, 48)
        np.testing.assert_array_equal(slide.read(*box), reference.read(*box))


@pytest.mark.parametrize("size", [(49, 49), (48, 49), (50, 48), (97, 97), (47, 48)])
def test_joined_in_floats_or_in_bytes_is_the_same(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(256, 328)], "jpeg 4:2:0")
    slide, reference = slides.open_slide(path, 400), ReferenceSlide(path)
    for x, y in [(0, 0), (9, 60), (-16, -8), (300, 230)]:
        np.testing.assert_array_equal(slide.read(x, y, *size, 48), reference.read(x, y, *size, 48))


def test_each_segment_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(512, 512)], "jpeg 4:2:0")
    slide = slides.open_slide(path, 400)
    seen = []
    real = segments.decoded

    def counting(layout: segments.Layout, *words: Any) -> slides.Pixels:
        seen.append(layout)
        return real(layout, *words)

    monkeypatch.setattr(segments, "decoded", counting)
    grid = slides.Grid.over(slide, 50.0)
    for row in range(grid.rows):
        for col in range(grid.cols):
            slide.read(*grid.box(row, col), 50)
    assert len(seen) == 64
    assert isinstance(slide, tiff.TiffSlide)
    assert not slide._cache._segments, "what was copied whole gives its memory back"


def test_the_cache_is_bounded_and_its_memory_is_used_again(tmp_path: Path) -> None:
    pixels = picture(512, 512)
    slide = slides.open_slide(write_tiles(tmp_path / "a.tif", [pixels], "jpeg rgb"), 400)
    expected = slide.read(0, 0, 512, 512, 512)
    assert isinstance(slide, tiff.TiffSlide)
    slide._cache = segments.Cache(5 * 64 * 64 * 3)
    for _ in range(2):  # what was returned before is not written over by what comes later
        tiles = [slide.read(x, y, 96, 96, 96) for y in (0, 96, 192) for x in (0, 96, 192)]
        for i, tile in enumerate(tiles):
            y, x = 96 * (i // 3), 96 * (i % 3)
            np.testing.assert_array_equal(tile, expected[y : y + 96, x : x + 96])
    assert len(slide._cache._segments) <= 5


def touched(slide: slides.Slide) -> set[tuple[int, int]]:
    """(row, col) of the tiles of 40 px that do not decode."""
    grid, failed = slides.Grid.over(slide, 40.0), set()
    for row in range(grid.rows):
        for col in range(grid.cols):
            try:
                slide.read(*grid.box(row, col), 40)
            except slides.DecodeError as error:
                assert "does not decode at level-0 px" in str(error)
                failed.add((row, col))
    return failed


@pytest.mark.parametrize("coding", ["jpeg 4:2:0", "jpeg rgb"])
def test_damage_hurts_only_the_tiles_that_touch_it(tmp_path: Path, coding: str) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(256, 320)], coding)
    damage(path, 7)  # of 5 in a row: x 128 to 192, y 64 to 128
    expected = {(row, col) for row in (1, 2, 3) for col in (3, 4)}
    slide = slides.open_slide(path, 400)
    assert slide.facts["reader"] == "tiff"
    assert touched(slide) == touched(ReferenceSlide(path)) == expected


def test_a_slide_that_nowhere_decodes(real_data: Path) -> None:
    path = real_data / "wsi" / "tests" / "fixtures" / "unreadable.svs"
    for slide in (slides.open_slide(path, 400), ReferenceSlide(path)):
        for _ in range(2):
            with pytest.raises(slides.DecodeError, match=r"unreadable\.svs: does not decode at level-0 px \(0, 0\)"):
                slide.read(0, 0, 16, 16, 16)


def test_segments_beyond_the_end_of_the_file(tmp_path: Path) -> None:
    pixels = picture(256, 256)
    path = write_tiles(tmp_path / "a.tif", [pixels, np.ascontiguousarray(pixels[::2, ::2])], "jpeg rgb")
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages.first
        offsets = list(page.dataoffsets)
        page.tags["TileOffsets"].overwrite([*offsets[:12], *(offset + (1 << 24) for offset in offsets[12:])])
    assert touched(slides.open_slide(path, 400)) == {(row, col) for row in (4, 5, 6) for col in range(7)}


def test_segments_that_tell_another_size_are_refused(tmp_path: Path) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(128, 128)], "jpeg rgb")
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        begin = data.index(b"\xff\xc0", file.pages[0].dataoffsets[2])
    path.write_bytes(data[: begin + 5] + (65000).to_bytes(2, "big") * 2 + data[begin + 9 :])
    slide = slides.open_slide(path, 400)
    with pytest.raises(slides.DecodeError, match=r"level-0 px \(0, 64\)"):
        slide.read(0, 64, 64, 64, 64)
    assert slide.read(64, 0, 64, 64, 64).std() > 1
    path = write_jpeg2000(tmp_path / "b.svs", picture(64, 128), 33005)
    data = path.read_bytes()
    begin = data.index(b"\xff\x4f\xff\x51")
    path.write_bytes(data[: begin + 8] + (1 << 20).to_bytes(4, "big") * 2 + data[begin + 16 :])
    slide = slides.open_slide(path, 400)
    with pytest.raises(slides.DecodeError, match="header does not tell the size"):
        slide.read(0, 0, 64, 64, 64)


def test_what_is_unusual_goes_to_openslide(tmp_path: Path) -> None:
    pixels = picture(256, 256)
    planar = tmp_path / "planar.tif"
    tifffile.imwrite(planar, pixels.transpose(2, 0, 1), tile=(64, 64), photometric="rgb", planarconfig="separate",
                     metadata=None)  # fmt: skip
    alpha = tmp_path / "alpha.tif"
    cover = np.full((256, 256, 1), 255, np.uint8)
    tifffile.imwrite(alpha, np.concatenate([pixels, cover], 2), tile=(64, 64), photometric="rgb", metadata=None,
                     extrasamples=["unassalpha"])  # fmt: skip
    deep = tmp_path / "deep.tif"
    tifffile.imwrite(deep, pixels.astype(np.uint16) * 257, tile=(64, 64), photometric="rgb", metadata=None)
    for path in (planar, alpha, deep):
        slide = slides.open_slide(path, 400)
        assert slide.facts["reader"] == "openslide"
        np.testing.assert_array_equal(slide.read(10, 20, 64, 64, 64), pixels[20:84, 10:74])
    missing = write_tiles(tmp_path / "missing.tif", [pixels], "none")
    with tifffile.TiffFile(missing, mode="r+") as file:
        page = file.pages.first
        counts = list(page.databytecounts)
        page.tags["TileByteCounts"].overwrite([*counts[:3], 0, *counts[4:]])
    assert slides.open_slide(missing, 400).facts["reader"] == "openslide"


def _read_there(slide: slides.Slide, sender: "multiprocessing.connection.Connection") -> None:
    sender.send(slide.read(30, 30, 64, 64, 64))


@pytest.mark.parametrize("how", ["spawn", "fork"])
@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_other_processes_open_their_own_handles(tmp_path: Path, how: str, reader: str) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(256, 256)], "jpeg 4:2:0")
    slide = slides.open_slide(path, 400) if reader == "tiff" else ReferenceSlide(path)
    assert slide.facts["reader"] == reader
    here = slide.read(30, 30, 64, 64, 64)
    context: Any = multiprocessing.get_context(how)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read_there, args=(slide, sender))
    process.start()
    np.testing.assert_array_equal(receiver.recv(), here)
    process.join()
    np.testing.assert_array_equal(slide.read(30, 30, 64, 64, 64), here)
    again = pickle.loads(pickle.dumps(slide))  # noqa: S301  our own object, as multiprocessing sends it
    np.testing.assert_array_equal(again.read(30, 30, 64, 64, 64), here)


def test_close_lets_go_of_the_file(tmp_path: Path) -> None:
    path = write_tiles(tmp_path / "a.tif", [picture(128, 128)], "jpeg rgb")
    slide = slides.open_slide(path, 400)

    def held() -> list[Path]:
        return [p for p in Path("/proc/self/fd").iterdir() if os.path.realpath(p) == str(path)]

    slide.read(0, 0, 64, 64, 64)
    assert held()
    slide.close()
    assert not held()
