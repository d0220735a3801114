"""A small picture of a slide, and what of it is tissue.

In: an open slide and its grid of tiles. Out: an overview (about 7 um per px), the mask of tissue on it, the share of
tissue per tile, and what light the tissue takes from each place (for registration and fingerprints).

All is measured against the slide's own glass, which may be white, grey or pink: the absorption of a pixel is the
largest share of light that it takes from any channel, so it is HSV's saturation for a dye and darkness for grey tissue.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from data_prep import quality
from data_prep.slides import DecodeError, Grid, Pixels, Slide

Mask = npt.NDArray[np.bool_]

_TILE_PX, _BLOCK = 16, 16  # the overview has 16 px per tile (7 um/px at 112 um), read in blocks of 16 x 16 tiles
_MAX_PX = 16_000_000  # of an overview; slides larger than about 28 x 28 mm get fewer px per tile
_JPEG_PX, _JPEG_QUALITY = 1024, 80  # of the picture that the store keeps

# Set by eye on overviews of H&E of breast, brain, muscle and skin, on white, grey and pink glass.
_GLASS = np.array([245.0, 245.0, 245.0])  # where a slide shows no glass of its own
_SMOOTH, _GLASS_CHROMA, _GLASS_DARK = 10, 30, 60  # glass: 5 x 5 px that differ by less, pale and not dark
_BLACK = 30  # no channel is lighter: a frame, where it is large
# Otsu's threshold, kept within bounds: without them it splits bare glass, or a slide full of tissue, into halves.
_WEAK, _SURE = (16, 40), (32, 80)
_ROUGH = 2.5  # fine structure of tissue, grey levels; a glow of eosin and ink out of focus have less
_ROUGH_SHARE = 0.35  # of a piece of tissue at least
_SPECK_UM2 = 12_000.0  # smaller pieces and holes are dust and lumens: about one tile of 112 um


@dataclass(frozen=True)
class Overview:
    """A picture of a slide's whole grid, `per_tile` px a tile; tiles that do not decode are white."""

    rgb: Pixels  # [rows * per_tile, cols * per_tile, 3]
    decoded: Mask  # [rows, cols]
    per_tile: int
    px_px0: float  # level-0 px per px of the overview
    size_px0: tuple[int, int]  # width, height of the slide

    def shares(self, mask: Mask) -> npt.NDArray[np.float32]:
        """[rows, cols] share of each tile where `mask` (over `rgb`) holds; NaN where the slide does not decode."""
        rows, cols = self.decoded.shape
        parts = mask.reshape(rows, self.per_tile, cols, self.per_tile)
        return np.where(self.decoded, parts.mean(axis=(1, 3), dtype=np.float32), np.float32(np.nan))

    @functools.cached_property
    def glass(self) -> npt.NDArray[np.float64]:
        """[3] colour of the empty slide."""
        return glass(self.rgb)

    def jpeg(self) -> bytes:
        """The picture of the slide alone (the grid reaches over its border), at most 1024 px long."""
        width, height = (max(1, round(side / self.px_px0)) for side in self.size_px0)
        pixels = self.rgb[:height, :width]
        scale = min(1.0, _JPEG_PX / max(width, height))
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), _JPEG_QUALITY, "RGB", "420", fastdct=False))


def read_overview(slide: Slide, grid: Grid) -> Overview:
    """The overview of a slide, read block by block; where a block does not decode, tile by tile."""
    k = _TILE_PX
    while k > 1 and grid.rows * grid.cols * k * k > _MAX_PX:
        k //= 2
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
    return Overview(
        rgb[: grid.rows * k, : grid.cols * k], decoded[: grid.rows, : grid.cols], k, grid.tile_px0 / k,
        (slide.width_px0, slide.height_px0),
    )  # fmt: skip


def _tile_by_tile(read, grid: Grid, row0: int, col0: int) -> None:  # type: ignore[no-untyped-def]
    """Read a block whose read failed: one damaged place must not hide its neighbours."""
    for row in range(row0, min(row0 + _BLOCK, grid.rows)):
        for col in range(col0, min(col0 + _BLOCK, grid.cols)):
            try:
                read(row, col, 1)
            except DecodeError:
                continue  # stays marked as not decoded: the caller counts it


