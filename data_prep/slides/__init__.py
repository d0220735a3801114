"""Slide images behind one small interface; the only package that knows OpenSlide.

In: a slide of any vendor whom OpenSlide knows, TIFF, OME-TIFF, JPEG or PNG. Out: size, the embedded mpp, a few
whitelisted facts, and `read`: any rectangle of level 0 as a square of RGB pixels.

What lies outside the slide, or was never scanned, is white. Label, macro and thumbnail images are never opened.
"""

from pathlib import Path

from data_prep.slides import reference, tiff, whole
from data_prep.slides.base import DecodeError, Grid, Pixels, Slide, files_of
from data_prep.slides.segments import UnusualError

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
    vendor, is_tiff = reference.vendor(path), tiff.is_tiff(path)
    try:
        if is_tiff and (vendor is None or (vendor in _SEGMENTED and tiff.is_ome(path))):
            return tiff.of_series(path)
    except UnusualError:
        pass  # the readers below know more of the formats, and say what is wrong
    if vendor is None:
        return whole.open_whole(path, max_image_mpx, scratch)
    slide = reference.ReferenceSlide(path)
    try:
        return tiff.like_reference(slide) if vendor in _SEGMENTED else slide
    except UnusualError:
        return slide
