"""Slide images behind one small interface; the only module that knows OpenSlide.

In: a pyramid that OpenSlide reads (svs, ndpi, mrxs, tiled TIFF, ...) or a plain image (JPEG, PNG, untiled TIFF).
Out: size, the embedded mpp, a few whitelisted facts, and `read`: any rectangle of level 0 as a square of RGB pixels.

What lies outside the slide, or was never scanned, is white. Label, macro and thumbnail images are never opened, and of
the slide's properties only numbers named in `_FACTS` are copied: the rest may hold names of people and machines.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

_TOLERANCE = 1.01  # a level may be this much coarser than asked: 4.0003-fold pyramids are common
_FACTS = {"openslide.objective-power": "objective_power", "openslide.level-count": "levels"}
_FORMATS = ("JPEG", "PNG", "TIFF")  # of a plain image; others of Pillow's readers start programs (EPS)
_MODES = ("RGB", "RGBA", "L", "P", "CMYK", "YCbCr")


class DecodeError(ValueError):
    """A part of a slide that opens does not decode."""


class Slide(Protocol):
    """An open slide."""

    width_px0: int
    height_px0: int
    embedded_mpp: float | None  # um per level-0 pixel as the file tells it, not judged here
    facts: dict[str, Any]

    def read(self, x_px0: int, y_px0: int, w_px0: int, h_px0: int, out_px: int) -> Pixels:
        """Pixels [out_px, out_px, 3] of a rectangle of level 0, which may reach over the border.

        Raises:
            DecodeError: the file is damaged there; other places may still be read.
        """


@dataclass(frozen=True)
class Grid:
    """Tiles on a slide: squares of `tile_px0` (not a whole number) from the top-left corner on."""

    tile_px0: float
    rows: int
    cols: int

    @classmethod
    def over(cls, slide: Slide, tile_px0: float) -> "Grid":
        """The grid that covers a slide."""
        return cls(tile_px0, math.ceil(slide.height_px0 / tile_px0), math.ceil(slide.width_px0 / tile_px0))

    def check(self, slide: Slide, path: Path, max_tiles: int, max_px_per_byte: int) -> None:
        """Raises ValueError where a header of a few bytes would keep the machine busy for days."""
        size = f"{path}: its header tells {slide.width_px0} x {slide.height_px0} px"
        if self.rows * self.cols > max_tiles:
            raise ValueError(
                f"{size}, {self.rows * self.cols} tiles (max_tiles {max_tiles}); restore it, or raise that"
            )
        in_file = sum(part.stat().st_size for part in files_of(path))
        if slide.width_px0 * slide.height_px0 > max_px_per_byte * in_file:
            raise ValueError(
                f"{size} in {in_file} bytes (max_px_per_byte {max_px_per_byte}); restore it, or raise that"
            )

    def inside(self, slide: Slide, row: int, col: int) -> float:
        """Share of a tile that lies on the slide."""
        x, y, w, h = self.box(row, col)
        across, down = min(x + w, slide.width_px0) - max(x, 0), min(y + h, slide.height_px0) - max(y, 0)
        return max(0, across) * max(0, down) / (w * h)

    def box(self, row: int, col: int, span: int = 1) -> tuple[int, int, int, int]:
        """(x, y, w, h) in level-0 px of `span` x `span` tiles; rounded so that neighbours abut."""
        x0, y0 = round(col * self.tile_px0), round(row * self.tile_px0)
        x1, y1 = round((col + span) * self.tile_px0), round((row + span) * self.tile_px0)
        return x0, y0, x1 - x0, y1 - y0


def _resized(pixels: Pixels, out_px: int) -> Pixels:
    """INTER_AREA when shrinking, cubic when enlarging."""
    height, width = pixels.shape[:2]
    if (height, width) == (out_px, out_px):
        return np.ascontiguousarray(pixels)
    how = cv2.INTER_AREA if min(height, width) >= out_px else cv2.INTER_CUBIC
    return cv2.resize(pixels, (out_px, out_px), interpolation=how).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    """An image without transparency: unscanned areas are transparent black, and must not become black."""
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _one_mpp(x: float | None, y: float | None) -> float | None:
    """The mpp of square pixels; None where it is unknown, or differs by more than 1 % between the axes."""
    if not x or not y or not 0.99 <= x / y <= 1.01:
        return None
    return (x + y) / 2


class PyramidSlide:
    """A slide that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises ValueError where OpenSlide cannot."""
        self.path = path
        self._handle: openslide.OpenSlide | None = None
        handle = self._open()
        self.width_px0, self.height_px0 = handle.dimensions
        self.downsamples = tuple(handle.level_downsamples)
        self.embedded_mpp = _embedded_mpp(dict(handle.properties))
        self.facts = {"reader": "openslide"} | {
            name: float(handle.properties[key])
            for key, name in _FACTS.items()
            if _number(handle.properties.get(key)) is not None
        }

    def _open(self) -> openslide.OpenSlide:
        """The handle of this process, opened at first use and again after an error."""
        if self._handle is None:
            try:
                self._handle = openslide.OpenSlide(self.path)
            except openslide.OpenSlideError as error:
                raise ValueError(f"{self.path}: OpenSlide cannot open it ({error}); restore or convert it") from error
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}  # a handle does not survive a fork or a pickle

    def read(self, x_px0: int, y_px0: int, w_px0: int, h_px0: int, out_px: int) -> Pixels:
        """As Slide.read, from the deepest level that is fine enough."""
        fine = [i for i, d in enumerate(self.downsamples) if d <= _TOLERANCE * min(w_px0, h_px0) / out_px]
        level = max(fine, default=0)
        downsample = self.downsamples[level]
        size = (max(1, round(w_px0 / downsample)), max(1, round(h_px0 / downsample)))
        try:
            image = self._open().read_region((x_px0, y_px0), level, size)
        except openslide.OpenSlideError as error:
            self._handle = None  # a handle that failed once fails for ever
            raise DecodeError(f"{self.path}: does not decode at level-0 px ({x_px0}, {y_px0}): {error}") from error
        return _resized(np.asarray(_on_white(image)), out_px)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _embedded_mpp(properties: dict[str, str]) -> float | None:
    """From OpenSlide's own key, else from the TIFF resolution."""
    mpp = _one_mpp(*(_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"))
    unit_um = {"centimeter": 1e4, "inch": 25400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    per_unit = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if mpp is None and unit_um and all(per_unit):
        mpp = _one_mpp(*(unit_um / value for value in per_unit if value))
    return mpp


class PlainSlide:
    """An image without tiles, decoded once and held in memory."""

    def __init__(self, path: Path, max_image_mpx: int) -> None:
        """Decode it. Raises ValueError: no image, damaged, of odd mode, or larger than `max_image_mpx`."""
        with _opened(path) as image:
            self.width_px0, self.height_px0 = image.size
            mpx = self.width_px0 * self.height_px0 / 1e6
            if mpx > max_image_mpx:
                raise ValueError(
                    f"{path}: {mpx:.0f} megapixels would be decoded at once, max_image_mpx is {max_image_mpx}; raise "
                    "it, or convert the image to a tiled pyramidal TIFF"
                )
            if image.mode not in _MODES:
                raise ValueError(f"{path}: pixels of mode {image.mode}; convert the image to 8-bit RGB")
            dpi = image.info.get("dpi", (0, 0))
            self.embedded_mpp = _one_mpp(*(25400.0 / float(d) if d else None for d in dpi))
            self.facts: dict[str, Any] = {"reader": "plain", "levels": 1.0}
            try:
                rgba = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
                self._pixels: Pixels = np.asarray(_on_white(rgba))
            except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for damaged data
                raise ValueError(f"{path}: opens, but does not decode ({error}); restore the file") from error

    def read(self, x_px0: int, y_px0: int, w_px0: int, h_px0: int, out_px: int) -> Pixels:
        """As Slide.read."""
        x0, y0 = max(x_px0, 0), max(y_px0, 0)
        inside = self._pixels[y0 : max(y_px0 + h_px0, 0), x0 : max(x_px0 + w_px0, 0)]
        if inside.shape[:2] == (h_px0, w_px0):
            return _resized(inside, out_px)
        framed = np.full((h_px0, w_px0, 3), 255, np.uint8)
        framed[y0 - y_px0 :, x0 - x_px0 :][: inside.shape[0], : inside.shape[1]] = inside
        return _resized(framed, out_px)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A plain image with its header read; Pillow's own size limit is lifted, because ours is checked next."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path}: is no slide and no image that can be read; restore or convert it") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def open_slide(path: Path, max_image_mpx: int, scratch: Path | None = None) -> Slide:
    """A slide, by content and not by name.

    Args:
        scratch: folder for a tiled copy of an image that cannot be read in parts and is larger than `max_image_mpx`.

    Raises:
        ValueError: no such file, no slide, damaged, or too large to be decoded at once.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such image; correct the manifest")
    if openslide.OpenSlide.detect_format(path):
        return PyramidSlide(path)
    return PlainSlide(path, max_image_mpx)


def files_of(path: Path) -> list[Path]:
    """All files of a slide: the file itself and, for MIRAX, the folder beside it."""
    folder = path.with_suffix("")
    beside = sorted(p for p in folder.rglob("*") if p.is_file()) if path.suffix == ".mrxs" and folder.is_dir() else []
    return [path, *beside]
