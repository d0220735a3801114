"""What is tissue, and how sharp it is: cheap figures that are stored as flags; nothing is dropped by them alone.

In: a slide and its grid, or a tile's pixels. Out: the share of tissue per tile, sharpness, and summary facts.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.slides import DecodeError, Grid, Pixels, Slide

# Colour or mid darkness makes tissue (also unstained grey tissue); black is a frame, no tissue. Set by eye on H&E of
# breast, olfactory bulb and muscle, where glass has a chroma under 18 and a luminance over 220.
_MIN_CHROMA, _DARK, _BLACK = 25, 200, 25
_TILE_PX, _BLOCK = 16, 16  # the overview has 16 px per tile (7 um/px at 112 um), read in blocks of 16 x 16 tiles


def tissue_mask(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """[H, W] true where there is tissue."""
    red, green, blue = (pixels[..., c].astype(np.int16) for c in range(3))  # a reduction over 3 is slow in numpy
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    light = (red + green + blue) / 3
    return ((chroma > _MIN_CHROMA) | (light < _DARK)) & (light > _BLACK)


def _shares(slide: Slide, grid: Grid, row: int, col: int, span: int) -> npt.NDArray[np.float32]:
    """[span, span] tissue share of a block of tiles."""
    mask = tissue_mask(slide.read(*grid.box(row, col, span), span * _TILE_PX))
    return mask.reshape(span, _TILE_PX, span, _TILE_PX).mean(axis=(1, 3), dtype=np.float32)


def tissue_map(slide: Slide, grid: Grid) -> npt.NDArray[np.float32]:
    """[rows, cols] tissue share of every tile, from a coarse overview; NaN where the slide does not decode."""
    pad = (-(-grid.rows // _BLOCK) * _BLOCK, -(-grid.cols // _BLOCK) * _BLOCK)
    shares = np.full(pad, np.nan, np.float32)
    for row in range(0, grid.rows, _BLOCK):
        for col in range(0, grid.cols, _BLOCK):
            try:
                shares[row : row + _BLOCK, col : col + _BLOCK] = _shares(slide, grid, row, col, _BLOCK)
            except DecodeError:
                _tile_by_tile(slide, grid, shares, row, col)
    return shares[: grid.rows, : grid.cols]


def _tile_by_tile(slide: Slide, grid: Grid, shares: npt.NDArray[np.float32], row0: int, col0: int) -> None:
    """Fill a block whose read failed: one damaged place must not hide its neighbours."""
    for row in range(row0, min(row0 + _BLOCK, grid.rows)):
        for col in range(col0, min(col0 + _BLOCK, grid.cols)):
            try:
                shares[row, col] = _shares(slide, grid, row, col, 1)[0, 0]
            except DecodeError:
                continue  # stays NaN: the caller counts it


def sharpness(pixels: Pixels) -> float:
    """Variance of the Laplacian of the grey image; low = out of focus, or empty."""
    return float(cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


@dataclass
class Summary:
    """Figures of the tiles that were kept, gathered while they are encoded."""

    tissue: list[float] = field(default_factory=list)
    sharp: list[float] = field(default_factory=list)

    def add(self, pixels: Pixels, tissue: float) -> None:
        """Take a tile into account."""
        self.tissue.append(tissue)
        self.sharp.append(sharpness(pixels))

    def facts(self) -> dict[str, float]:
        """Rounded, because they are for reading."""
        if not self.tissue:
            return {}
        low, middle = np.percentile(self.sharp, [5, 50])
        return {
            "tissue_mean": round(float(np.mean(self.tissue)), 4),
            "sharpness_p5": round(float(low), 2),
            "sharpness_median": round(float(middle), 2),
        }
