"""Slides as OpenSlide reads them: the reference for every other reader, and the reader of all that is unusual.

In: a file of a vendor whom OpenSlide knows. Out: a slide, its mpp and whitelisted facts.

Label, macro and thumbnail images are never opened, and of the slide's properties only numbers named here are copied:
the rest may hold names of people and machines.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from data_prep.slides.base import DecodeError
from data_prep.slides.sampling import Level, Part, Pyramid

_FACTS = {"openslide.objective-power": "objective_power", "openslide.level-count": "levels"}
# The first that is there counts; each names the keys of both axes.
_MPP_KEYS = (
    ("openslide.mpp-x", "openslide.mpp-y"), ("openslide.mirax.MPP",) * 2, ("aperio.MPP",) * 2
)  # fmt: skip
_PER_CM_KEYS = ("hamamatsu.XResolution", "hamamatsu.YResolution")
_MPP_IN_COMMENT = re.compile(r"\bMPP\s*=\s*([0-9.]+)|<PixelSizeMicrons>\s*([0-9.]+)")
_UNITS_UM = {"centimeter": 1e4, "inch": 25400.0}


def one_mpp(x: float | None, y: float | None) -> float | None:
    """The mpp of square pixels; None where it is unknown, or differs by more than 1 % between the axes."""
    if not x or not y or not 0.99 <= x / y <= 1.01:
        return None
    return (x + y) / 2


def on_white(image: Image.Image) -> Image.Image:
    """An image without transparency: unscanned areas are transparent black, and must not become black."""
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _per(unit_um: float | None, *per_unit: float | None) -> float | None:
    """mpp of pixels per unit, given for both axes."""
    return one_mpp(*(unit_um / value if unit_um and value else None for value in per_unit))


def embedded_mpp(properties: Mapping[str, str]) -> float | None:
    """What the properties tell, by a fixed order of keys."""
    told = [one_mpp(*(_number(properties.get(key)) for key in keys)) for keys in _MPP_KEYS]
    told.append(_per(1e4, *(_number(properties.get(key)) for key in _PER_CM_KEYS)))
    found = _MPP_IN_COMMENT.search(properties.get("openslide.comment", ""))
    comment = _number(found[1] or found[2]) if found else None
    told.append(one_mpp(comment, comment))
    unit_um = _UNITS_UM.get(properties.get("tiff.ResolutionUnit", ""))
    told.append(_per(unit_um, *(_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")))
    return next((mpp for mpp in told if mpp), None)


def vendor(path: Path) -> str | None:
    """OpenSlide's name for the format of a file, None where it knows none."""
    return openslide.OpenSlide.detect_format(path)


class ReferenceSlide(Pyramid):
    """A slide that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises ValueError where OpenSlide cannot."""
        self.path = path
        self._handle: openslide.OpenSlide | None = None
        self._owner = 0
        handle = self.handle()
        properties = dict(handle.properties)
        self.levels = tuple(Level.of(size, handle.dimensions) for size in handle.level_dimensions)
        self.tile_sizes = [
            tuple(int(properties.get(f"openslide.level[{i}].tile-{side}", 0)) for side in ("width", "height"))
            for i in range(len(self.levels))
        ]
        self._downsamples = tuple(handle.level_downsamples)
        self.embedded_mpp = embedded_mpp(properties)
        self.facts: dict[str, Any] = {"reader": "openslide"} | {
            name: value for key, name in _FACTS.items() if (value := _number(properties.get(key))) is not None
        }

    def handle(self) -> openslide.OpenSlide:
        """The handle of this process, opened at first use, again after an error, and again behind a fork."""
        if self._handle is None or self._owner != os.getpid():
            try:
                self._handle, self._owner = openslide.OpenSlide(self.path), os.getpid()
            except openslide.OpenSlideError as error:
                raise ValueError(f"{self.path}: OpenSlide cannot open it ({error}); restore or convert it") from error
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}  # a handle does not survive a pickle

    def close(self) -> None:
        """As Slide.close."""
        if self._handle is not None and self._owner == os.getpid():
            self._handle.close()
        self._handle = None

    def _part(self, level: int, x: int, y: int, w: int, h: int, out: tuple[int, int]) -> Part:
        # OpenSlide takes whole pixels of level 0 and divides them by a number of its own: where that falls between two
        # pixels of the level it interpolates, so what comes back begins exactly there.
        downsample = self._downsamples[level]
        x0, y0 = math.floor(x * downsample + 1e-6), math.floor(y * downsample + 1e-6)
        size = (w, h) if x0 == x * downsample and y0 == y * downsample else (w + 1, h + 1)
        try:
            image = self.handle().read_region((x0, y0), level, size)
        except openslide.OpenSlideError as error:
            self.close()  # a handle that failed once fails for ever
            raise DecodeError(f"{self.path}: does not decode at level-0 px ({x0}, {y0}): {error}") from error
        return Part(np.asarray(on_white(image)), x0 / downsample, y0 / downsample)
