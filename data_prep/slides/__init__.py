"""Slide images behind one small interface; the only package that knows OpenSlide.

In: a slide of any vendor whom OpenSlide knows, TIFF, OME-TIFF, JPEG or PNG. Out: size, the embedded mpp, a few
whitelisted facts, and `read`: any rectangle of level 0 as a square of RGB pixels.

What lies outside the slide, or was never scanned, is white. Label, macro and thumbnail images are never opened.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_prep.slides import reference, tiff, whole
from data_prep.slides.base import DecodeError, Grid, Header, Pixels, Slide, files_of
from data_prep.slides.segments import InOnePieceError, UnusualError

__all__ = ["DecodeError", "Grid", "Header", "Pixels", "Slide", "files_of", "header", "open_slide"]
Opened = TypeVar("Opened", Slide, Header)
_SEGMENTED = ("aperio", "generic-tiff")  # OpenSlide's formats that are one plain TIFF


def open_slide(path: Path, max_image_mpx: int, scratch: Path | None = None) -> Slide:
    """A slide, by content and not by name.

    Args:
        scratch: folder for a tiled copy of an image that cannot be read in parts and is larger than `max_image_mpx`.

    Raises:
        ValueError: no such file, no slide, damaged, or too large to be decoded at once.
    """
    return _opened(path, lambda: whole.open_whole(path, max_image_mpx, scratch))


def header(path: Path, max_image_mpx: int, scratch: Path | None = None) -> Header:
    """As `open_slide`, of the header alone: no pixel is decoded, no scratch file written.

    Raises:
        ValueError: as `open_slide`, as far as a header tells.
    """
    slide = _opened(path, lambda: whole.header(path, max_image_mpx, scratch))
    if isinstance(slide, Header):
        return slide
    try:
        return Header(slide.width_px0, slide.height_px0, slide.embedded_mpp)
    finally:
        slide.close()


def _opened(path: Path, as_whole: Callable[[], Opened]) -> Slide | Opened:
    """A slide; `as_whole` opens one that cannot be read in parts."""
    if not path.is_file():
        raise ValueError(f"{path}: no such image; correct its path")
    vendor = reference.vendor(path)
    if tiff.is_tiff(path) and (vendor is None or (vendor in _SEGMENTED and tiff.is_ome(path))):
        slide = _tiff(path)
        if slide:
            return slide
    if vendor is None:
        whole_slide = as_whole()
        if tiff.is_tiff(path):
            tiff.check_is_largest(path, (whole_slide.width_px0, whole_slide.height_px0))
        return whole_slide
    found = reference.ReferenceSlide(path)
    if vendor == "generic-tiff":
        tiff.check_is_largest(path, (found.width_px0, found.height_px0))
    try:
        return tiff.like_reference(found) if vendor in _SEGMENTED else found
    except UnusualError:
        return found


def _tiff(path: Path) -> Slide | None:
    """A TIFF of which OpenSlide reads nothing, or a part; None: the other readers know it, or say what is wrong.

    Raises:
        ValueError: an OME-TIFF of something else than colours, of which another reader would show the first channel.
    """
    try:
        return tiff.of_series(path)
    except InOnePieceError:
        return None
    except UnusualError as error:
        if tiff.is_ome(path):
            raise ValueError(f"{path}: {error}; convert the image to 8-bit RGB") from error
        return None
