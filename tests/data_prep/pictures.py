"""Slides in memory, and a rendered section with its truth, for the tests of quality control."""

import functools
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from data_prep import tissue
from data_prep.slides import DecodeError, Grid, Pixels
from data_prep.synthetic.render import Stain, render
from data_prep.synthetic.tissue import RASTER_UM, Tissue, grow

STAIN = Stain(1.1, 1.05, 0.2, 243.0, folds=1, blurs=1)


@dataclass
class Held:
    """A slide whose pixels are an array; what lies left of `damaged_px0` does not decode."""

    pixels: Pixels
    damaged_px0: int = 0
    embedded_mpp: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def width_px0(self) -> int:
        return self.pixels.shape[1]

    @property
    def height_px0(self) -> int:
        return self.pixels.shape[0]

    def close(self) -> None:
        """Nothing is open."""

    def read(self, x_px0: int, y_px0: int, w_px0: int, h_px0: int, out_px: int) -> Pixels:
        if x_px0 < self.damaged_px0:
            raise DecodeError("damaged")
        framed = np.full((h_px0, w_px0, 3), 255, np.uint8)
        part = self.pixels[max(y_px0, 0) : y_px0 + h_px0, max(x_px0, 0) : x_px0 + w_px0]
        framed[: part.shape[0], : part.shape[1]] = part
        return np.asarray(cv2.resize(framed, (out_px, out_px), interpolation=cv2.INTER_AREA))


def overview_of(pixels: Pixels, mpp: float, tile_um: float = 112.0) -> tissue.Overview:
    """The overview of pixels of `mpp` um, 7 um/px unless told otherwise."""
    slide = Held(np.ascontiguousarray(pixels))
    return tissue.read_overview(slide, Grid.over(slide, tile_um / mpp))


@functools.cache
def section(seed: int, side_um: float = 1600.0, mpp: float = 2.0) -> tuple[Tissue, Pixels]:
    """A grown tissue and its H&E; equal for equal arguments."""
    rng = np.random.default_rng([seed, 7])
    grown = grow(rng, side_um)
    return grown, render(rng, grown, STAIN, mpp)


def truth_of(grown: Tissue, shape: tuple[int, int], px_um: float) -> npt.NDArray[np.bool_]:
    """[H, W] where the tissue is, over an overview of `px_um` um per px; beside the image there is none."""
    rows, cols = (((np.arange(side) + 0.5) * px_um / RASTER_UM).astype(int) for side in shape)
    inside = np.zeros((max(rows) + 1, max(cols) + 1), bool)
    height, width = grown.inside.shape
    inside[:height, :width] = grown.inside[: len(inside), : inside.shape[1]] > 0
    return inside[np.ix_(rows, cols)]
