"""TIFF read segment by segment: what OpenSlide reads too, several times faster, and some that it does not read.

In: a tiled TIFF or SVS of one file, an OME-TIFF with its pyramid in SubIFDs, a TIFF in many strips. Out: a slide.

Each segment is decoded once as long as tiles are asked for block by block: the cache holds a row of a block's segments
and more. At every level, pixels at whole places are those of OpenSlide. What is unusual raises UnusualError at the
opening, and goes to OpenSlide.
"""

import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import cv2
import numpy as np
import tifffile

from data_prep.slides import segments
from data_prep.slides.base import DecodeError, Pixels
from data_prep.slides.reference import ReferenceSlide, one_mpp
from data_prep.slides.sampling import Level, Part, Pyramid
from data_prep.slides.segments import Cache, InOnePieceError, Layout, UnusualError

_CACHE_BYTES, _BAND_BYTES, _BAND_ROWS = 128 << 20, 700 << 20, 4096
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_REDUCED_OR_MASK = 1 | 4  # bits of NewSubfileType
_NO_SLIDE = ("label", "macro", "thumbnail", "overview")
_UNITS_UM = {"": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "inch": 25400.0}
# What tifffile raises for a file that is damaged, or written to harm.
_PARSE_FAULTS = (
    tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
    ZeroDivisionError, struct.error, RuntimeError, OSError, ElementTree.ParseError,
)  # fmt: skip


def is_tiff(path: Path) -> bool:
    """By its first bytes."""
    with path.open("rb") as file:
        return file.read(4) in _MAGIC


