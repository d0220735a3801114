"""Rectangles of a pyramid as tiles of a wanted size, placed to a fraction of a pixel.

In: the levels of a pyramid, and a way to get whole pixels of one of them. Out: `Pyramid`, which answers `Slide.read`
from the deepest level that is fine enough.

A rectangle of level 0 rarely falls on whole pixels of a deeper level. It is never rounded to them: each output pixel is
the mean of the area that it covers, with the pixels at the edge of that area counted by their share.
"""

import abc
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.slides.base import Pixels

Floats = npt.NDArray[np.float32]

TOLERANCE = 1.01  # a level may be this much coarser than asked: 4.0003-fold pyramids are common
_WHOLE = 1e-4  # of a pixel: closer to a whole number is whole
_MAX_AT_ONCE_PX = 8 << 20  # a larger part of a level is read in pieces, so that an overview needs no more memory


@dataclass(frozen=True)
class Level:
    """Size of a level, and level-0 pixels per pixel of it."""

    width_px: int
    height_px: int
    across: float
    down: float

    @classmethod
    def of(cls, size: tuple[int, int], size0: tuple[int, int]) -> "Level":
        """Of a level of `size` (width, height) below a level 0 of `size0`.

        Writers that halve or quarter cut off what does not fill a pixel: then the ratio is whole, and the ratio of the
        sizes is slightly off, on a narrow slide by whole pixels at the far end.
        """
        ratios = [big / small for big, small in zip(size0, size, strict=True)]
        whole = [round(ratio) for ratio in ratios]
        if whole[0] == whole[1] and all(abs(b - s * whole[0]) < whole[0] for b, s in zip(size0, size, strict=True)):
            return cls(*size, whole[0], whole[0])
        return cls(*size, *ratios)


@dataclass(frozen=True)
class Part:
    """Pixels [H, W, 3] of a level: the first one's corner lies at (x, y) of the level, one is `step` px of it wide.

    They are bytes, or, where that is cheaper, the same numbers as floats.
    """

    pixels: Pixels | Floats
    x: float
    y: float
    step: int = 1


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < _WHOLE


def resized(pixels: Floats | Pixels, out: tuple[int, int]) -> Pixels:
    """`pixels` [H, W, 3] as [*out, 3]: INTER_AREA when shrinking, cubic when enlarging."""
    height, width = pixels.shape[:2]
    if (height, width) == out:
        return np.ascontiguousarray(pixels, np.uint8)
    if height < out[0] or width < out[1]:
        return cv2.resize(pixels.astype(np.uint8, copy=False), out[::-1], interpolation=cv2.INTER_CUBIC)
    if height % out[0] == 0 and width % out[1] == 0:
        return cv2.resize(pixels.astype(np.uint8, copy=False), out[::-1], interpolation=cv2.INTER_AREA)
    # One pixel more than asked: the same two weights as INTER_AREA to 1 in 2 * out, in an eighth of the time.
    near = height <= out[0] + 1 and width <= out[1] + 1
    # OpenCV takes the areas of fractions of pixels faster in floats than in bytes.
    floats = pixels.astype(np.float32, copy=False)
    area = cv2.resize(floats, out[::-1], interpolation=cv2.INTER_LINEAR if near else cv2.INTER_AREA)
    return cv2.convertScaleAbs(area)


@functools.lru_cache(maxsize=512)
def _weights(start: float, step: float, out: int, size: int) -> sparse.csr_matrix:
    """[out, size] share of each of `size` pixels in the mean over [start + i * step, start + (i + 1) * step)."""
    edges = start + step * np.arange(out + 1)
    taps = math.ceil(step) + 1
    at = np.floor(edges[:-1]).astype(np.int64)[:, None] + np.arange(taps)
    share = np.minimum(at + 1, edges[1:, None]) - np.maximum(at, edges[:-1, None])
    values = (share.clip(0) / step).astype(np.float32)
    # Shares of nothing may name a pixel behind the last one.
    return sparse.csr_matrix((values.ravel(), at.clip(0, size - 1).ravel(), np.arange(out + 1) * taps), (out, size))


