"""A small picture of a slide, and what of it is tissue.

In: an open slide and its grid of tiles. Out: an overview (about 7 um per px), the mask of tissue on it, and the share
of tissue per tile.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.slides import DecodeError, Grid, Pixels, Slide

# Colour or mid darkness makes tissue (also unstained grey tissue); black is a frame, no tissue. Set by eye on H&E of
# breast, olfactory bulb and muscle, where glass has a chroma under 18 and a luminance over 220.
_MIN_CHROMA, _DARK, _BLACK = 25, 200, 25
_TILE_PX, _BLOCK = 16, 16  # the overview has 16 px per tile (7 um/px at 112 um), read in blocks of 16 x 16 tiles

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Overview:
    """A picture of a slide's whole grid, `per_tile` px a tile; tiles that do not decode are white."""

    rgb: Pixels  # [rows * per_tile, cols * per_tile, 3]
    decoded: Mask  # [rows, cols]
    per_tile: int

    def shares(self, mask: Mask) -> npt.NDArray[np.float32]:
        """[rows, cols] share of each tile where `mask` (over `rgb`) holds; NaN where the slide does not decode."""
        rows, cols = self.decoded.shape
        parts = mask.reshape(rows, self.per_tile, cols, self.per_tile)
        return np.where(self.decoded, parts.mean(axis=(1, 3), dtype=np.float32), np.float32(np.nan))


def read_overview(slide: Slide, grid: Grid) -> Overview:
    """The overview of a slide, read block by block; where a block does not decode, tile by tile."""
    k = _TILE_PX
    pad = (-(-grid.rows // _BLOCK) * _BLOCK, -(-grid.cols // _BLOCK) * _BLOCK)
    rgb = np.full((pad[0] * k, pad[1] * k, 3), 255, np.uint8)
    decoded = np.zeros(pad, bool)

    def read(row: int, col: int, span: int) -> None:
        pixels = slide.read(*grid.box(row, col, span), span * k)
        rgb[row * k : (row + span) * k, col * k : (col + span) * k] = pixels
        decoded[row : row + span, col : col + span] = True

    for row in range(0, grid.rows, _BLOCK):
        for col in range(0, grid.cols, _BLOCK):
            try:
                read(row, col, _BLOCK)
            except DecodeError:
                _tile_by_tile(read, grid, row, col)
    return Overview(rgb[: grid.rows * k, : grid.cols * k], decoded[: grid.rows, : grid.cols], k)


def _tile_by_tile(read, grid: Grid, row0: int, col0: int) -> None:  # type: ignore[no-untyped-def]
    """Read a block whose read failed: one damaged place must not hide its neighbours."""
    for row in range(row0, min(row0 + _BLOCK, grid.rows)):
        for col in range(col0, min(col0 + _BLOCK, grid.cols)):
            try:
                read(row, col, 1)
            except DecodeError:
                continue  # stays marked as not decoded: the caller counts it


def tissue_mask(pixels: Pixels) -> Mask:
    """[H, W] true where there is tissue."""
    red, green, blue = (pixels[..., c].astype(np.int16) for c in range(3))  # a reduction over 3 is slow in numpy
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    light = (red + green + blue) / 3
    return ((chroma > _MIN_CHROMA) | (light < _DARK)) & (light > _BLACK)