def glass(rgb: Pixels) -> npt.NDArray[np.float64]:
    """[3] colour of the empty slide: of the brightest smooth and pale places; nearly white where there are none."""
    around = np.ones((5, 5), np.uint8)
    spread = quality.planes(cv2.subtract(cv2.dilate(rgb, around), cv2.erode(rgb, around)))[3]
    light, darkest = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), quality.planes(rgb)[4]
    # Pure white was never scanned (or is over-exposed, and then as good as the colour for slides without glass).
    smooth = (spread <= _SMOOTH) & (light > _GLASS_DARK) & (darkest < 255)
    if smooth.mean() < 0.005:
        return _GLASS
    top = np.percentile(light[smooth], 90)
    bright = smooth & (light >= top - 6) & (light <= top + 6)
    found = np.array([np.median(channel[bright]) for channel in cv2.split(rgb)])
    return found if np.ptp(found) <= _GLASS_CHROMA else _GLASS


def absorption(rgb: Pixels, empty: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """[H, W] the largest share of light (of 255) that a place takes from any channel, against empty glass."""
    tables = np.clip(255 - np.arange(256)[:, None] * 255 / empty, 0, 255).astype(np.uint8)
    taken = [cv2.LUT(rgb[..., c], np.ascontiguousarray(tables[:, c])) for c in range(3)]
    return np.maximum(np.maximum(taken[0], taken[1]), taken[2])


def tile_share(pixels: Pixels) -> float:
    """Share of tissue of one tile by itself, without the slide around it."""
    return float((absorption(pixels, _GLASS) > _SURE[0]).mean())


def tissue_mask(rgb: Pixels, px_um: float, empty: npt.NDArray[np.float64] | None = None) -> Mask:
    """[H, W] true where there is tissue.

    Args:
        rgb: an overview, `px_um` um per px.
        empty: the colour of glass, where it is known already.
    """
    taken = absorption(cv2.GaussianBlur(rgb, (0, 0), 1.0), glass(rgb) if empty is None else empty)
    barred = _barred(rgb, px_um)
    if barred.all():
        return ~barred
    otsu, _ = cv2.threshold(taken[~barred].reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    rough = _rough(taken)
    found = (taken > np.clip(otsu, *_SURE)) | ((taken > np.clip(otsu / 2, *_WEAK)) & rough)
    found = _structured(found & ~barred, rough)
    found = _pieces(found, _SPECK_UM2 / px_um**2)
    return ~_pieces(~found, _SPECK_UM2 / px_um**2) & ~barred


def _barred(rgb: Pixels, px_um: float) -> Mask:
    """[H, W] where there can be no tissue: large black areas and pen, with the blur around them."""
    black = _pieces(quality.planes(rgb)[3] < _BLACK, 2 * _SPECK_UM2 / px_um**2)
    pen = _pieces(quality.pen_mask(rgb), _SPECK_UM2 / px_um**2)
    return cv2.dilate((black | pen).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0


def _rough(taken: npt.NDArray[np.uint8]) -> Mask:
    """[H, W] where the absorption has fine structure; a smooth slope has none, however steep."""
    fine = taken.astype(np.float32)
    fine -= cv2.GaussianBlur(fine, (0, 0), 2.0)
    return cv2.blur(cv2.multiply(fine, fine), (9, 9)) > _ROUGH**2


def _labels(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(number of the piece at each px, 0 = none; px of each piece)."""
    _, labels, figures, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    return labels, figures[:, cv2.CC_STAT_AREA]


def _pieces(mask: Mask, min_px: float) -> Mask:
    """The pieces of a mask that have at least so many px."""
    labels, size = _labels(mask)
    kept = size >= min_px
    kept[0] = False
    return kept[labels]


def _structured(mask: Mask, rough: Mask) -> Mask:
    """The pieces of a mask whose inside has fine structure; pieces without an inside are left as they are."""
    labels, size = _labels(mask)
    inside = cv2.erode(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    total = np.bincount(labels[inside], minlength=len(size))
    kept = np.bincount(labels[inside & rough], minlength=len(size)) >= _ROUGH_SHARE * total
    kept[0] = False
    return kept[labels]