def area_mean(pixels: Floats | Pixels, x: float, y: float, w: float, h: float, out: tuple[int, int]) -> Pixels:
    """[*out, 3] mean over the areas into which `out` (rows, columns) cuts the rectangle (x, y, w, h) of `pixels`."""
    if _is_whole(x) and _is_whole(y) and _is_whole(w) and _is_whole(h):
        return resized(pixels[round(y) : round(y + h), round(x) : round(x + w)], out)
    height, width = pixels.shape[:2]
    rows = _weights(round(y, 6), round(h / out[0], 9), out[0], height)
    columns = _weights(round(x, 6), round(w / out[1], 9), out[1], width)
    narrow = rows @ pixels.reshape(height, -1).astype(np.float32, copy=False)
    turned = cv2.transpose(narrow.reshape(out[0], width, 3)).reshape(width, -1)  # numpy takes six times as long
    small = cv2.convertScaleAbs((columns @ turned).reshape(out[1], out[0], 3))
    return cv2.transpose(small)


class Pyramid(abc.ABC):
    """A slide of one or more levels; a reader says how whole pixels of one are got."""

    path: Path
    levels: tuple[Level, ...]
    embedded_mpp: float | None
    facts: dict[str, Any]

    @property
    def width_px0(self) -> int:
        """Width of level 0."""
        return self.levels[0].width_px

    @property
    def height_px0(self) -> int:
        """Height of level 0."""
        return self.levels[0].height_px

    @abc.abstractmethod
    def _part(self, level: int, x: int, y: int, w: int, h: int, out: tuple[int, int]) -> Part:
        """At least the pixels of a rectangle of a level, white beyond the level.

        Args:
            out: rows and columns that the rectangle will become; its pixels may come in larger steps where that is
                cheaper.

        Raises:
            DecodeError: it does not decode.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """As Slide.close."""

    def read(self, x_px0: int, y_px0: int, w_px0: int, h_px0: int, out_px: int) -> Pixels:
        """As Slide.read, from the deepest level that is fine enough."""
        asked = TOLERANCE * min(w_px0, h_px0) / out_px
        fine = [i for i, level in enumerate(self.levels) if max(level.across, level.down) <= asked]
        index = max(fine, default=0)
        level = self.levels[index]
        box = (x_px0 / level.across, y_px0 / level.down, w_px0 / level.across, h_px0 / level.down)
        return self._sampled(index, *box, (out_px, out_px))

    def _sampled(self, level: int, x: float, y: float, w: float, h: float, out: tuple[int, int]) -> Pixels:
        """A rectangle of a level as [*out, 3]; a large one in halves."""
        if w * h > _MAX_AT_ONCE_PX and max(out) > 1:
            axis = 0 if out[0] >= out[1] else 1
            half = out[axis] // 2
            share = half / out[axis]
            if axis == 0:
                parts = [
                    self._sampled(level, x, y, w, h * share, (half, out[1])),
                    self._sampled(level, x, y + h * share, w, h * (1 - share), (out[0] - half, out[1])),
                ]
            else:
                parts = [
                    self._sampled(level, x, y, w * share, h, (out[0], half)),
                    self._sampled(level, x + w * share, y, w * (1 - share), h, (out[0], out[1] - half)),
                ]
            return np.concatenate(parts, axis=axis)
        x0, y0 = math.floor(x + _WHOLE), math.floor(y + _WHOLE)
        x1, y1 = math.ceil(x + w - _WHOLE), math.ceil(y + h - _WHOLE)
        part = self._part(level, x0, y0, x1 - x0, y1 - y0, out)
        step = part.step
        return area_mean(part.pixels, (x - part.x) / step, (y - part.y) / step, w / step, h / step, out)
