"""Images that cannot be read in parts: JPEG, PNG, TIFF of one strip.

In: such a file. Out: a slide: decoded at once and held in memory, or, if it is larger than that, decoded in bands into
a tiled file of raw pixels in a scratch folder, which is removed with the slide.

Sizes are checked from the header, before anything is decoded.
"""

import contextlib
import os
import shutil
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_prep.slides.base import Header, Pixels
from data_prep.slides.reference import on_white, one_mpp
from data_prep.slides.sampling import Level, Part, Pyramid
from data_prep.slides.tiff import TiffSlide, of_series
from storm import files

_FORMATS = ("JPEG", "PNG", "TIFF")  # others of Pillow's readers start programs (EPS)
_MODES = ("RGB", "RGBA", "L", "P", "YCbCr")  # what colours CMYK means only its printer knows
_ORIENTATION = 0x0112  # EXIF, TIFF
_TILE_PX = 512
_NAME = "slide.tif"  # of the scratch file: nothing of the user's own names


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image with its header read; Pillow's own size limit is lifted, because ours is checked next."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path}: is no slide and no image that can be read; restore or convert it") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


class WholeSlide(Pyramid):
    """An image decoded once and held in memory."""

    def __init__(self, path: Path, image: Image.Image) -> None:
        """Decode it. Raises ValueError where it is damaged."""
        self.path = path
        self.levels = (Level(*image.size, 1, 1),)
        self.embedded_mpp = _mpp(image)
        self.facts: dict[str, Any] = {"reader": "plain", "levels": 1.0}
        try:
            self._pixels: Pixels = _strict_jpeg(path) if image.format == "JPEG" else _flat(image)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for damaged data
            raise ValueError(f"{path}: opens, but does not decode ({error}); restore the file") from error

    def close(self) -> None:
        """As Slide.close."""
        self._pixels = np.zeros((0, 0, 3), np.uint8)

    def _part(self, level: int, x: int, y: int, w: int, h: int, out: tuple[int, int]) -> Part:
        x0, y0 = max(x, 0), max(y, 0)
        inside = self._pixels[y0 : max(y + h, 0), x0 : max(x + w, 0)]
        if inside.shape[:2] == (h, w):
            return Part(inside, x, y)
        framed = np.full((h, w, 3), 255, np.uint8)
        framed[y0 - y :, x0 - x :][: inside.shape[0], : inside.shape[1]] = inside
        return Part(framed, x, y)