class TiffSlide(Pyramid):
    """A TIFF whose segments are read here."""

    def __init__(self, path: Path, layouts: Sequence[Layout], mpp: float | None, facts: dict[str, Any]) -> None:
        """Of levels that were found in it, the finest first."""
        self.path, self.embedded_mpp, self.facts = path, mpp, facts
        self.layouts = tuple(layouts)
        size0 = (layouts[0].width_px, layouts[0].height_px)
        self.levels = tuple(Level.of((layout.width_px, layout.height_px), size0) for layout in layouts)
        self._file: BinaryIO | None = None
        self._cache = self._new_cache()

    def _new_cache(self) -> Cache:
        # Of an image in strips, a block of tiles needs all strips that it touches in their whole width.
        band = max((3 * _BAND_ROWS * at.width_px for at in self.layouts if not at.tiled), default=0)
        return Cache(max(_CACHE_BYTES, min(band, _BAND_BYTES)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = self._new_cache()

    def close(self) -> None:
        """As Slide.close."""
        if self._file is not None:
            self._file.close()
        self._file, self._cache = None, self._new_cache()

    def bytes_of(self, level: int, index: int) -> list[bytes]:
        """A segment as it lies in the file, of each plane. Raises ValueError: it is not there, or too long."""
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        layout = self.layouts[level]
        most = 2 * 3 * layout.segment_px[0] * layout.segment_px[1] + (1 << 16)
        found = []
        for offset, count in zip(layout.offsets[:, index].tolist(), layout.counts[:, index].tolist(), strict=True):
            data = (
                os.pread(self._file.fileno(), count, offset) if 0 < count <= most else b""
            )  # needs no seek: fork-safe
            if not data or len(data) < count:
                raise ValueError("the segment is not in the file")
            found.append(data)
        return found

    def _segment(self, level: int, index: int, step: int, mean: int) -> Pixels:
        """A segment, decoded at a `step`th of its size, and that shrunk `mean` times."""
        found = self._cache.get((level, index, step, mean))
        if found is not None:
            return found
        layout = self.layouts[level]
        row, col = divmod(index, layout.cols)
        height, width = layout.segment_px
        rows = height if layout.tiled else min(height, layout.height_px - row * height)
        memory = self._cache.memory(segments.shape_of(layout, rows, step)) if layout.takes_memory else None
        try:
            pixels = segments.decoded(layout, self.bytes_of(level, index), rows, step, memory)
        except segments.FAULTS as error:
            if memory is not None:
                self._cache.give(memory)
            at = self.levels[level]
            place = (round(col * width * at.across), round(row * height * at.down))
            raise DecodeError(f"{self.path}: does not decode at level-0 px {place}: {error}") from error
        if mean > 1:
            small = self._cache.memory((pixels.shape[0] // mean, pixels.shape[1] // mean, 3))
            pixels = cv2.resize(pixels, small.shape[1::-1], dst=small, interpolation=cv2.INTER_AREA)
            if memory is not None:
                self._cache.give(memory)
        both = step * mean
        across, down = min(width, layout.width_px - col * width), min(height, layout.height_px - row * height)
        self._cache.put((level, index, step, mean), pixels, -(-across // both) * -(-down // both))
        return pixels

    def _steps(self, level: int, x: int, y: int, w: int, h: int, out: tuple[int, int]) -> tuple[int, int]:
        """How coarse segments are decoded, and how many times they are shrunk before they are joined."""
        layout, shrink = self.layouts[level], min(w / out[1], h / out[0])
        # At an eighth of the size a JPEG decodes in a third of the time; what is left to shrink is still averaged.
        step = next((s for s in (8, 4) if layout.scales and shrink >= 2 * s), 1)
        mean = w // out[1]
        aligned = (x, y, *layout.segment_px, layout.width_px, layout.height_px)
        if step > 1 or not layout.tiled or (mean * out[1], mean * out[0]) != (w, h) or any(at % mean for at in aligned):
            return step, 1
        return 1, mean  # the same means as of the joined pixels, of a quarter of the memory

    def _part(self, level: int, x: int, y: int, w: int, h: int, out: tuple[int, int]) -> Part:
        layout = self.layouts[level]
        step, mean = self._steps(level, x, y, w, h, out)
        both = step * mean
        left, top, right, bottom = x // both, y // both, -(-(x + w) // both), -(-(y + h) // both)
        height, width = (side // both for side in layout.segment_px)
        x0, x1 = max(left, 0), min(right, -(-layout.width_px // both))
        y0, y1 = max(top, 0), min(bottom, -(-layout.height_px // both))
        # What will be resampled is, in floats; bytes become such as they are copied.
        whole = both > 1 or (w % out[1] == 0 and h % out[0] == 0)
        canvas = np.empty((bottom - top, right - left, 3), np.uint8 if whole else np.float32)
        if (x0, y0, x1, y1) != (left, top, right, bottom):
            canvas.fill(255)
        for row in range(y0 // height, math.ceil(y1 / height) if x1 > x0 else 0):
            from_y, to_y = max(y0, row * height), min(y1, (row + 1) * height)
            for col in range(x0 // width, math.ceil(x1 / width)):
                from_x, to_x = max(x0, col * width), min(x1, (col + 1) * width)
                key = (level, row * layout.cols + col, step, mean)
                canvas[from_y - top : to_y - top, from_x - left : to_x - left] = self._segment(*key)[
                    from_y - row * height : to_y - row * height, from_x - col * width : to_x - col * width
                ]
                self._cache.used(key, (to_y - from_y) * (to_x - from_x))
        return Part(canvas, left * both, top * both, both)


def _parsed(path: Path, find: Callable[[tifffile.TiffFile], Any]) -> Any:
    """What `find` finds in a TIFF. Raises UnusualError: it cannot be parsed, or what `find` says."""
    try:
        # An OME-TIFF may name other files, anywhere: none is opened.
        with tifffile.TiffFile(path, _multifile=False) as file:
            return find(file)
    except _PARSE_FAULTS as error:
        raise UnusualError(f"tifffile: {error}") from error


def _first(slide: TiffSlide, level: int) -> bytes:
    try:
        return slide.bytes_of(level, 0)[0]
    except ValueError as error:
        raise UnusualError(str(error)) from error


def _checked(slide: TiffSlide, layouts: Sequence[Layout]) -> TiffSlide:
    """A slide whose segments are all there, and of the colours that their pages say."""
    for level, layout in enumerate(layouts):
        if (layout.counts <= 0).any():
            raise UnusualError("segments are missing")
        if layout.codec == segments.JPEG and segments.names_its_colours(layout, _first(slide, level)):
            raise UnusualError("JPEG segments name other colours than their page")
    return slide


def like_reference(reference: ReferenceSlide) -> TiffSlide:
    """The slide that OpenSlide reads, read faster.

    Raises:
        UnusualError: better left to OpenSlide.
    """

    def find(file: tifffile.TiffFile) -> list[Layout]:
        tiled = [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
        found = []
        for level, tile in zip(reference.levels, reference.tile_sizes, strict=True):
            size = (level.width_px, level.height_px, *tile)
            same = [p for p in tiled if (p.imagewidth, p.imagelength, p.tilewidth, p.tilelength) == size]
            if len(same) != 1:
                raise UnusualError(f"{len(same)} pages of {size} px")
            found.append(layout_of_three(same[0]))
        return found

    layouts = _parsed(reference.path, find)
    return _checked(
        TiffSlide(reference.path, layouts, reference.embedded_mpp, reference.facts | {"reader": "tiff"}), layouts
    )


def layout_of_three(page: Any) -> Layout:
    """The layout of a page of three interleaved colours. Raises UnusualError where it is none."""
    layout = segments.layout_of([page])
    if layout.samples != 3 or len(layout.offsets) != 1:
        raise UnusualError(f"{layout.samples} samples in {len(layout.offsets)} planes")
    return layout


def _pages_of(level: Any) -> list[Any]:
    """The page of a level, or its three of one colour. Raises UnusualError: it is no picture in colours."""
    axes = "".join(axis for axis, size in zip(level.axes, level.shape, strict=True) if size > 1)
    if axes in ("YXS", "SYX", "YX") and len(level.pages) == 1:
        return [level.pages[0]]
    if len(axes) == 3 and axes[1:] == "YX" and len(level.pages) == 3 and level.pages[0].samplesperpixel == 1:
        return list(level.pages)
    raise UnusualError(f"pixels of shape {level.shape} ({level.axes})")


def _ome_mpp(xml: str, image: int) -> tuple[list[str], float | None]:
    """The names of all images of an OME-TIFF, and um per pixel of one."""
    root = ElementTree.fromstring(xml)  # expat refuses entities that grow beyond a limit
    images = [element for element in root if element.tag.rpartition("}")[2] == "Image"]
    names = [element.get("Name", "").lower() for element in images]
    pixels = [p for p in images[image] if p.tag.rpartition("}")[2] == "Pixels"] if image < len(images) else []
    sizes = []
    for axis in "XY" if pixels else "":
        unit_um = _UNITS_UM.get(pixels[0].get(f"PhysicalSize{axis}Unit", ""))
        size = float(pixels[0].get(f"PhysicalSize{axis}", "0"))
        sizes.append(size * unit_um if unit_um and math.isfinite(size) else None)
    return names, one_mpp(*sizes) if sizes else None


def _tag_mpp(page: Any) -> float | None:
    """From the resolution of a page."""
    unit_um = {2: 25400.0, 3: 1e4}.get(int(page.tags.valueof("ResolutionUnit", default=2)))
    told = [page.tags.valueof(f"{axis}Resolution") for axis in "XY"]
    per_unit = [t[0] / t[1] if isinstance(t, tuple) and t[1] else None for t in told]
    return one_mpp(*(unit_um / value if unit_um and value else None for value in per_unit))


def _largest(file: tifffile.TiffFile) -> tuple[int, Any]:
    """The series of the slide itself: the largest that is not named as a picture of its label or of its whole."""
    names = _ome_mpp(file.ome_metadata, 0)[0] if file.ome_metadata else []
    names += [""] * len(file.series)
    slides = [
        (i, series)
        for i, (series, name) in enumerate(zip(file.series, names, strict=False))
        if not any(word in name or word in series.name.lower() for word in _NO_SLIDE)
    ]
    if not slides:
        raise UnusualError("no image but labels")
    return max(slides, key=lambda found: int(found[1].keyframe.imagewidth) * int(found[1].keyframe.imagelength))


def _of_series(file: tifffile.TiffFile) -> tuple[list[Layout], float | None, bool]:
    index, series = _largest(file)
    layouts = [segments.layout_of(_pages_of(level)) for level in series.levels]
    layouts.sort(key=lambda layout: -layout.width_px)
    first = layouts[0]
    if not first.tiled and (first.offsets.shape[1] == 1 or 3 * _BAND_ROWS * first.width_px > 2 * _BAND_BYTES):
        raise InOnePieceError("one strip, or strips that are too wide")
    mpp = _ome_mpp(file.ome_metadata, index)[1] if file.ome_metadata else None
    return layouts, mpp or _tag_mpp(series.keyframe), bool(file.is_ome)


def of_series(path: Path) -> TiffSlide:
    """A TIFF that OpenSlide does not read, or of which it reads a part: the largest image with all its levels.

    Raises:
        UnusualError: other pixels than 8-bit colours, or it cannot be read in parts.
    """
    layouts, mpp, is_ome = _parsed(path, _of_series)
    facts = {"reader": "ome-tiff" if is_ome else "tiff", "levels": float(len(layouts))}
    slide = TiffSlide(path, layouts, mpp, facts)
    return _checked(slide, layouts)


def check_is_largest(path: Path, size_px: tuple[int, int]) -> None:
    """Raises ValueError where the page that a reader shows is not the largest of its file, or one of several."""
    try:
        sizes = _parsed(path, lambda file: [
            (page.imagewidth, page.imagelength) for page in file.pages
            if isinstance(page, tifffile.TiffPage) and not int(page.subfiletype) & _REDUCED_OR_MASK
        ])  # fmt: skip
    except UnusualError:
        return  # what reads it tells what is wrong
    largest = max(sizes, key=lambda size: size[0] * size[1], default=size_px)
    if largest[0] * largest[1] > size_px[0] * size_px[1]:
        raise ValueError(
            f"{path}: would be read as its picture of {size_px[0]} x {size_px[1]} px, but it holds one of {largest[0]} "
            f"x {largest[1]}; write the slide alone into a file of its own"
        )
    if sizes.count(size_px) > 1:
        raise ValueError(f"{path}: holds {sizes.count(size_px)} pictures of {size_px[0]} x {size_px[1]} px (a stack, "
                         "or several slides); write the slide alone into a file of its own")  # fmt: skip


def is_ome(path: Path) -> bool:
    """Whether a TIFF is an OME-TIFF."""
    try:
        return bool(_parsed(path, lambda file: file.is_ome))
    except UnusualError:
        return False
