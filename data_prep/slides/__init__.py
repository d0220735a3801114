"""Slide images behind one small interface; the only package that knows OpenSlide.

In: a slide of any vendor whom OpenSlide knows, TIFF, OME-TIFF, JPEG or PNG. Out: size, the embedded mpp, a few
whitelisted facts, and `read`: any rectangle of level 0 as a square of RGB pixels.

What lies outside the slide, or was never scanned, is white. Label, macro and thumbnail images are never opened.
"""

from pathlib import Path

from data_prep.slides import reference, tiff, whole
from data_prep.slides.base import DecodeError, Grid, Pixels, Slide, files_of
from data_prep.slides.segments import InOnePieceError, UnusualError

__all__ = ["DecodeError", "Grid", "Pixels", "Slide", "files_of", "open_slide"]
_SEGMENTED = ("aperio", "generic-tiff")  # OpenSlide's formats that are one plain TIFF


def open_slide(path: Path, max_image_mpx: int, scratch: Path | None = None) -> Slide:
    """A slide, by content and not by name.

    Args:
        scratch: folder for a tiled copy of an image that cannot be read in parts and is larger than `max_image_mpx`.

    Raises:
        ValueError: no such file, no slide, damaged, or too large to be decoded at once.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such image; correct the manifest")
    vendor = reference.vendor(path)
    if tiff.is_tiff(path) and (vendor is None or (vendor in _SEGMENTED and tiff.is_ome(path))):
        slide = _tiff(path)
        if slide:
            return slide
    if vendor is None:
        return whole.open_whole(path, max_image_mpx, scratch)
    found = reference.ReferenceSlide(path)
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