class ScratchSlide(TiffSlide):
    """An image that was decoded into a scratch file of tiles; the process that wrote it removes it."""

    def __init__(self, path: Path, scratch: Path, mpp: float | None) -> None:
        """Of the image at `path`, which lies decoded at `scratch`."""
        tiles = of_series(scratch)
        super().__init__(scratch, tiles.layouts, mpp, {"reader": "scratch", "levels": 1.0})
        self.source = path
        self._removal: weakref.finalize | None = weakref.finalize(self, _remove, scratch, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_removal": None}

    def close(self) -> None:
        """As Slide.close."""
        super().close()
        if self._removal is not None:
            self._removal()


def _remove(scratch: Path, owner: int) -> None:
    """Behind a fork the child has a copy of the slide, but not the file."""
    if os.getpid() == owner:
        scratch.unlink(missing_ok=True)


def _flat(image: Image.Image) -> Pixels:
    return np.asarray(on_white(image.convert("RGBA") if "transparency" in image.info else image))


def _strict_jpeg(path: Path) -> Pixels:
    """Pillow paints what is damaged inside a JPEG grey, and says nothing. Raises ValueError where it is damaged."""
    return simplejpeg.decode_jpeg(path.read_bytes(), "RGB", fastdct=False, fastupsample=False)


def _is_turned(image: Image.Image) -> bool:
    """Whether it asks viewers to turn or mirror it; tags that cannot be read ask nothing."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # Pillow would decode all of it to look for a tag behind its pixels
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return False


def _mpp(image: Image.Image) -> float | None:
    return one_mpp(*(25400.0 / float(d) if d else None for d in image.info.get("dpi", (0, 0))))


def _needs_all(image: Image.Image) -> bool:
    """Whether its first row needs its last byte: such an image cannot be decoded in bands."""
    return bool(image.info.get("progressive") or image.info.get("interlace"))


def open_whole(path: Path, max_image_mpx: int, scratch: Path | None) -> Pyramid:
    """An image that is read as a whole.

    Raises:
        ValueError: no image, damaged, of odd mode, too large for memory and no place for a scratch file.
    """
    with _opened(path) as image:
        if _fits(path, image, max_image_mpx, scratch):
            return WholeSlide(path, image)
        kind, size, mpp = str(image.format), image.size, _mpp(image)
    assert scratch is not None  # else it would not have passed
    return ScratchSlide(path, _converted(path, kind, size, scratch), mpp)


def header(path: Path, max_image_mpx: int, scratch: Path | None) -> Header:
    """As `open_whole`, of the header alone. Raises as it does, except for damage."""
    with _opened(path) as image:
        _fits(path, image, max_image_mpx, scratch)
        return Header(*image.size, _mpp(image))


def _fits(path: Path, image: Image.Image, max_image_mpx: int, scratch: Path | None) -> bool:
    """Whether an image may be decoded at once; False: in bands. Raises ValueError where it may be neither."""
    width, height = image.size
    if image.mode not in _MODES:
        raise ValueError(f"{path}: pixels of mode {image.mode}; convert the image to 8-bit RGB")
    if _is_turned(image):
        raise ValueError(f"{path}: its orientation tag turns it, which programs heed or not, so places on it are "
                         "ambiguous; turn its pixels and remove the tag (vips autorot), or remove the tag")  # fmt: skip
    if width * height <= max_image_mpx * 1e6:
        return True
    convert = f"convert it: vips tiffsave {path.name} tiled.tif --tile --pyramid --bigtiff --compression deflate"
    size = f"{path}: {width * height / 1e6:.0f} megapixels would be decoded at once, max_image_mpx is {max_image_mpx}"
    if scratch is None:
        raise ValueError(f"{size}; raise it, name a scratch folder (--scratch), or {convert}")
    if _needs_all(image):
        raise ValueError(f"{size}, and it is progressive or interlaced: no band of it decodes alone; {convert}")
    return False


def _converted(path: Path, kind: str, size: tuple[int, int], folder: Path) -> Path:
    """Decode an image, row by row, into a tiled TIFF of raw pixels; returns its path.

    Raises:
        ValueError: the disk has no room, or the image is damaged.
    """
    import pyvips  # here alone: libvips starts threads, which few slides need

    folder.mkdir(parents=True, exist_ok=True)
    files.sweep(folder, _NAME)
    across, down = (-(-side // _TILE_PX) for side in size)
    needed, free = 3 * across * down * _TILE_PX**2 + (1 << 20), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{path}: its scratch file would take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in --scratch; "
            "name another folder"
        )
    print(f"{path.name}: decoding into a scratch file of {needed / 1e9:.1f} GB", flush=True)
    target = files.temporary(folder / _NAME)
    try:
        # Unlimited: libvips would refuse a strip of more than 50 MB; the size of the image was checked above.
        load = getattr(pyvips.Image, f"{kind.lower()}load")
        # What is damaged inside a JPEG is a warning to libjpeg, which paints it grey.
        fail_on = "warning" if kind == "JPEG" else "error"
        image = load(str(path), access="sequential", fail_on=fail_on, unlimited=True)
        if image.interpretation != "srgb":
            image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=[255, 255, 255])
        image.cast("uchar").tiffsave(
            str(target), tile=True, tile_width=_TILE_PX, tile_height=_TILE_PX, bigtiff=True, compression="none",
            keep="none",
        )  # fmt: skip
    except pyvips.Error as error:
        target.unlink(missing_ok=True)
        raise ValueError(f"{path}: opens, but does not decode ({_line(error)}); restore the file") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
